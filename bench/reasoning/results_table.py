"""Results as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]


def table(rows: Iterable[Row]) -> str:
    """Results as text for a terminal: by model and task the settings, the summaries, and keywords if there are any."""
    rows = list(rows)
    parts = []
    for model, task in dict.fromkeys((row["model"], row["task"]) for row in rows):
        of_task = [row for row in rows if (row["model"], row["task"]) == (model, task)]
        parts.append(f"{model}, {task}")
        for kind, (header, cells) in TABLES.items():
            lines = [cells(row) for row in of_task if row["kind"] == kind]
            counted = kind != "keywords" or any(row["per_1000_tokens"] for row in of_task if row["kind"] == kind)
            if lines and counted:
                parts.append(_aligned([header, *lines]))
    return "\n\n".join(parts)


def _name(row: Row) -> list[str]:
    return [row["strategy"], "" if row["value"] is None else str(row["value"])]


def _setting_cells(row: Row) -> list[str]:
    gain = row["difference"]
    return [
        *_name(row),
        _percent(row["accuracy"]),
        f"{_percent(row['low'])} - {_percent(row['high'])}",
        _difference(gain) if gain else "",
        *(f"{row[name]:.1f}" for name in ("thinking_tokens", "answer_tokens", "cost_tokens")),
        *(_percent(row[name]) for name in ("ended_by_budget", "no_answer", "cut")),
    ]


def _summary_cells(row: Row) -> list[str]:
    error = row.get("deviation")
    return [
        row["strategy"],
        str(row["runs"]),
        _number(row["control"], ".0f"),
        _number(row["scaling_log2"], "+.1f"),
        _number(row["scaling_linear"], "+.1f"),
        _percent(row["performance"]),
        f"{100 * error['signed']:+.1f} %" if error else "",
        _number(error["spread"], ".2f") if error else "",
    ]


def _matched_cells(row: Row) -> list[str]:
    return [
        *_name(row),
        row["by"],
        " and ".join("none" if cap is None else str(cap) for cap in row["caps"]),
        f"{row['output_tokens']:.1f}",
        _percent(row["cap_accuracy"]),
        _difference(row),
    ]


def _difference(row: Row) -> str:
    return f"{100 * row['accuracy']:+.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"


def _keyword_cells(row: Row) -> list[str]:
    most = sorted(row["words"].items(), key=lambda item: -item[1])[:5]
    return [
        *_name(row),
        row["group"],
        f"{row['per_1000_tokens']:.2f}",
        ", ".join(f"{word} {count}" for word, count in most),
    ]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns of one width, words to the left and numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numeric = [any(cell[-1:].isdigit() or cell.endswith("%") for cell in column) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    )


TABLES = {
    "setting": (
        (
            *("strategy", "value", "accuracy", "95 % interval", "difference", "thinking", "answer", "cost"),
            *("by budget", "no answer", "cut"),
        ),
        _setting_cells,
    ),
    "summary": (
        (
            *("strategy", "runs", "control", "points per doubling", "per 1000 tokens", "performance"),
            *("length error", "spread"),
        ),
        _summary_cells,
    ),
    "matched": (("strategy", "value", "same", "cap", "its tokens", "its accuracy", "difference"), _matched_cells),
    "keywords": (("strategy", "value", "group", "per 1000 tokens", "most frequent"), _keyword_cells),
}
