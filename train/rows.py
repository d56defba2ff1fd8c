"""Rows of training data from a local file or the hub, and the checks of what stands in their cells.

Every error names the file, the line (of JSONL) or row (of parquet and of the hub), the column and what to do about it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

SPELLINGS: dict[str, tuple[str, ...]] = {
    "question": ("question", "problem"),
    "thinking": ("thinking_trajectories", "deepseek_thinking_trajectory", "thinking"),
    "attempt": ("attempt", "deepseek_attempt"),
    "messages": ("messages",),
}
"""What published files call a field: s1K, s1K-1.1 (the traces of DeepSeek-R1, on which s1.1 was trained), plain ones.

`answer` and `solution` are not among them: there they hold the gold answer, which is not what a model should write."""


@dataclass(frozen=True)
class Columns:
    """The column that holds each field. None: whichever of `SPELLINGS` the first row has."""

    question: str | None = None
    thinking: str | None = None
    attempt: str | None = None
    messages: str | None = None

    def resolve(self, field: str, row: Row) -> str | None:
        """The column of `field`, None where `row` has none. Raises ValueError where several could be meant."""
        named: str | None = getattr(self, field)
        if named is not None:
            return named
        found = [name for name in SPELLINGS[field] if name in row.cells]
        if len(found) > 1:
            raise row.error(found[0], f"{' and '.join(found)} could both be the {field}; name one by columns.{field}")
        return found[0] if found else None


@dataclass(frozen=True)
class Row:
    """One row: `cells` by column, and `place`, where it stands, for messages."""

    place: str
    cells: Mapping[str, Any]

    def error(self, column: str, problem: str) -> ValueError:
        return ValueError(f"{self.place}, {column}: {problem}")

    def cell(self, column: str) -> Any:
        if column not in self.cells:
            raise ValueError(f"{self.place}: no column {column!r}; it has {', '.join(self.cells) or 'none'}")
        return self.cells[column]

    def text(self, column: str) -> str:
        """The cell's text, not empty. A list of texts is joined by line breaks, as the authors of s1 did."""
        cell = self.cell(column)
        if isinstance(cell, list) and cell and all(isinstance(part, str) for part in cell):
            cell = "\n".join(cell)
        if not isinstance(cell, str):
            raise self.error(column, f"{_shown(cell)} is not a text; write it as one, or remove the row")
        if not cell.strip():
            raise self.error(column, "empty; fill it in, or remove the row")
        return cell

    def messages(self, column: str) -> list[dict[str, Any]]:
        """A conversation: at least two messages, each with texts `role` and `content`, the last by the assistant."""
        cell = self.cell(column)
        if not isinstance(cell, list) or len(cell) < 2:
            raise self.error(column, f"{_shown(cell)} is not a list of two or more messages")
        for number, message in enumerate(cell):
            for key in ("role", "content"):
                value = message.get(key) if isinstance(message, dict) else None
                if not isinstance(value, str):
                    raise self.error(column, f"message {number} has no text {key!r}: {_shown(message)}")
        if cell[-1]["role"] != "assistant":
            raise self.error(column, f"the last message is of {cell[-1]['role']!r}; it must be the assistant's")
        if not cell[-1]["content"].strip():
            raise self.error(column, "the last message is empty; fill it in, or remove the row")
        return cell


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_rows(source: str | Path, split: str | None = None) -> tuple[Iterator[Row], int]:
    """The rows of `source` in order, and their number.

    source  a file that ends in .jsonl or .parquet, or the id of a data set on the hub, "owner/name"
    split   of a data set on the hub, slices included ("train[:100]"); None is "train". A file has none.
    """
    path = Path(source)
    if path.suffix in (".jsonl", ".parquet"):
        if split is not None:
            raise ValueError(f"split={split!r}: {source} is a file, which has no splits; leave it out")
        if not path.is_file():
            raise ValueError(f"{source}: no such file")
        rows, count = read_jsonl(path) if path.suffix == ".jsonl" else _parquet(path)
    elif HUB_ID.fullmatch(str(source)) and not path.exists():
        rows, count = _hub(str(source), split or "train")
    else:
        raise ValueError(f"{source}: give a .jsonl or .parquet file, or a data set on the hub as owner/name")
    if count == 0:
        raise ValueError(f"{source}: empty; it needs at least one row")
    return rows, count


def read_jsonl(path: Path) -> tuple[Iterator[Row], int]:
    """The rows of a JSON lines file, blank lines apart, and their number, which may be 0."""
    with path.open("rb") as file:
        count = sum(1 for line in file if line.strip())

    def rows() -> Iterator[Row]:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                place = f"{path}, line {number}"
                try:
                    cells = json.loads(line)
                except ValueError as error:  # of JSON and of UTF-8 alike
                    raise ValueError(f"{place}: not JSON ({error})") from None
                if not isinstance(cells, dict):
                    raise ValueError(f"{place}: {_shown(cells)} is not an object with named columns")
                yield Row(place, cells)

    return rows(), count


def _parquet(path: Path) -> tuple[Iterator[Row], int]:
    parquet = needed("pyarrow.parquet", path)
    try:
        file = parquet.ParquetFile(path)
    except ValueError as error:  # pyarrow.ArrowInvalid is one
        raise ValueError(f"{path}: not a parquet file ({error})") from None

    def rows() -> Iterator[Row]:
        number = 0
        for batch in file.iter_batches(batch_size=256):
            for cells in batch.to_pylist():
                number += 1
                yield Row(f"{path}, row {number}", cells)

    return rows(), file.metadata.num_rows


def _hub(name: str, split: str) -> tuple[Iterator[Row], int]:
    data = needed("datasets", name).load_dataset(name, split=split)
    return (Row(f"{name} ({split}), row {number}", cells) for number, cells in enumerate(data, start=1)), len(data)


def needed(module: str, path: object) -> ModuleType:
    """The module, of a package that is installed with s1engine[train] only. Raises ValueError where it is missing."""
    try:
        return import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise ValueError(f"{path}: it needs {package}, which is not installed; pip install 's1engine[train]'") from None
