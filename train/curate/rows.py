"""Rows into and out of a stage: JSON lines and parquet by suffix, hub datasets by id, and which column holds what.

A row is a plain dict; columns that a stage does not know are carried along untouched.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]

SUFFIXES = (".jsonl", ".parquet")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.\[\]:%+-]+)?")

ROLES: dict[str, tuple[str, ...]] = {
    "question": ("problem", "question"),
    "answer": ("answer",),
    "solution": ("solution",),
    "source": ("source", "source_type"),
    "trace": ("thinking", "thinking_trajectories"),
    "attempt": ("attempt",),
    "error": ("error",),
    "length": ("trace_tokens",),
    "correct": ("correct",),
    "domain": ("domain",),
}
"""What a column can be to a stage, and the names it is looked for under where none is given, the first one first."""


@dataclass(frozen=True)
class Columns:
    """The name of each role's column. A role that no row has keeps its first name: that is how a stage adds it.

    trace is the model's thinking, attempt its final answer's text; length counts the trace's tokens; correct says
    whether the attempt is right; error is what an API said instead of answering.
    """

    question: str = ROLES["question"][0]
    answer: str = ROLES["answer"][0]
    solution: str = ROLES["solution"][0]
    source: str = ROLES["source"][0]
    trace: str = ROLES["trace"][0]
    attempt: str = ROLES["attempt"][0]
    error: str = ROLES["error"][0]
    length: str = ROLES["length"][0]
    correct: str = ROLES["correct"][0]
    domain: str = ROLES["domain"][0]

    @classmethod
    def find(cls, rows: Sequence[Row], named: Mapping[str, str | None] | None = None) -> Columns:
        """The columns of `rows`: those `named` (role -> name), the others by their usual names.

        Raises ValueError where a named column is in no row.
        """
        present = _present(rows)
        found = {}
        for role, names in ROLES.items():
            name = (named or {}).get(role)
            if name is not None and name not in present:
                raise ValueError(f"--{role}-column {name}: no row has it; the columns are {_listed(present)}")
            found[role] = name or next((n for n in names if n in present), names[0])
        return cls(**found)

    def require(self, rows: Sequence[Row], *roles: str) -> None:
        """Raises ValueError where a role's column is in no row."""
        present = _present(rows)
        for role in roles:
            if getattr(self, role) not in present:
                raise ValueError(
                    f"there is no column for the {role} (looked for {' or '.join(ROLES[role])}); the columns are "
                    f"{_listed(present)}: name it with --{role}-column"
                )

    def has(self, rows: Sequence[Row], role: str) -> bool:
        return getattr(self, role) in _present(rows)


def _present(rows: Sequence[Row]) -> set[str]:
    return set().union(*rows)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def text(row: Row, column: str) -> str:
    """The text of a column: "" where it is missing or null, the first item of a list (s1K's traces are such lists)."""
    value = row.get(column)
    if isinstance(value, list):
        value = value[0] if value else None
    return "" if value is None else str(value)


def question_key(question: str) -> str:
    """What identifies a question: the first 16 hex digits of its SHA-256, as in the s1 authors' files."""
    return hashlib.sha256(question.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def read_rows(sources: Sequence[str], question: str | None = None) -> list[Row]:
    """Every row of `sources`, in order. A source is a .jsonl or .parquet file, or a hub id: owner/name or
    owner/name:split (split train where it is left out).

    question: the name of the question's column, where it is not a usual one; its values have to be text or null.
    Raises ValueError with file and line for a bad row, for a file without rows and for an unknown suffix.
    """
    if not sources:
        raise ValueError("--input: name at least one .jsonl or .parquet file, or a hub id")
    names = (question,) if question else ROLES["question"]
    rows: list[Row] = []
    for source in sources:
        before = len(rows)
        for place, row in _read(source):
            for name in names:
                if not isinstance(row.get(name), str | None):
                    raise ValueError(f"{place}: {name} is {str(row[name])[:80]!r}; a question has to be text")
            rows.append(row)
        if len(rows) == before:
            raise ValueError(f"{source}: it has no row")
    return rows


def _read(source: str) -> Iterator[tuple[str, Row]]:
    path = Path(source)
    is_file = path.exists() or path.suffix in SUFFIXES or bool(path.suffix and path.parent.is_dir())
    if not is_file and not HUB_ID.fullmatch(source):
        raise ValueError(f"{source}: neither a file nor a hub id (owner/name, or owner/name:split)")
    if is_file and path.suffix not in SUFFIXES:
        raise ValueError(f"{source}: unknown suffix {path.suffix!r}; files are read as {' or '.join(SUFFIXES)}")
    if path.suffix == ".jsonl":
        yield from read_jsonl(path)
        return
    datasets = import_datasets()
    if is_file:
        if not path.is_file():
            raise FileNotFoundError(f"{source}: no such file")
        with tempfile.TemporaryDirectory() as cache:
            data = datasets.Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True)
    else:
        name, _, split = source.partition(":")
        data = datasets.load_dataset(name, split=split or "train")
    for number, row in enumerate(data, 1):
        yield f"{source}, row {number}", dict(row)


def read_jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    """(place, row) of each line that is not blank; a line that is no JSON object raises ValueError with its number."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{place}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{place}: a row has to be a JSON object, not {type(row).__name__}")
            yield place, row


def check_output(path: str, sources: Sequence[str] = ()) -> None:
    """Raises ValueError for a file that could not be written as asked, before anything is computed."""
    if Path(path).suffix not in SUFFIXES:
        raise ValueError(f"--output {path}: unknown suffix; rows are written as {' or '.join(SUFFIXES)}")
    if any(Path(path).resolve() == Path(source).resolve() for source in sources):
        raise ValueError(f"--output {path}: it is also an input; choose another name")


def write_rows(path: str | Path, rows: Sequence[Row]) -> None:
    """Write rows as the suffix says, in one go: a run that is killed leaves the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    if path.suffix == ".parquet":
        names = list(dict.fromkeys(name for row in rows for name in row))
        try:
            data = import_datasets().Dataset.from_list([{name: row.get(name) for name in names} for row in rows])
        except (TypeError, ValueError) as error:  # pyarrow's are ValueErrors too
            raise ValueError(f"{path}: a column holds values of several types ({error}); write .jsonl") from None
        data.to_parquet(str(part))
    else:
        with open(part, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(part, path)


def import_datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise ValueError("parquet and hub datasets are read by `datasets`: pip install 's1engine[train]'") from None
    datasets.disable_progress_bars()
    return datasets
