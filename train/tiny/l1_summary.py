"""What came out of runs of `train.tiny.l1`: lengths, accuracy and violations by what was asked for, as Markdown.

Of several runs (seeds) a number is their mean, with the smallest and the largest in brackets.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

EXAMPLE = "example: python -m s1engine.train.tiny.l1_summary build/tiny-l1/seed-*"
MODES = {"exact": "l1-exact", "max": "l1-max"}
"""A model, and the prompts that it is judged by."""
TEST = Path(__file__).parent / "test.jsonl"

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def table(runs: Sequence[list[Row]], model: str, strategy: str) -> list[str]:
    """Of each length that was asked for."""
    heads = ("asked for", "mean length", "off by, %", "above, %", "right, %", "less caps, same budget", "same mean")
    lines = [f"| {' | '.join(heads)} |", "|" + "---:|" * len(heads)]
    settings = [of(run, "setting", model, strategy) for run in runs]
    compared = [{by: of(run, "matched", model, strategy, by=by) for by in ("budget", "mean")} for run in runs]
    for asked in settings[0]:
        cells = [spread([its[asked]["output_tokens"] for its in settings])]
        cells += [spread([100 * its[asked]["deviation"][name] for its in settings]) for name in ("absolute", "hard")]
        cells.append(spread([100 * its[asked]["accuracy"] for its in settings]))
        for by in ("budget", "mean"):
            found = [its[by][asked] for its in compared if asked in its[by]]
            gains = [100 * row["accuracy"] for row in found]
            low = 100 * min((row["low"] for row in found), default=0.0)
            cells.append(f"{spread(gains, '+.1f')}, low {low:+.1f}" if found else "")
        lines.append(f"| {asked} | {' | '.join(cells)} |")
    return lines


def of(run: Iterable[Row], kind: str, model: str, strategy: str, **wanted: str) -> dict[int, Row]:
    """Rows by the length that was asked for."""
    wanted = {"kind": kind, "model": model, "strategy": strategy, **wanted}
    return {row["value"]: row for row in run if all(row[name] == value for name, value in wanted.items())}


def spread(values: Sequence[float], form: str = ".1f") -> str:
    if len(values) == 1:
        return format(values[0], form)
    return f"{fmean(values):{form}} [{min(values):{form}}, {max(values):{form}}]"


def verdicts(run: list[Row], samples: list[Row], difficulty: dict[str, int]) -> dict[str, float]:
    """The numbers by which a run is judged, in percent; of lengths within a difficulty the share of steps upwards."""
    exact = of(run, "setting", "exact", "l1-exact")
    limits = of(run, "setting", "max", "l1-max")
    matched = of(run, "matched", "exact", "l1-exact", by="budget")
    off = [100 * row["deviation"]["absolute"] for row in exact.values()]
    above = [100 * row["deviation"]["hard"] for row in limits.values()]
    lengths: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        if (sample["model"], sample["strategy"]) == ("max", "l1-max"):
            lengths[difficulty[sample["problem"]]][sample["value"]].append(sample["output_tokens"])
    means = [[fmean(its[limit]) for limit in sorted(its)] for its in lengths.values()]
    rises = [b > a for its in means for a, b in pairwise(its)]
    return {
        "Exact: mean |n - target| / target, over targets": fmean(off),
        "Exact: the same, worst target": max(off),
        "Exact: lowest end of the difference to caps of the same budget": min(100 * r["low"] for r in matched.values()),
        "Max: responses above the limit, over limits": fmean(above),
        "Max: the same, worst limit": max(above),
        "Max: within a difficulty, a higher limit gives a longer mean, of all pairs of neighbours": 100 * fmean(rises),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m s1engine.train.tiny.l1_summary",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders, of one seed each")
    args = parser.parse_args(argv)
    runs = [read(folder / "eval" / "results.jsonl") for folder in args.runs]
    difficulty = {row["id"]: row["problem"].count(":") for row in read(TEST)}
    for model, strategy in MODES.items():
        print(f"L1-{model.title()}:\n", *table(runs, model, strategy), "", sep="\n")
    found = [
        verdicts(run, read(folder / "eval" / "samples.jsonl"), difficulty)
        for run, folder in zip(runs, args.runs, strict=True)
    ]
    for name in found[0]:
        print(f"- {name}: {', '.join(f'{its[name]:.1f}' for its in found)} %")


if __name__ == "__main__":
    main()
