"""What a stage did: rows in, rows left after each step, how many went for which reason; and the funnel of all stages.

Nothing in a report depends on when or where it was made: the same rows and options give the same bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s1engine.train.curate.rows import Columns, Row, question_key, text, write_rows

S1_COUNTS: dict[str, tuple[str, str]] = {
    "input": ("59,029", "59,029"),
    "missing": ("54,116", "54,116"),
    "format": ("51,581", "51,607"),
    "contamination": ("before the input", "before the input"),
    "difficulty": ("24,496", "24,517"),
    "kept first": ("384", "393"),
    "selected": ("1,000", "1,000"),
}
"""Rows that the s1 authors had left after each step: in their paper, and in the output of their notebook."""


@dataclass(frozen=True)
class Step:
    """`rows` left after a step, and how many it removed for each reason (a row counts under its first)."""

    name: str
    rows: int
    removed: dict[str, int]


@dataclass
class Report:
    """One stage. notes: further counts by name. dropped: the rows that went, each with its reason and detail."""

    stage: str
    rows_in: int
    steps: list[Step] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    dropped: list[Row] = field(default_factory=list)

    def drop(self, row: Row, columns: Columns, reason: str, **detail: Any) -> None:
        question = text(row, columns.question)
        shown = {"id": row["id"]} if "id" in row else {}
        self.dropped.append(
            {**shown, "question": question[:200], "key": question_key(question), "reason": reason, **detail}
        )

    def step(self, name: str, rows: int) -> None:
        """Close a step: what was dropped since the last one is its own."""
        before = sum(sum(step.removed.values()) for step in self.steps)
        reasons = Counter(row["reason"] for row in self.dropped[before:])
        self.steps.append(Step(name, rows, dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0])))))

    @property
    def rows_out(self) -> int:
        return self.steps[-1].rows if self.steps else self.rows_in

    def as_dict(self) -> dict[str, Any]:
        steps = [{"step": s.name, "rows": s.rows, "removed": s.removed} for s in self.steps]
        return {"stage": self.stage, "rows_in": self.rows_in, "rows_out": self.rows_out, "steps": steps} | (
            {"notes": self.notes} if self.notes else {}
        )

    def write(self, output: str | Path) -> None:
        """Beside a stage's output: NAME.report.json, and NAME.removed.jsonl with every row that went and why."""
        output = Path(output)
        write_rows(output.with_suffix(".removed.jsonl"), self.dropped)
        output.with_suffix(".report.json").write_text(
            json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def funnel(reports: Sequence[Report]) -> str:
    """All stages as a Markdown table, the s1 authors' counts beside ours; then each stage's notes."""
    lines = ["| step | rows | removed | s1 paper | s1 notebook |", "|---|---:|---|---:|---:|"]
    lines.append(_line("input", reports[0].rows_in, {}))
    lines += [_line(step.name, step.rows, step.removed) for report in reports for step in report.steps]
    for report in reports:
        if report.notes:
            lines += ["", *(f"{report.stage}, {name}: {_shown(value)}" for name, value in report.notes.items())]
    return "\n".join(lines) + "\n"


def _line(name: str, rows: int, removed: dict[str, int]) -> str:
    paper, notebook = S1_COUNTS.get(name, ("", ""))
    why = ", ".join(f"{reason} {count:,}" for reason, count in removed.items())
    return f"| {name} | {rows:,} | {why} | {paper} | {notebook} |"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(count)}" for name, count in value.items()) or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)
