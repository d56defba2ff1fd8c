"""The tables of a report, as HTML: the numbers of its figures, and what the figures leave out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from s1engine.bench.reasoning import figures
from s1engine.bench.reasoning.panels import look
from s1engine.bench.reasoning.transcript import definitions, escape

Row = dict[str, Any]
NONE = "\N{EN DASH}"
MEASURES = {
    "Control": "share of the settings whose mean compute keeps to its bound; 100 % is best (s1, section 3.2)",
    "Scaling, per doubling": "mean slope between all pairs of settings, in points of accuracy per doubling of the "
    "tokens that the strategy scales: the numbers s1 reports",
    "Scaling, per 1,000 tokens": "the same over the tokens as they are: s1's formula as printed",
    "Performance": "the best accuracy of any setting",
}
DEVIATION = {  # a field of a length error, and the head of its column
    "absolute": "mean |error|, %",
    "rmse": "RMS error, %",
    "soft": "off by > 500, %",
    "soft_above": "above by > 500, %",
    "hard": "above, %",
}


def settings(rows: list[Row]) -> str:
    """Accuracy and thinking tokens of each setting, with intervals, and its difference to another."""
    heads = ["model", "setting", "accuracy, %", "95 %", "thinking tokens", "95 %", "difference, points", "95 %", "to"]
    heads += ["problems", "samples"]
    body = []
    for row in rows:
        cells = [*_name(row), *_accuracy(row)]
        cells += [tokens(row["thinking_tokens"]), f"{tokens(row['thinking_low'])} to {tokens(row['thinking_high'])}"]
        other = row["difference"]
        if other is None:
            cells += [NONE] * 3
        else:
            cells += [signed(other["accuracy"]), f"{signed(other['low'])} to {signed(other['high'])}"]
            cells.append(figures.setting(other["to"]))
        body.append([*cells, f"{row['problems']:,}", f"{row['samples']:,}"])
    left_out = sorted({row.get("bad_gold", 0) for row in rows} - {0})
    note = f"Left out of accuracy, as the gold answer cannot be read: {left_out[-1]} problems." if left_out else ""
    return table(heads, body, note)


def lengths(rows: list[Row]) -> str:
    """Mean tokens of a completion by part, and how completions ended."""
    heads = ["model", "setting", "thinking tokens", "answer tokens", "output tokens", "thinking in output, %"]
    heads += ["generated in all", "ended by budget, %", "no answer, %", "cut at the limit, %"]
    body = []
    for row in rows:
        share = row["thinking_tokens"] / row["output_tokens"] if row["output_tokens"] else None
        cells = [*_name(row), *(tokens(row[f"{part}_tokens"]) for part in ("thinking", "answer", "output"))]
        cells += [percent(share), tokens(row["cost_tokens"])]
        body.append(cells + [percent(row[name]) for name in ("ended_by_budget", "no_answer", "cut")])
    return table(heads, body, "Means of a completion. Output is thinking, answer and delimiters.")


def parallel(rows: list[Row]) -> str:
    """Accuracy over generated tokens; of votes also the chance that one of k samples is right."""
    heads = ["model", "setting", "tokens generated", "accuracy, %", "95 %", "any of k right, %"]
    body = [[*_name(row), tokens(row["cost_tokens"]), *_accuracy(row), NONE] for row in figures.compared(rows)]
    for row in figures.voted(rows):
        for k in figures.vote_sizes(row):
            cells = [row["model"], f"{look('vote').name}, k={k}", tokens(int(k) * row["output_tokens"])]
            body.append([*cells, *_accuracy(row["majority_at"][k]), percent(row["pass_at"].get(k))])
    return table(heads, body, "Tokens of k samples: k times the mean output without a budget.")


def requests(rows: list[Row]) -> str:
    """Tokens produced against tokens asked for.

    Args:
        rows: of `figures.asking`.
    """
    fields = [name for name in DEVIATION if any(name in (row.get("deviation") or {}) for row in rows)]
    heads = ["model", "setting", "of", "asked for", "produced (mean)", "error of the mean, %", "accuracy, %", "95 %"]
    body = []
    for row in rows:
        counted = "output" if figures.ASKED[row["strategy"]] == "output_tokens" else "thinking"
        cells = [*_name(row), counted, tokens(row["value"]), tokens(figures.produced(row))]
        cells += [signed(figures.relative_error(row)), *_accuracy(row)]
        body.append(cells + [percent((row.get("deviation") or {}).get(name)) for name in fields])
    note = "The last columns are over single completions." if fields else ""
    return table(heads + [DEVIATION[name] for name in fields], body, note, text_columns=3)


def matched(rows: list[Row]) -> str:
    """Settings that ask for a length against caps of the same length."""
    heads = ["model", "setting", "same", "caps", "their tokens", "their accuracy, %", "difference, points", "95 %"]
    body = []
    for row in figures.in_order(rows):
        caps = " and ".join("none" if cap is None else f"{cap:,}" for cap in row["caps"])
        cells = [*_name(row), row["by"], caps, tokens(row["output_tokens"]), percent(row["cap_accuracy"])]
        body.append([*cells, signed(row["accuracy"]), f"{signed(row['low'])} to {signed(row['high'])}"])
    note = (
        f"Caps are of {rows[0]['to']}. Same budget: under the cap 99 of 100 outputs are no longer than what was "
        "asked for. Same mean: two caps mixed so that outputs are as long on average, longer ones for longer problems."
    )
    return table(heads, body, note, text_columns=4)


def summaries(rows: list[Row]) -> str:
    """s1's measures of each strategy; of L1's prompts the range of lengths that they reach."""
    spread = any("deviation" in row for row in rows)
    heads = ["model", "strategy", "settings", "Control, %", "Scaling, points per doubling"]
    heads += ["Scaling, points per 1,000 tokens", "Performance, %", *["longest over shortest mean"] * spread]
    body = []
    for row in figures.in_order({"value": None, **row} for row in rows):
        cells = [row["model"], look(row["strategy"]).name, f"{row['runs']}"]
        cells += [number(row[name]) for name in ("control", "scaling_log2", "scaling_linear")]
        cells.append(percent(row["performance"]))
        body.append(cells + [number(row.get("deviation", {}).get("spread"), 2)] * spread)
    return table(heads, body) + definitions(MEASURES)


def keywords(rows: list[Row]) -> str:
    """Frequencies of each group, and the words found most."""
    rows = figures.in_order(rows)
    groups = list(dict.fromkeys(row["group"] for row in rows))
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["model"], figures.setting(row)), {})[row["group"]] = row
    body = []
    for name, its in found.items():
        words = sum((Counter(row["words"]) for row in its.values()), Counter[str]())
        most = sorted(words.items(), key=lambda item: (-item[1], item[0]))[:5]
        rates = [number(its[group]["per_1000_tokens"] if group in its else None, 2) for group in groups]
        body.append([*name, ", ".join(f"{word} {count:,}" for word, count in most if count) or NONE, *rates])
    heads = ["model", "setting", "most frequent", *(f"{group} per 1,000 tokens" for group in groups)]
    return table(heads, body, text_columns=3)


def table(heads: Sequence[str], body: Sequence[Sequence[str]], note: str = "", text_columns: int = 2) -> str:
    """Cells are text, not HTML. The first `text_columns` are words, the others numbers."""

    def row(cells: Sequence[str], tag: str) -> str:
        kinds = [' class="t"' if at < text_columns else "" for at in range(len(cells))]
        return "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for cell, kind in zip(cells, kinds, strict=True))

    lines = "".join(f"<tr>{row(cells, 'td')}</tr>\n" for cells in body)
    caption = f"<caption>{escape(note)}</caption>\n" if note else ""
    head = f"<thead><tr>{row(heads, 'th')}</tr></thead>\n"
    return f'<div class="scroll"><table>{caption}{head}<tbody>\n{lines}</tbody></table></div>\n'


def tokens(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{1 if value < 1000 else 0}f}"


def number(value: float | None, digits: int = 1) -> str:
    return NONE if value is None else _minus(f"{value:,.{digits}f}")


def percent(share: float | None) -> str:
    return number(None if share is None else 100 * share)


def signed(share: float) -> str:
    return _minus(f"{100 * share:+,.1f}")


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


def _accuracy(row: Row) -> list[str]:
    if row["accuracy"] is None:
        return [NONE, NONE]
    return [percent(row["accuracy"]), f"{percent(row['low'])} to {percent(row['high'])}"]


def _name(row: Row) -> list[str]:
    return [row["model"], figures.setting(row)]
