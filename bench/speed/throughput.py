"""Output tokens per second, beside transformers and the machine's floor, interleaved in one run.

All engines load the same folder and get the same token ids; EOS is ignored and times include prefill. They take turns,
and ratios are taken turn by turn, since a shared machine's speed drifts.

    uniform  `batch` prompts of `prompt-len` tokens, `new-tokens` each, greedy
    nano     that of nano-vllm's bench.py: 256 requests, 142,827 tokens in and 133,966 out, temperature 0.6
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from s1engine.bench.speed import machine, memory
from s1engine.bench.speed.arguments import (
    add_device_argument,
    add_model_arguments,
    check_counts,
    chosen_device,
    model_folder,
)
from s1engine.bench.speed.floor import Rates, Sizes, model_sizes, run_seconds
from s1engine.bench.speed.ours import Engine, load_ours, loaded_bytes, warm_up
from s1engine.bench.speed.peers import PEERS, load_peer
from s1engine.bench.speed.workloads import Workload, nano, uniform

EXAMPLE = "example: s1engine bench throughput --shape qwen2.5-0.5b --batch 1 32 --repeats 3"


@dataclass(frozen=True)
class Setting:
    """What takes turns with itself: `label` names it in the table, draw(turn) makes its requests."""

    label: int
    draw: Callable[[int], Workload]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = __doc__, EXAMPLE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_model_arguments(parser)
    add_device_argument(parser)
    parser.add_argument("--attention-backend", default="auto", help="of s1engine; see EngineConfig")
    parser.add_argument("--workload", choices=("uniform", "nano"), default="uniform")
    parser.add_argument("--scale", type=float, default=1.0, help="nano: this part of its requests")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32], help="uniform: prompts at a time")
    parser.add_argument("--prompt-len", type=int, default=128, help="uniform: tokens a prompt")
    parser.add_argument("--new-tokens", type=int, default=128, help="uniform: tokens generated per prompt")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each engine")
    parser.add_argument("--budget", action="store_true", help="s1engine with a thinking budget on every row as well")
    parser.add_argument("--deterministic", action="store_true", help="s1engine with deterministic=True as well")
    parser.add_argument(
        "--peer", choices=sorted(PEERS), nargs="+", help="of transformers; default: continuous on a GPU, else generate"
    )
    parser.add_argument("--no-peer", action="store_true", help="do not run transformers")
    parser.add_argument("--peer-limit", type=float, help="give a peer up whose turn takes more seconds")
    parser.add_argument("--time-limit", type=float, help="begin no further turn that would end after so many seconds")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")


def run(args: argparse.Namespace) -> int:
    _check(args)
    with model_folder(args) as model, ExitStack() as stack:
        peaks = None if chosen_device(args).type == "cuda" else _memory(args, model)
        report = _measure(args, model, lambda report: None, stack) | {"memory": peaks}
    print(table(report))
    if args.json:
        print(json.dumps(report, default=str))
    return 0


def measure(args: argparse.Namespace, keep: Callable[[dict[str, Any]], None] = lambda report: None) -> dict[str, Any]:
    """All but memory, which takes processes of its own. keep: called with the report as it grows.

    Raises ValueError for arguments that cannot be.
    """
    _check(args)
    with model_folder(args) as model, ExitStack() as stack:
        return _measure(args, model, keep, stack)


def _check(args: argparse.Namespace) -> None:
    check_counts(args, "repeats", "prompt_len", "new_tokens", "batch")
    if not 0 < args.scale <= 1:
        raise ValueError(f"--scale {args.scale}: must be above 0 and at most 1")
    chosen_device(args)


def _memory(args: argparse.Namespace, model: str) -> dict[str, Any]:
    """Of s1engine alone, on every workload in turn."""
    dtype, sizes = getattr(torch, args.dtype), model_sizes(model)
    workloads = [setting.draw(0) for setting in _settings(args, sizes)]
    tokens = max(sum(prompt + new for prompt, new in workload.lengths) for workload in workloads)
    print("peak memory of a process of its own …", file=sys.stderr)
    return memory.measure(
        *(_load_alone, args, model, sizes, workloads),
        weight_bytes=memory.weight_bytes(model, dtype),
        kv_bytes=tokens * sizes.kv * dtype.itemsize,
    )


def _load_alone(args: argparse.Namespace, model: str, sizes: Sizes, workloads: list[Workload]) -> Callable[[], None]:
    _, engine, _ = next(load_ours(args, model, sizes, chosen_device(args), workloads))

    def run_all() -> None:
        for workload in workloads:
            engine(workload)

    return run_all


def _measure(
    args: argparse.Namespace, model: str, keep: Callable[[dict[str, Any]], None], stack: ExitStack
) -> dict[str, Any]:
    deadline = time.perf_counter() + args.time_limit if args.time_limit else math.inf
    device, dtype = chosen_device(args), getattr(torch, args.dtype)
    sizes = model_sizes(model)
    rates = Rates(bandwidth=machine.read_bandwidth(device), operations=machine.matmul_rate(dtype, device))
    settings = _settings(args, sizes)
    warm_ups = [setting.draw(-1) for setting in settings]
    report: dict[str, Any] = {
        "rows": [],
        "notes": [],
        "loaded_bytes": {},
        "warm_up_seconds": {},
        "read_bytes_per_second": rates.bandwidth,
        "operations_per_second": rates.operations,
        "args": {k: v for k, v in vars(args).items() if k != "run"},
        "device": device.type,
        "machine": machine.describe(),
    }
    engines: dict[str, Engine] = {}
    for name, engine, num_bytes in load_ours(args, model, sizes, device, warm_ups):
        engines[name], report["loaded_bytes"][name] = engine, num_bytes
        report["warm_up_seconds"][name] = warm_up(engine, warm_ups, device)
        keep(report)
    peers = list(args.peer or ["continuous" if device.type == "cuda" else "generate"])
    for name in [] if args.no_peer else peers:
        try:
            before = loaded_bytes(device)
            peer = load_peer(name, model, dtype, device, warm_ups, args.peer_limit, stack)
            report["loaded_bytes"][peer.name] = loaded_bytes(device) - before
            for workload in warm_ups:
                peer(workload.warm_up(2))
        except Exception as error:  # the peer's trouble must not cost our own numbers
            report["notes"].append(f"transformers, {name}: {type(error).__name__}: {error}")
            if device.type == "cuda" and name == "continuous" and "generate" not in peers:
                peers.append("generate")  # the loop goes on to it
            continue
        engines[peer.name] = peer
        report["notes"].append(peer.note)
    for setting in settings:
        floor = run_seconds(sizes, setting.draw(0).lengths, dtype.itemsize, rates)
        _take_turns(setting, engines, args.repeats, floor, deadline, report, keep)
    return report


def _take_turns(
    setting: Setting,
    engines: dict[str, Engine],
    repeats: int,
    floor: float,
    deadline: float,
    report: dict[str, Any],
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Add the setting's rows to the report, anew whenever a turn is over. A peer that fails takes no further part.

    floor     seconds
    deadline  on the performance counter; no second turn of an engine begins that would end after it
    """
    before = report["rows"]
    times: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(repeats):
        ran = False
        workload = setting.draw(turn)
        order = list(engines.items())
        for name, engine in order if turn % 2 == 0 else order[::-1]:
            start = time.perf_counter()
            if times[name] and start + times[name][-1] > deadline:
                continue
            ran = True
            try:
                engine(workload)
            except Exception as error:
                if name.startswith("s1engine"):
                    raise
                del engines[name], times[name]
                report["rows"] = before + _rows(setting.label, workload, floor, times)
                report["notes"].append(f"{name}: {type(error).__name__}: {error}")
                continue
            times[name].append(time.perf_counter() - start)
            report["rows"] = before + _rows(setting.label, workload, floor, times)
            keep(report)
            print(f"{setting.label} rows, turn {turn + 1}/{repeats}: {name} {times[name][-1]:.2f} s", file=sys.stderr)
        if not ran:
            break


