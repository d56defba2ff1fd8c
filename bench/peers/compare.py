"""Tokens per second of s1engine and of other engines on this machine's processors, in turns.

All run random weights of one shape with the same token ids, greedy, EOS ignored, with the same number of threads: each
in a process of its own and in a virtual environment that this command makes (minutes, and gigabytes, the first time;
pip's own settings apply). Engines that cannot be had are named with the reason. All stay loaded, some 16 GB at the 0.5B
shape; whoever has not the turn is stopped. Ratios are taken turn by turn, since a shared machine's speed drifts.

    batch N    decoding: prompts of `prompt-len` tokens, `new-tokens` each; the time of the first token is taken off
    prefill    one prompt of `prefill` tokens, one new token
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from s1engine.bench.peers import making
from s1engine.bench.peers import report as reporting
from s1engine.bench.peers.engines import ENGINES, OURS, Engine, available
from s1engine.bench.peers.making import Failed
from s1engine.bench.peers.processes import Worker
from s1engine.bench.peers.turns import CALL_TIMEOUT, Case, leading, rotated, rows, timed, warn_of_others
from s1engine.bench.speed import machine
from s1engine.bench.speed.floor import Rates, Sizes, model_sizes
from s1engine.bench.speed.shapes import SHAPES, make_model
from s1engine.bench.speed.workloads import uniform

EXAMPLE = "example: s1engine bench peers --batch 1 8 32 --repeats 5 --output peers.json"
REFERENCE = "transformers"
AGREEMENT_PROMPTS, AGREEMENT_TOKENS = 8, 4
WARM_UP_TOKENS = 16
LOAD_TIMEOUT = 1800.0  # vLLM compiles for minutes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = __doc__, EXAMPLE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    names = [engine.name for engine in ENGINES]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "s1engine"
    parser.add_argument(
        "--shape", choices=sorted(SHAPES), default="qwen2.5-0.5b", help="random weights at a real shape"
    )
    parser.add_argument("--engines", choices=names, nargs="+", default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--threads", type=int, default=2, help="of every engine")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8, 32], help="decoding: prompts at a time")
    parser.add_argument("--prompt-len", type=int, default=128, help="decoding: tokens a prompt")
    parser.add_argument("--new-tokens", type=int, default=128, help="decoding: tokens generated per prompt")
    parser.add_argument("--prefill", type=int, nargs="*", default=[1024], help="tokens of a prompt that is only read")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each engine in each case")
    parser.add_argument("--venvs", type=Path, default=cache / "peers", help="folder of the virtual environments")
    parser.add_argument("--models", type=Path, default=cache / "peer-models", help="folder of the converted models")
    parser.add_argument("--output", type=Path, help="write the JSON there as it grows, and a plot beside it, as .png")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")


def run(args: argparse.Namespace) -> int:
    """Measure and print. Returns 1 where an engine of ours was dropped: there is nothing to compare then."""
    output = args.output

    def keep(report: dict[str, Any]) -> None:
        if output is not None:
            output.write_text(json.dumps(report, indent=1, default=str))

    report = measure(args, keep)
    print(reporting.table(report))
    keep(report)
    if output is not None:
        reporting.plot(report, output.with_suffix(".png"))
    if args.json:
        print(json.dumps(report, default=str))
    return int(OURS in args.engines and not any(row["engine"] == OURS for row in report["rows"]))


def measure(args: argparse.Namespace, keep: Callable[[dict[str, Any]], None] = lambda report: None) -> dict[str, Any]:
    """Run everything. keep: called with the report as it grows. Raises ValueError for arguments that cannot be."""
    _check(args)
    cases = [Case(batch=batch, prompt=args.prompt_len, new=args.new_tokens) for batch in args.batch]
    cases += [Case(batch=1, prompt=length, new=1) for length in args.prefill]
    root = args.models / args.shape
    model = making.once(
        root / "model",
        {"shape": SHAPES[args.shape], "seed": 0},
        f"random weights of {args.shape}",
        lambda folder: make_model(args.shape, folder),
    )
    sizes = model_sizes(str(model))
    torch.set_num_threads(args.threads)
    report: dict[str, Any] = {
        "rows": [],
        "notes": [],
        "engines": {},
        "ours": [engine.name for engine in ENGINES if engine.ours],
        "agreement_prompts": AGREEMENT_PROMPTS,
        "agreement_tokens": AGREEMENT_TOKENS,
        "operations_per_second": machine.matmul_rate(torch.bfloat16),
        "cases": [],
        "args": {k: v for k, v in vars(args).items() if k != "run" and not isinstance(v, Path)},
        "machine": machine.describe(),
    }
    with ExitStack() as stack:
        comparison = Comparison(args, sizes, report, keep)
        stack.callback(comparison.close)
        comparison.start(model, root, cases)
        comparison.check_tokens()
        for case in cases:
            comparison.take_turns(case)
    return report


def _check(args: argparse.Namespace) -> None:
    least = {"threads": 1, "repeats": 1, "prompt_len": 1, "new_tokens": 2}
    for name, bound in least.items():
        if getattr(args, name) < bound:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {bound}")
    for name in ("batch", "prefill"):
        if min(getattr(args, name), default=1) < 1:
            raise ValueError(f"--{name} {min(getattr(args, name))}: must be at least 1")
    if not args.batch and not args.prefill:
        raise ValueError("--batch and --prefill are both empty: there is no case to measure")
    if not Path("/proc/self/status").exists():
        raise ValueError("bench peers needs Linux: it reads memory and processor time from /proc")
    if args.output is not None:
        if args.output.suffix != ".json":
            raise ValueError(f"--output {args.output}: must end with .json; the plot goes beside it")
        if not args.output.parent.is_dir():
            raise ValueError(f"--output {args.output}: there is no folder {args.output.parent}")
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError("--output: the plot needs matplotlib, which is not installed")


class Comparison:
    """The engines that run, and the report that grows. An engine that fails takes no further part."""

    def __init__(
        self, args: argparse.Namespace, sizes: Sizes, report: dict[str, Any], keep: Callable[[dict[str, Any]], None]
    ) -> None:
        self._args, self._sizes, self._report, self._keep = args, sizes, report, keep
        self._workers: dict[str, Worker] = {}

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()

    def start(self, model: Path, root: Path, cases: list[Case]) -> None:
        """Make, convert and load what the engines need; note those that cannot be had."""
        sizes = [[case.batch, case.prompt, case.new] for case in cases]
        sizes.append([AGREEMENT_PROMPTS, self._args.prompt_len, AGREEMENT_TOKENS])
        folders: dict[str, tuple[Path, Path] | Failed] = {}
        wanted = [engine for engine in ENGINES if engine.name in self._args.engines]
        for engine in wanted:
            name = engine.environment.name if engine.environment else ""
            if name not in folders:
                folders[name] = self._prepare(engine, model, root)
        for engine in wanted:
            found = folders[engine.environment.name if engine.environment else ""]
            try:
                if isinstance(found, Failed):
                    raise found
                if not available(engine):
                    raise Failed(f"this version of s1engine has no setting {', '.join(engine.options)}")
                self._load(engine, *found, sizes, root)
            except Failed as error:
                self._drop(engine.name, f"skipped: {error}", engine.label)

    def _prepare(self, engine: Engine, model: Path, root: Path) -> tuple[Path, Path] | Failed:
        """Python and model of the engine's environment; or why there are none."""
        if engine.environment is None:
            return Path(sys.executable), model
        try:
            folder = making.make_environment(engine.environment, self._args.venvs)
            return making.python_of(folder), making.convert(engine.environment, folder, model, root)
        except Failed as error:
            return error

    def _load(self, engine: Engine, python: Path, model: Path, cases: list[list[int]], root: Path) -> None:
        environment, threads = engine.environment, self._args.threads
        places = {"environment": python.parents[1], "cache": root / "caches"}
        variables = {
            name: value.format(**places) for name, value in (environment.running if environment else {}).items()
        }
        print(f"loading {engine.label} …", file=sys.stderr)
        worker = Worker(python, engine.worker, threads, variables, root / f"{engine.name}.log")
        self._workers[engine.name] = worker
        how = {"model": str(model / engine.model), "threads": threads, "cases": cases, "options": dict(engine.options)}
        loaded = worker.ask({"op": "load", **how}, LOAD_TIMEOUT)
        self._report["engines"][engine.name] = {
            "label": engine.label,
            "int8": engine.int8,
            "versions": loaded["versions"],
            "packages": making.packages(python.parents[1]) if environment else [],
            "import_seconds": loaded["import_seconds"],
            "load_seconds": loaded["seconds"],
            "memory": {"imported": loaded["imported_bytes"]} | worker.memory,
            "agreement": None,
        }
        print(f"  in {loaded['import_seconds'] + loaded['seconds']:.1f} s", file=sys.stderr)

    def check_tokens(self) -> None:
        """The first tokens of a few prompts, beside the reference's: an engine of wrong tokens is no peer."""
        prompts = self._prompts(Case(batch=AGREEMENT_PROMPTS, prompt=self._args.prompt_len, new=AGREEMENT_TOKENS), -2)
        made = {}
        for name, worker in list(self._workers.items()):
            try:
                made[name] = worker.generate(prompts, AGREEMENT_TOKENS, CALL_TIMEOUT)[1]
            except Failed as error:
                self._drop(name, str(error))
        count = AGREEMENT_PROMPTS * AGREEMENT_TOKENS
        for name in made if REFERENCE in made else []:
            agreeing = leading(made[name], made[REFERENCE])
            self._report["engines"][name]["agreement"] = f"{agreeing}/{count}"
            if 2 * agreeing < count:
                label = self._report["engines"][name]["label"]
                self._note(f"WRONG TOKENS: {label}: {agreeing} of {count} are those of {REFERENCE}")
        self._keep(self._report)

    def take_turns(self, case: Case) -> None:
        """Add the case's turns to the report."""
        warm_up = self._prompts(case, -1)
        for name, worker in list(self._workers.items()):
            try:
                worker.generate(warm_up, 1, CALL_TIMEOUT)
                worker.generate(warm_up, min(case.new, WARM_UP_TOKENS), CALL_TIMEOUT)
            except Failed as error:
                self._drop(name, str(error))
        turns: list[dict[str, Any]] = []
        entry = {"name": case.name, "batch": case.batch, "prompt": case.prompt, "new": case.new, "turns": turns}
        self._report["cases"].append(entry)
        others = list(self._report["rows"])
        for number in range(self._args.repeats):
            bandwidth = machine.read_bandwidth()
            rates = Rates(bandwidth=bandwidth, operations=self._report["operations_per_second"])
            results: dict[str, dict[str, float]] = {}
            floor = case.floor(self._sizes, rates)
            turns.append({"read_bytes_per_second": bandwidth, "floor": floor, "engines": results})
            prompts = self._prompts(case, number)
            print(f"{case.name}, turn {number + 1}/{self._args.repeats}: {bandwidth / 1e9:.1f} GB/s", file=sys.stderr)
            for name in rotated(self._workers, number):
                self._take_turn(name, case, prompts, results)
            entry["floor"] = statistics.median(turn["floor"] for turn in turns)
            self._report["rows"] = others + rows(case, turns, self._report["ours"])
            self._keep(self._report)

    def _take_turn(self, name: str, case: Case, prompts: list[list[int]], results: dict[str, dict[str, float]]) -> None:
        worker = self._workers[name]
        try:
            result = timed(worker, case, prompts)
            result["rate"] = case.rate(result["first_seconds"], result["seconds"])
        except Failed as error:
            return self._drop(name, str(error))
        except ValueError as error:
            return self._note(f"{self._report['engines'][name]['label']}, {case.name}: a turn is left out: {error}")
        results[name] = result
        self._report["engines"][name]["memory"] |= worker.memory
        print(f"  {name}: {result['rate']:.1f} tok/s", file=sys.stderr)
        warn_of_others(name, result)

    def _prompts(self, case: Case, turn: int) -> list[list[int]]:
        """Nobody has seen the prompts that count: each turn, and each warm-up (below 0), has its own."""
        seed = 10_000 * case.batch + case.prompt + 1_000_000 * (turn + 2)
        return uniform(case.batch, case.prompt, case.new, self._sizes.vocab, seed).prompts

    def _drop(self, name: str, why: str, label: str | None = None) -> None:
        worker = self._workers.pop(name, None)
        if worker is not None:
            worker.close()
        self._note(f"{label or self._report['engines'][name]['label']}: {why}")

    def _note(self, text: str) -> None:
        print(text, file=sys.stderr)
        self._report["notes"].append(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))
