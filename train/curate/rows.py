"""Rows into and out of a stage: JSON lines and parquet by suffix, hub datasets by id, and which column holds what.

A row is a plain dict; columns that a stage does not know are carried along untouched.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s1engine.train import rows as train_rows

Row = dict[str, Any]

SUFFIXES = (".jsonl", ".parquet")

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
    Raises ValueError as train.rows does, with file and line for a bad row.
    """
    if not sources:
        raise ValueError("--input: name at least one .jsonl or .parquet file, or a hub id")
    names = (question,) if question else ROLES["question"]
    found: list[Row] = []
    for source in sources:
        name, _, split = (source, "", "") if Path(source).suffix in SUFFIXES else source.partition(":")
        for row in train_rows.read_rows(name, split or None)[0]:
            for column in names:
                if not isinstance(row.cells.get(column), str | None):
                    raise row.error(column, f"{str(row.cells[column])[:80]!r}: a question has to be text")
            found.append(dict(row.cells))
    return found


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
        pyarrow, parquet = train_rows.needed("pyarrow", path), train_rows.needed("pyarrow.parquet", path)
        names = list(dict.fromkeys(name for row in rows for name in row))
        try:
            table = pyarrow.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
        except (TypeError, ValueError) as error:  # pyarrow's are both
            raise ValueError(f"{path}: a column holds values of several types ({error}); write .jsonl") from None
        parquet.write_table(table, part)
    else:
        with open(part, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(part, path)
