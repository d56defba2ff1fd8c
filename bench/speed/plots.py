"""The curves of scaling.py as PNGs: what was measured, and dashed beside it the floor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot is imported: no display is needed

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import StrMethodFormatter

Rows = list[dict[str, Any]]
PLAIN = StrMethodFormatter("{x:,.6g}")
COLOURS = ("#1f6fb2", "#c8552d", "#3a8f4d", "#7b4fa3")


def draw(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write a PNG for each curve that the report has. Returns their paths."""
    written = []
    for sweep, fill in CURVES.items():
        rows = [row for row in report["rows"] if row["sweep"] == sweep]
        if not rows:
            continue
        panels = 2 if sweep == "context" else 1
        figure, axes = pyplot.subplots(1, panels, figsize=(7 if panels == 1 else 11, 4.2))
        fill(axes, rows, report)
        args = report["args"]
        what = [args["model"] or args["shape"], args["dtype"]]
        if sweep != "threads":
            what.append(counted(rows[0]["threads"], "thread"))
        figure.suptitle(f"Decoding, {', '.join(what)}; dashed: the floor", fontsize=10)
        figure.tight_layout()
        path = folder / f"scaling-{sweep}.png"
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
        written.append(path)
    return written


def _batch(axes: Axes, rows: Rows, report: dict[str, Any]) -> None:
    _speed(axes, rows, "batch", COLOURS[0], "measured")
    _label(axes, "rows", "tokens per second", "xy")


def _context(axes: Any, rows: Rows, report: dict[str, Any]) -> None:
    """Left the time of a step, right what it takes longer than at the shortest context, over what it reads more."""
    left, right = axes
    for batch, colour in zip(dict.fromkeys(row["batch"] for row in rows), COLOURS, strict=False):
        its = [row for row in rows if row["batch"] == batch]
        contexts = [row["context"] for row in its]
        left.plot(contexts, [1e3 * row["step_seconds"] for row in its], "o-", color=colour, label=counted(batch, "row"))
        left.plot(contexts, [1e3 * row["floor_seconds"] for row in its], "--", color=colour)
    for row, colour in zip(report["growth"], COLOURS, strict=False):
        points = [point for point in row["points"] if point["extra_seconds"] > 0]
        mebibytes = [point["extra_bytes"] / 2**20 for point in points]
        power = "" if row["exponent"] is None else f": bytes to the power {row['exponent']:.2f}"
        label = counted(row["batch"], "row") + power
        right.plot(mebibytes, [1e3 * point["extra_seconds"] for point in points], "o-", color=colour, label=label)
        right.plot(mebibytes, [1e3 * point["extra_floor_seconds"] for point in points], "--", color=colour)
    _label(left, "tokens of context", "ms per step", "x")
    some = "xy" * any(line.get_xdata().size for line in right.lines)
    _label(right, "keys and values read more than at the shortest context, MiB", "ms longer per step", some)


def _threads(axes: Axes, rows: Rows, report: dict[str, Any]) -> None:
    for batch, colour in zip(dict.fromkeys(row["batch"] for row in rows), COLOURS, strict=False):
        _speed(axes, [row for row in rows if row["batch"] == batch], "threads", colour, counted(batch, "row"))
    _label(axes, "threads", "tokens per second", "y")
    axes.set_xticks(sorted({row["threads"] for row in rows}))


def _blocks(axes: Axes, rows: Rows, report: dict[str, Any]) -> None:
    label = f"{counted(rows[0]['batch'], 'row')} of {rows[0]['context']} tokens"
    _speed(axes, rows, "block_size", COLOURS[0], label)
    _label(axes, "tokens a KV block holds", "tokens per second", "x")


def _speed(axes: Axes, rows: Rows, over: str, colour: str, label: str) -> None:
    rows = sorted(rows, key=lambda row: row[over])
    x = [row[over] for row in rows]
    axes.plot(x, [row["tokens_per_second"] for row in rows], "o-", color=colour, label=label)
    axes.plot(x, [row["batch"] / row["floor_seconds"] for row in rows], "--", color=colour)


def _label(axes: Axes, x: str, y: str, logarithmic: str) -> None:
    """logarithmic: the names of the axes that are."""
    if "x" in logarithmic:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(PLAIN)
    if "y" in logarithmic:
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(PLAIN)
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend()


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


CURVES: dict[str, Callable[[Any, Rows, dict[str, Any]], None]] = {
    "batch": _batch,
    "context": _context,
    "threads": _threads,
    "blocks": _blocks,
}
