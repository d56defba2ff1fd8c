"""How decoding scales: over batch, context, threads and the size of KV blocks; every point beside the machine's floor.

    batch    tokens per second of 1 to 256 rows with short prompts
    context  time of a step of 1 and of 8 rows, over 128 to 16,384 tokens of context each; what it takes longer than at
             the shortest context is set against the keys and values that it reads more
    threads  1 and 2, each in a process of its own, at three batches
    blocks   tokens a KV block holds, 8 to 128, at 8 rows of 1,024 tokens

All points take turns, a turn begins with a measurement of the machine's rates, and a point's share of the floor is
taken turn by turn. Prompts are computed once, before the first turn: at the 0.5B shape that alone takes minutes.
Writes scaling-cpu.json and a PNG a curve.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from s1engine.bench.speed import machine, plots
from s1engine.bench.speed.arguments import add_model_arguments, check_counts, model_folder
from s1engine.bench.speed.floor import Rates, Sizes, model_sizes
from s1engine.bench.speed.ours import BLOCK_SIZE
from s1engine.bench.speed.scaling_points import Engines, Point, Worker

EXAMPLE = "example: python -m s1engine.bench.speed.scaling --shape qwen2.5-0.5b --only batch threads"
FILE = "scaling-cpu.json"
SWEEPS = ("batch", "context", "threads", "blocks")
# What each sweep goes through, and with --quick.
FULL: dict[str, list[int]] = {
    "batch": [1, 2, 4, 8, 16, 32, 64, 128, 256],
    "context": [128, 256, 512, 1024, 2048, 4096, 8192, 16384],
    "threads": [1, 2],
    "blocks": [8, 16, 32, 64, 128],
}
QUICK: dict[str, list[int]] = {"batch": [1, 2], "context": [16, 64, 128], "threads": [1], "blocks": [8, 16]}
SHORT_PROMPT = 32
CONTEXT_BATCHES = (1, 8)
THREAD_BATCHES = (1, 8, 32)
BLOCKS_BATCH, BLOCKS_CONTEXT = 8, 1024
# Growth is fitted where this part of the most bytes is read at least: below it drowns in the noise of a whole step.
FITTED_PART = 1 / 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = __doc__, EXAMPLE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_model_arguments(parser)
    parser.add_argument("--only", choices=SWEEPS, nargs="+", default=list(SWEEPS), help="these curves alone")
    for sweep in SWEEPS:
        parser.add_argument(f"--{sweep}", type=int, nargs="+", help=f"instead of {' '.join(map(str, FULL[sweep]))}")
    parser.add_argument("--steps", type=int, help="decode steps timed at each point in each turn; default: 16")
    parser.add_argument("--repeats", type=int, help="turns of each point; default: 5")
    parser.add_argument("--quick", action="store_true", help="by default few small points and one turn, to see it work")
    parser.add_argument("--output", type=Path, default=Path("bench/results"), help="folder for JSON and plots")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"scaling: error: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table, write file and plots. Returns the report; raises ValueError for what cannot be."""
    points = plan(args)
    args.output.mkdir(parents=True, exist_ok=True)

    def keep(report: dict[str, Any]) -> None:
        (args.output / FILE).write_text(json.dumps(report, indent=1, default=str) + "\n")

    with model_folder(args) as model:
        report = measure(args, model, points, keep)
    print(table(report))
    written = [args.output / FILE, *plots.draw(report, args.output)]
    print("written: " + ", ".join(map(str, written)))
    return report


