"""The quality stage: what the s1 authors' filter drops and keeps, pattern by pattern."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from s1engine.train.curate.quality import FORMAT, format_marks, quality
from s1engine.train.curate.rows import Columns


def authors_keep(question: str, source: str) -> bool:
    """The rule as the authors' notebook has it, loop over p1. to p999. included."""
    if (
        "[asy]" not in question
        and "![Image]" not in question
        and not any(f"p{i}." in question for i in range(1, 1000))
        and not re.search(r"\*\*(?=.*\d)[^\s\]]*\*\*", question)
    ):
        return True
    return "[asy]" in question and "AIME" in source


def run(question: str, source: str = "x") -> bool:
    rows = [{"problem": question, "source": source, "thinking": "t", "attempt": "a"}]
    return bool(quality(rows, Columns.find(rows))[0])


PIECES = [
    "[asy]",
    "![Image]",
    "p1.",
    "p999.",
    "p1000.",
    "p0.",
    "p01.",
    "p12",
    "p",
    ".",
    "**",
    "**1**",
    "**a**",
    " 2",
    "]",
    "\n",
]


@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join), st.sampled_from(["AIME_1983", "gpqa"]))
@example("** 1**", "x")
@example("**a**\n7", "x")
@example("**a** 7", "x")
def test_questions_are_kept_as_by_the_authors(question: str, source: str) -> None:
    assert run(f"q {question}", source) == authors_keep(f"q {question}", source)


def test_every_pattern_is_counted_by_itself() -> None:
    questions = ["[asy] p3. x", "see ![Image]", "p17. Find", "**1.** Find **2.**", "a plain p question", "[asy]"]
    rows = [
        {"problem": q, "source": "aime" if q == "[asy]" else "s", "thinking": "t", "attempt": "a"} for q in questions
    ]
    kept, report = quality(rows, Columns.find(rows))
    assert [row["problem"] for row in kept] == ["a plain p question", "[asy]"]
    assert report.notes["rows with each pattern"] == {"[asy]": 2, "![Image]": 1, "p{i}.": 2, "bold number": 1}
    assert report.notes["[asy] kept, from AIME"] == 1
    assert report.steps[1].removed == {"[asy]": 1, "![Image]": 1, "p{i}.": 1, "bold number": 1}
    assert set(FORMAT) == set(report.notes["rows with each pattern"])
    assert format_marks("[asy] p3. x") == ["[asy]", "p{i}."]


def test_api_errors_and_missing_fields_go_first() -> None:
    good = {"problem": "q", "thinking": "t", "attempt": "a", "extra": [1]}
    rows = [
        good,
        {**good, "error": "429"},
        {**good, "thinking": " \n"},
        {**good, "attempt": None},
        {"thinking": "t", "attempt": "a"},
        {**good, "error": False},
    ]
    kept, report = quality(rows, Columns.find(rows))
    assert kept == [good, {**good, "error": False}]
    assert report.steps[0].removed == {"API error": 1, "no trace": 1, "no attempt": 1, "no question": 1}
    assert report.steps[1].removed == {}
    assert [row["reason"] for row in report.dropped] == ["API error", "no trace", "no attempt", "no question"]
    assert (report.rows_in, report.rows_out) == (6, 2)


def test_required_columns_have_to_be_there() -> None:
    rows = [{"problem": "q"}]
    assert quality(rows, Columns.find(rows), ["question"])[0] == rows
    with pytest.raises(ValueError, match="no column for the trace"):
        quality(rows, Columns.find(rows))
    with pytest.raises(ValueError, match="--require trce: must be one of question, answer"):
        quality(rows, Columns.find(rows), ["trce"])
