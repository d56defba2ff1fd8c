"""Quality: rows that an API failed on or that lack a field go, then questions with the marks of bad formatting.

The patterns are those of the s1 authors' notebook (simplescaling/s1, data/filter.ipynb), on the question alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from s1engine.train.curate.report import Report
from s1engine.train.curate.rows import ROLES, Columns, Row, text

REQUIRED = ("question", "trace", "attempt")
"""What fine-tuning needs of a row."""
ASY = "[asy]"
FORMAT: dict[str, re.Pattern[str]] = {
    ASY: re.compile(r"\[asy\]"),  # a figure's code
    "![Image]": re.compile(r"!\[Image\]"),  # a figure that is elsewhere
    "p{i}.": re.compile(r"p[1-9][0-9]{0,2}\."),  # the numbers of a problem sheet, p1. to p999.
    "bold number": re.compile(r"\*\*(?=.*\d)[^\s\]]*\*\*"),  # numbered headings
}


def format_marks(question: str) -> list[str]:
    """Which of the patterns are in a question."""
    return [name for name, pattern in FORMAT.items() if pattern.search(question)]


def quality(rows: Sequence[Row], columns: Columns, required: Sequence[str] = REQUIRED) -> tuple[list[Row], Report]:
    """The rows without API errors, missing fields and bad formatting.

    required: the roles whose text may be neither missing nor blank. A question of AIME with `[asy]` stays whatever else
    is in it: its figure is part of the question, and figure code looks like the other patterns.
    Raises ValueError for a role that is unknown or whose column is in no row.
    """
    for role in required:
        if role not in ROLES:
            raise ValueError(f"--require {role}: must be one of {', '.join(ROLES)}")
    columns.require(rows, *required)
    report = Report("quality", len(rows))
    complete = []
    for row in rows:
        reason = "API error" if row.get(columns.error) else None
        for role in required if reason is None else ():
            if not text(row, getattr(columns, role)).strip():
                reason = f"no {role}"
                break
        if reason is None:
            complete.append(row)
        else:
            report.drop(row, columns, reason)
    report.step("missing", len(complete))

    kept, matched, spared = [], Counter[str](), 0
    for row in complete:
        marks = format_marks(text(row, columns.question))
        matched.update(marks)
        if ASY in marks and "aime" in text(row, columns.source).lower():
            spared += 1
        elif marks:
            report.drop(row, columns, marks[0], marks=marks)
            continue
        kept.append(row)
    report.step("format", len(kept))
    report.notes["rows with each pattern"] = {name: matched[name] for name in FORMAT}
    report.notes["[asy] kept, from AIME"] = spared
    return kept, report