def plan(args: argparse.Namespace) -> list[Point]:
    """The points that `args` ask for. Raises ValueError for numbers that cannot be."""
    defaults = QUICK if args.quick else FULL
    for sweep in SWEEPS:
        given = getattr(args, sweep)
        if given is not None and sweep not in args.only:
            raise ValueError(f"--{sweep}: --only leaves that curve out")
        setattr(args, sweep, defaults[sweep] if given is None else given)
    args.steps = (2 if args.quick else 16) if args.steps is None else args.steps
    args.repeats = (1 if args.quick else 5) if args.repeats is None else args.repeats
    check_counts(args, *SWEEPS, "steps", "repeats")
    own = torch.get_num_threads()

    def point(sweep: str, batch: int, context: int, threads: int = own, block_size: int = BLOCK_SIZE) -> Point:
        return Point(
            sweep=sweep, batch=batch, context=context, threads=threads, block_size=block_size, steps=args.steps
        )

    blocks_context = max(args.context) if args.quick else BLOCKS_CONTEXT
    made = {
        "batch": [point("batch", batch, SHORT_PROMPT) for batch in args.batch],
        "context": [point("context", batch, context) for batch in CONTEXT_BATCHES for context in sorted(args.context)],
        "threads": [point("threads", b, SHORT_PROMPT, threads=n) for b in THREAD_BATCHES for n in args.threads],
        "blocks": [point("blocks", BLOCKS_BATCH, blocks_context, block_size=size) for size in args.blocks],
    }
    return [point for sweep in SWEEPS if sweep in args.only for point in made[sweep]]


