"""Domain labels: one subject of the Mathematics Subject Classification for each question, chosen by a model.

The model is told the subjects and to end on a two-digit code, as the s1 authors told theirs. A reply without one is
asked for once more, at a higher temperature; after that the question is UNLABELLED, and counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from s1engine.train.curate.msc import MSC
from s1engine.train.curate.replies import Asking, Conversation, ask
from s1engine.train.curate.report import Report
from s1engine.train.curate.rows import Columns, Row, text

UNLABELLED = "unlabelled"
RETRY_TEMPERATURE = 0.7
INSTRUCTION = (
    "You sort questions by subject. From the list of subjects, choose the one that a question belongs to most. Give a "
    "short reason, then, on a last line of its own, nothing but the two-digit code of the subject."
)


def label_prompt(question: str) -> Conversation:
    subjects = "\n".join(f"{code}: {name}" for code, name in MSC.items())
    return [
        {"role": "system", "content": INSTRUCTION},
        {"role": "user", "content": f"Question:\n{question}\n\nSubjects:\n{subjects}"},
    ]


def domain_of(reply: str) -> str | None:
    """The code that a reply ends with: two digits that are a subject's and no part of a longer number; else None.

    White space, Markdown and a full stop may follow it.
    """
    match = re.search(r"(?<![\d.,])(\d\d)[\s.*`_]*$", reply)
    return match[1] if match is not None and match[1] in MSC else None


def label(rows: Sequence[Row], columns: Columns, asking: Asking | None) -> tuple[list[Row], Report]:
    """All rows, each with its domain: what its domain column already said, else a code of MSC or UNLABELLED.

    asking: None where no model is to be asked; rows that have no domain are UNLABELLED then.
    """
    columns.require(rows, "question")
    if asking is None:
        columns.require(rows, "domain")
    report = Report("label", len(rows))
    said = (text(row, columns.domain).strip() for row in rows)
    domains: list[str | None] = [None if domain in ("", UNLABELLED) else domain for domain in said]
    given, retried = sum(domain is not None for domain in domains), 0
    if asking is not None:
        _ask_for(rows, columns, domains, asking, "label")
        retried = domains.count(None)
        warmer = max(asking.temperature, RETRY_TEMPERATURE)
        again = replace(asking, temperature=warmer, settings={**asking.settings, "try": 2})
        _ask_for(rows, columns, domains, again, "label again")
    labelled = [{**row, columns.domain: domain or UNLABELLED} for row, domain in zip(rows, domains, strict=True)]
    report.step("label", len(labelled))
    counts = Counter(row[columns.domain] for row in labelled)
    report.notes = {
        "already labelled": given,
        "asked again": retried,
        "unlabelled": counts[UNLABELLED],
        "domains": len(counts) - (UNLABELLED in counts),
        "rows by domain": {
            f"{domain} {MSC[domain]}" if domain in MSC else domain: count
            for domain, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        },
    }
    return labelled, report


def _ask_for(rows: Sequence[Row], columns: Columns, domains: list[str | None], asking: Asking, describe: str) -> None:
    """Fill in the domains that are None, where the reply is one."""
    todo = [i for i, domain in enumerate(domains) if domain is None]
    said = ask([label_prompt(text(rows[i], columns.question)) for i in todo], asking, describe)
    for i, reply in zip(todo, said, strict=True):
        domains[i] = domain_of(reply.text)