def _rows(label: int, workload: Workload, floor: float, times: dict[str, list[float]]) -> list[dict[str, Any]]:
    rows = []
    for name, its in times.items():
        if not its or not times["s1engine"]:
            continue  # its turn comes
        seconds = statistics.median(its)
        rows.append(
            {
                "batch": label,
                "engine": name,
                "tokens_per_second": workload.total_new / seconds,
                "share_of_floor": floor / seconds,
                "s1engine_speedup": statistics.median(o / own for own, o in zip(times["s1engine"], its, strict=False)),
                "milliseconds_per_step": 1000 * seconds / max(workload.new_tokens),
                "seconds": its,
            }
        )
    return rows


def table(report: dict[str, Any]) -> str:
    lines = [f"{'batch':>5} {'engine':<23} {'tok/s':>8} {'of floor':>9} {'s1engine is':>12} {'ms/step':>8}"]
    for row in report["rows"]:
        lines.append(
            f"{row['batch']:>5} {row['engine']:<23} {row['tokens_per_second']:>8.1f} {row['share_of_floor']:>8.0%} "
            f"{row['s1engine_speedup']:>10.2f} x {row['milliseconds_per_step']:>8.2f}"
        )
    for row in report["rows"]:
        if row["engine"].startswith("s1engine, "):
            variation = row["engine"].removeprefix("s1engine, ")
            lines.append(f"batch {row['batch']}: speed with {variation} / without: {1 / row['s1engine_speedup']:.3f}")
    moved = "read" if report["device"] == "cpu" else "read and written"
    lines.append(
        f"floor: weights and KV cache {moved} at {report['read_bytes_per_second'] / 1e9:.1f} GB/s, operations at "
        f"{report['operations_per_second'] / 1e9:.0f} GFLOP/s, both measured just before"
    )
    warm_ups = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in report["warm_up_seconds"].items())
    lines.append("warm-up: " + warm_ups + (", each a whole run" if report["device"] == "cuda" else ""))
    lines.append("ms/step: the whole time over the longest request's tokens; at batch 1 the latency of a token")
    sizes = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in report["loaded_bytes"].items())
    lines.append("in memory after loading: " + sizes)
    if report.get("memory"):
        lines.append(memory.table(report["memory"]))
    return "\n".join([*lines, machine.in_words(report["machine"]), *report["notes"]])


def _settings(args: argparse.Namespace, sizes: Sizes) -> list[Setting]:
    if args.workload == "nano":
        workload = nano(args.scale)
        if sizes.vocab <= 10_000:
            raise ValueError(f"--workload nano: its token ids go to 10000, the vocabulary has {sizes.vocab}")
        return [Setting(len(workload.prompts), lambda turn: workload)]

    def setting(batch: int) -> Setting:
        # The seed of a warm-up, turn -1, is that of no turn: nobody has seen the prompts that count.
        def draw(turn: int) -> Workload:
            return uniform(batch, args.prompt_len, args.new_tokens, sizes.vocab, seed=1000 * batch + turn + 1)

        return Setting(batch, draw)

    return [setting(batch) for batch in args.batch]
