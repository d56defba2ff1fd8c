"""Difficulty: questions that a model already solves go, and the length of the traces says how hard the others are.

Models answer through this engine (at temperature 0.05, as the s1 authors' did) and are graded by rule, where the
authors asked Claude 3.5. A later model is only asked what the earlier ones did not solve: the same rows stay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tqdm import tqdm

from s1engine.train.curate.replies import TOO_LONG, Asking, Conversation, Model, Replies, ask
from s1engine.train.curate.report import Report
from s1engine.train.curate.rows import Columns, Row, text

SUFFIX = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
"""What Qwen asks of its models in mathematics; a rule finds the answer in a box."""

GRADED = 512
"""Answers that are graded at a time, for the progress bar."""


@dataclass(frozen=True)
class Solving:
    """How questions are put and answers read.

    suffix follows every question. kind: how answers are read, "math", "integer" or "choice"; rows with `choices` are
    "choice". drop_unreadable: rows whose answer cannot be read go.
    """

    suffix: str = SUFFIX
    temperature: float = 0.05
    kind: str = "math"
    drop_unreadable: bool = False


def trace_lengths(rows: Sequence[Row], columns: Columns, tokenizer: Any) -> list[Row]:
    """The rows with their trace's length in tokens; null where there is no trace.

    tokenizer: a Hugging Face tokenizer. No special tokens are added.
    """
    columns.require(rows, "trace")
    measured = []
    for row in tqdm(rows, desc="trace lengths", unit="row", leave=False):
        trace = text(row, columns.trace)
        tokens = len(tokenizer(trace, add_special_tokens=False)["input_ids"]) if trace else None
        measured.append({**row, columns.length: tokens})
    return measured


def grade_attempts(rows: Sequence[Row], columns: Columns, grader: Any, kind: str = "math") -> list[Row]:
    """The rows with `correct`: whether the attempt beside the trace is right; null where nothing can be graded."""
    columns.require(rows, "attempt", "answer")
    attempted = [row for row in rows if text(row, columns.attempt).strip()]
    grades = _grades(grader, [text(row, columns.attempt) for row in attempted], attempted, columns, kind)
    verdicts = {id(row): grade.correct for row, grade in zip(attempted, grades, strict=True)}
    return [{**row, columns.correct: verdicts.get(id(row))} for row in rows]


def question_prompt(row: Row, columns: Columns, suffix: str) -> str:
    """A question as it is put: its choices, if it has any, lettered below it, then the suffix."""
    lines = [text(row, columns.question)]
    lines += [f"{letter}) {choice}" for letter, choice in zip("ABCDEFGHIJ", row.get("choices") or (), strict=False)]
    return "\n".join(lines) + suffix


def difficulty(
    rows: Sequence[Row],
    columns: Columns,
    models: Sequence[str],
    load: Callable[[str], Model],
    replies: Replies,
    grader: Any,
    settings: dict[str, Any],
    solving: Solving | None = None,
) -> tuple[list[Row], Report]:
    """The rows that none of `models` solves.

    load: makes a model by name, and is not called for one whose replies are all known. settings: all that can change a
    reply beside what `solving` holds. grader: a bench.reasoning.grading.Grader.
    Rows without a readable answer cannot be solved: they stay, or go with `drop_unreadable`, and are counted.
    """
    solving = solving or Solving()
    columns.require(rows, "question", "answer")
    report = Report("difficulty", len(rows))
    left = [i for i, row in enumerate(rows) if text(row, columns.answer).strip()]
    unreadable = {i for i, row in enumerate(rows) if not text(row, columns.answer).strip()}
    solved: dict[int, str] = {}
    for model in models:
        conversations: list[Conversation] = [
            [{"role": "user", "content": question_prompt(rows[i], columns, solving.suffix)}] for i in left
        ]
        asking = Asking(partial(load, model), replies, model, settings, solving.temperature)
        said = ask(conversations, asking, f"solve with {model}")
        grades = _grades(grader, [reply.text for reply in said], [rows[i] for i in left], columns, solving.kind)
        unreadable |= {i for i, grade in zip(left, grades, strict=True) if grade.correct is None}
        right = {i for i, grade in zip(left, grades, strict=True) if grade.correct}
        solved |= dict.fromkeys(right, model)
        report.notes[model] = {
            "asked": len(left),
            "solved": len(right),
            "cut off": sum(reply.finish_reason == "length" for reply in said),
            "too long for its context": sum(reply.finish_reason == TOO_LONG for reply in said),
            "tokens": sum(reply.tokens for reply in said),
            "verdicts": dict(sorted(Counter(grade.reason for grade in grades).items())),
        }
        left = [i for i in left if i not in right and i not in unreadable]

    kept = []
    for i, row in enumerate(rows):
        if i in solved:
            report.drop(row, columns, "solved", model=solved[i])
        elif i in unreadable and solving.drop_unreadable:
            report.drop(row, columns, "no readable answer")
        else:
            kept.append(row)
    report.step("difficulty", len(kept))
    report.notes["rows without a readable answer"] = len(unreadable)
    return kept, report


def _grades(grader: Any, responses: Sequence[str], rows: Sequence[Row], columns: Columns, kind: str) -> list[Any]:
    grades: list[Any] = []
    for start in tqdm(range(0, len(rows), GRADED), desc="grade", unit_scale=GRADED, unit="answer", leave=False):
        part = rows[start : start + GRADED]
        grades += grader.grade(
            responses[start : start + GRADED],
            [text(row, columns.answer) or None for row in part],
            ["choice" if row.get("choices") else kind for row in part],
            choices=[row.get("choices") for row in part],
        )
    return grades