def measure(
    args: argparse.Namespace, model: str, points: list[Point], keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """keep: called with the report after every turn. Raises ValueError for a context that the model does not have."""
    sizes, item_bytes = model_sizes(model), getattr(torch, args.dtype).itemsize
    _check_context(model, points)
    seconds: dict[Point, list[float]] = {point: [] for point in points}
    report: dict[str, Any] = {}
    with ExitStack() as stack, tqdm(total=(args.repeats + 1) * len(points), unit="point", file=sys.stderr) as bar:

        def progress(turn: int, point: Point) -> None:
            bar.set_description(f"turn {turn}/{args.repeats}: {point.sweep}, {point.batch} x {point.context}")

        bar.set_description("loading")
        places = _places(args, model, points, stack)
        rates: dict[Engines | Worker, list[Rates]] = {place: [] for place in places.values()}
        # The longest first: it leaves the prompts of the others in the prefix cache.
        for point in sorted(points, key=lambda point: -point.context):
            progress(0, point)
            places[point].warm_up(point)
            bar.update()
        for turn in range(1, args.repeats + 1):
            for place, its in rates.items():
                its.append(place.rates())
            for point in points:
                progress(turn, point)
                seconds[point].append(places[point].seconds(point))
                bar.update()
            rows = [point_row(p, sizes, item_bytes, seconds[p], rates[places[p]]) for p in points]
            report = {
                "rows": rows,
                "growth": growth([row for row in rows if row["sweep"] == "context"]),
                "rates": [_rates_row([p for p in points if places[p] is place], its) for place, its in rates.items()],
                "args": vars(args),
                "machine": machine.describe(),
            }
            keep(report)
    return report


def point_row(point: Point, sizes: Sizes, item_bytes: int, seconds: list[float], rates: list[Rates]) -> dict[str, Any]:
    """seconds: of a step, in each turn; rates: of the machine in those turns."""
    step = statistics.median(seconds)
    floors = [point.floor(sizes, item_bytes, its) for its in rates]
    kv_bytes = point.kv_bytes(sizes, item_bytes)
    return asdict(point) | {
        "tokens_per_second": point.batch / step,
        "step_seconds": step,
        "floor_seconds": statistics.median(floors),
        "share_of_floor": statistics.median(f / s for f, s in zip(floors, seconds, strict=True)),
        "kv_bytes": kv_bytes,
        "seconds": seconds,
        "kv_floors": [kv_bytes / its.bandwidth for its in rates],
    }


def _rates_row(points: list[Point], rates: list[Rates]) -> dict[str, Any]:
    """Of one process, those of each turn."""
    return {
        "curves": list(dict.fromkeys(point.sweep for point in points)),
        "threads": points[0].threads,
        "bandwidth": [its.bandwidth for its in rates],
        "operations": [its.operations for its in rates],
    }


def growth(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each batch, what its steps take longer and read more than at its shortest context.

    rows  of the sweep over contexts, in order. Differences are taken turn by turn.
    Each result has `points`; `exponent`: extra time goes with extra bytes to that power, 1 where every byte costs the
    same, above it where a further byte costs more than those before (least squares of the logarithms; None where it
    cannot be told); and at the longest context the rate, and its share of the bandwidth.
    """
    found = []
    for batch in dict.fromkeys(row["batch"] for row in rows):
        first, *others = (row for row in rows if row["batch"] == batch)
        points = []
        for row in others:
            extra = [long - short for long, short in zip(row["seconds"], first["seconds"], strict=True)]
            floor = [long - short for long, short in zip(row["kv_floors"], first["kv_floors"], strict=True)]
            points.append(
                {
                    "context": row["context"],
                    "extra_bytes": row["kv_bytes"] - first["kv_bytes"],
                    "extra_seconds": statistics.median(extra),
                    "extra_floor_seconds": statistics.median(floor),
                }
            )
        if points:
            found.append({"batch": batch, "exponent": _exponent(points), "points": points} | _at_longest(points[-1]))
    return found


def _at_longest(point: dict[str, Any]) -> dict[str, Any]:
    seconds = point["extra_seconds"]
    return {
        "bytes_per_second": point["extra_bytes"] / seconds if seconds > 0 else None,
        "share_of_bandwidth": point["extra_floor_seconds"] / seconds if seconds > 0 else None,
    }


def _exponent(points: list[dict[str, Any]]) -> float | None:
    fitted = [point for point in points if point["extra_bytes"] >= FITTED_PART * points[-1]["extra_bytes"]]
    if len(fitted) < 2 or any(point["extra_seconds"] <= 0 for point in fitted):
        return None
    x, y = ([math.log(point[name]) for point in fitted] for name in ("extra_bytes", "extra_seconds"))
    return statistics.linear_regression(x, y).slope


def table(report: dict[str, Any]) -> str:
    lines = [
        f"{'curve':<8} {'batch':>5} {'context':>7} {'threads':>7} {'block':>5} {'tok/s':>8} {'step (ms)':>10} "
        f"{'floor (ms)':>10} {'of floor':>8}"
    ]
    for row in report["rows"]:
        lines.append(
            f"{row['sweep']:<8} {row['batch']:>5} {row['context']:>7} {row['threads']:>7} {row['block_size']:>5} "
            f"{row['tokens_per_second']:>8.1f} {row['step_seconds'] * 1e3:>10.2f} {row['floor_seconds'] * 1e3:>10.2f} "
            f"{row['share_of_floor']:>8.0%}"
        )
    for row in report["growth"]:
        if row["exponent"] is not None:
            lines.append(
                f"{plots.counted(row['batch'], 'row')}: extra time goes with extra bytes of keys and values to the "
                f"power {row['exponent']:.2f}; at the longest context {row['bytes_per_second'] / 1e9:.1f} GB/s, "
                f"{row['share_of_bandwidth']:.0%} of the bandwidth"
            )
    for row in report["rates"]:
        lines.append(
            f"floor of {', '.join(row['curves'])} with {plots.counted(row['threads'], 'thread')}: weights and KV cache "
            f"read at {statistics.median(row['bandwidth']) / 1e9:.1f} GB/s, operations at "
            f"{statistics.median(row['operations']) / 1e9:.0f} GFLOP/s, measured in each turn (medians)"
        )
    return "\n".join([*lines, machine.in_words(report["machine"])])


def _places(
    args: argparse.Namespace, model: str, points: list[Point], stack: ExitStack
) -> dict[Point, Engines | Worker]:
    """Where each point is measured: here, or in the process with its number of threads."""
    here = [point for point in points if point.sweep != "threads"]
    places: dict[Point, Engines | Worker] = {}
    if here:
        places |= dict.fromkeys(here, Engines(model, args.dtype, here))
    for threads in dict.fromkeys(point.threads for point in points if point.sweep == "threads"):
        there = [point for point in points if point.sweep == "threads" and point.threads == threads]
        worker = Worker(threads, model, args.dtype, there)
        stack.callback(worker.close)
        places |= dict.fromkeys(there, worker)
    return places


def _check_context(model: str, points: Iterable[Point]) -> None:
    from transformers import AutoConfig

    positions = AutoConfig.from_pretrained(model).max_position_embeddings
    longest = max(points, key=lambda point: point.context)
    if longest.context + longest.steps + 1 > positions:
        raise ValueError(
            f"--context {longest.context}: with {longest.steps + 1} new tokens it is beyond the model's {positions} "
            "positions; give shorter ones, or leave the curve out by --only"
        )


if __name__ == "__main__":
    sys.exit(main())
