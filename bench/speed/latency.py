"""Time to the first token, and time between tokens, as the reader of a stream sees them, beside the machine's floor.

The first token is timed for one prompt at a time on an idle engine, and includes all of its prefill. The time between
tokens is timed for batches whose requests come at once; a pause while others' prompts are computed counts. All settings
take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from s1engine import LLMEngine, SamplingParams
from s1engine.bench.speed import machine, memory
from s1engine.bench.speed.arguments import (
    add_device_argument,
    add_model_arguments,
    check_counts,
    chosen_device,
    model_folder,
)
from s1engine.bench.speed.floor import Rates, Sizes, model_sizes, run_seconds, step_seconds
from s1engine.bench.speed.ours import BLOCK_SIZE
from s1engine.bench.speed.workloads import Workload, uniform
from s1engine.config import EngineConfig

EXAMPLE = "example: s1engine bench latency --shape qwen2.5-0.5b --prompt-len 128 2048 --batch 1 32"
WARM_UP_TOKENS = 4
PERCENTILES = {"median": 50, "p90": 90, "p99": 99, "max": 100}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = __doc__, EXAMPLE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_model_arguments(parser)
    add_device_argument(parser)
    parser.add_argument("--attention-backend", default="auto", help="see EngineConfig")
    parser.add_argument(
        "--prompt-len", type=int, nargs="+", default=[128, 512, 2048], help="tokens of the prompts before first tokens"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="requests that decode together")
    parser.add_argument("--context", type=int, default=128, help="tokens of each prompt of a batch")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens of each request of a batch, at least 2")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each setting")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")


def run(args: argparse.Namespace) -> int:
    report = measure(args)
    print(table(report))
    if args.json:
        print(json.dumps(report, default=str))
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run everything. Raises ValueError for arguments that cannot be."""
    check_counts(args, "repeats", "prompt_len", "batch", "context")
    if args.new_tokens < 2:
        raise ValueError(f"--new-tokens {args.new_tokens}: must be at least 2, to have a time between them")
    device = chosen_device(args)
    with model_folder(args) as model:
        sizes = model_sizes(model)
        peaks = None if device.type == "cuda" else _memory(args, model, sizes)
        return _measure(args, model, sizes) | {"memory": peaks}


def token_times(engine: LLMEngine, workload: Workload) -> list[list[float]]:
    """Of each request, when its tokens came, in seconds since all of them were handed over together.

    Raises RuntimeError where a request has other than its tokens.
    """
    begun = time.perf_counter()
    for number, (prompt, new) in enumerate(zip(workload.prompts, workload.new_tokens, strict=True)):
        params = SamplingParams(temperature=workload.temperature, max_tokens=new, ignore_eos=True)
        engine.add_request(str(number), prompt, params, stream=True)
    times: list[list[float]] = [[] for _ in workload.prompts]
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter() - begun
        for output in outputs:
            its = times[int(output.request_id)]
            its += [now] * (len(output.outputs[0].token_ids) - len(its))
    for its, new in zip(times, workload.new_tokens, strict=True):
        if len(its) != new:
            raise RuntimeError(f"a request of {new} tokens has {len(its)}")
    return times


def first_token_row(prompt_len: int, seconds: list[float], floor: float) -> dict[str, Any]:
    """seconds: of each turn; floor: seconds."""
    median = statistics.median(seconds)
    return {
        "prompt_len": prompt_len,
        "first_token_seconds": median,
        "worst_seconds": max(seconds),
        "prompt_tokens_per_second": prompt_len / median,
        "floor_seconds": floor,
        "share_of_floor": floor / median,
        "seconds": seconds,
    }


def between_tokens_row(batch: int, gaps: list[float], floor: float) -> dict[str, Any]:
    """gaps: seconds between the tokens of every request of every turn; floor: seconds of a decode step."""
    found = {name: float(np.percentile(gaps, percent)) for name, percent in PERCENTILES.items()}
    return {
        "batch": batch,
        "gap_seconds": found,
        "floor_seconds": floor,
        "share_of_floor": {name: floor / seconds for name, seconds in found.items()},
        "gaps": len(gaps),
    }


def table(report: dict[str, Any]) -> str:
    lines = [f"{'prompt':>6} {'first token (ms)':>17} {'worst (ms)':>17} {'floor (ms)':>11} {'prompt tok/s':>13}"]
    for row in report["first_token"]:
        floor = row["floor_seconds"]
        lines.append(
            f"{row['prompt_len']:>6} {_cell(row['first_token_seconds'], floor)} {_cell(row['worst_seconds'], floor)} "
            f"{floor * 1e3:>11.1f} {row['prompt_tokens_per_second']:>13.0f}"
        )
    lines += ["", f"{'batch':>6} " + " ".join(f"{name + ' (ms)':>17}" for name in PERCENTILES) + f" {'floor (ms)':>11}"]
    for row in report["between_tokens"]:
        floor = row["floor_seconds"]
        cells = " ".join(_cell(row["gap_seconds"][name], floor) for name in PERCENTILES)
        lines.append(f"{row['batch']:>6} {cells} {floor * 1e3:>11.1f}")
    moved = "read" if report["device"] == "cpu" else "read and written"
    lines += [
        "in brackets: share of the floor; between tokens, that of a decode step of the whole batch",
        f"floor: weights and KV cache {moved} at {report['read_bytes_per_second'] / 1e9:.1f} GB/s, operations at "
        f"{report['operations_per_second'] / 1e9:.0f} GFLOP/s, both measured in each turn (medians)",
    ]
    if report["memory"]:
        lines.append(memory.table(report["memory"]))
    return "\n".join([*lines, machine.in_words(report["machine"])])


def _cell(seconds: float, floor: float) -> str:
    return f"{seconds * 1e3:>10.1f} ({floor / seconds:>4.0%})"


def _measure(args: argparse.Namespace, model: str, sizes: Sizes) -> dict[str, Any]:
    device, dtype = chosen_device(args), getattr(torch, args.dtype)
    engine = _engine(args, model, sizes)
    first: dict[int, list[float]] = {length: [] for length in args.prompt_len}
    gaps: dict[int, list[float]] = {batch: [] for batch in args.batch}
    bandwidths, operations = [], []
    with tqdm(total=(args.repeats + 1) * (len(first) + len(gaps)), unit="run", file=sys.stderr) as bar:
        for turn in range(-1, args.repeats):  # turn -1 warms up
            if turn >= 0:
                bandwidths.append(machine.read_bandwidth(device))
                operations.append(machine.matmul_rate(dtype, device))
            for length, seconds in first.items():
                bar.set_description(f"prompt of {length}")
                came = token_times(engine, _prompt(length, sizes, turn))
                if turn >= 0:
                    seconds.append(came[0][0])
                bar.update()
            for batch, its in gaps.items():
                bar.set_description(f"batch {batch}")
                workload = _batch(args, batch, sizes, turn)
                came = token_times(engine, workload if turn >= 0 else workload.warm_up(WARM_UP_TOKENS))
                if turn >= 0:
                    its += np.diff(came).ravel().tolist()
                bar.update()
    rates = Rates(bandwidth=statistics.median(bandwidths), operations=statistics.median(operations))

    def prompt_floor(length: int) -> float:
        return run_seconds(sizes, [(length, 1)], dtype.itemsize, rates)

    def step_floor(batch: int) -> float:
        context = batch * (args.context + args.new_tokens / 2)  # on the average over the steps
        return step_seconds(sizes, batch, round(context), dtype.itemsize, rates)

    return {
        "first_token": [first_token_row(length, its, prompt_floor(length)) for length, its in first.items()],
        "between_tokens": [between_tokens_row(batch, its, step_floor(batch)) for batch, its in gaps.items()],
        "read_bytes_per_second": rates.bandwidth,
        "operations_per_second": rates.operations,
        "args": {k: v for k, v in vars(args).items() if k != "run"},
        "device": device.type,
        "machine": machine.describe(),
    }


def _prompt(length: int, sizes: Sizes, turn: int) -> Workload:
    return uniform(1, length, 1, sizes.vocab, seed=10_000 + turn)


def _batch(args: argparse.Namespace, batch: int, sizes: Sizes, turn: int) -> Workload:
    return uniform(batch, args.context, args.new_tokens, sizes.vocab, seed=20_000 + turn)


def _kv_tokens(args: argparse.Namespace) -> int:
    return max(*(length + 1 for length in args.prompt_len), max(args.batch) * (args.context + args.new_tokens))


def _engine(args: argparse.Namespace, model: str, sizes: Sizes) -> LLMEngine:
    """With room for the largest setting and no more, and without a prefix cache: every prompt is computed."""
    longest = max(*(length + 1 for length in args.prompt_len), args.context + args.new_tokens)
    blocks = -(-_kv_tokens(args) // BLOCK_SIZE) + 2 * max(args.batch)
    config = EngineConfig(
        max_model_len=longest,
        max_num_seqs=max(args.batch),
        block_size=BLOCK_SIZE,
        kv_cache_memory=blocks * BLOCK_SIZE * sizes.kv * getattr(torch, args.dtype).itemsize,
        enable_prefix_caching=False,
        attention_backend=args.attention_backend,
    )
    return LLMEngine(model, dtype=args.dtype, device=chosen_device(args).type, config=config)


def _memory(args: argparse.Namespace, model: str, sizes: Sizes) -> dict[str, Any]:
    dtype = getattr(torch, args.dtype)
    print("peak memory of a process of its own …", file=sys.stderr)
    return memory.measure(
        *(_load_alone, args, model, sizes),
        weight_bytes=memory.weight_bytes(model, dtype),
        kv_bytes=_kv_tokens(args) * sizes.kv * dtype.itemsize,
    )


def _load_alone(args: argparse.Namespace, model: str, sizes: Sizes) -> Callable[[], None]:
    engine = _engine(args, model, sizes)

    def run_largest() -> None:
        token_times(engine, _prompt(max(args.prompt_len), sizes, turn=0))
        token_times(engine, _batch(args, max(args.batch), sizes, turn=0))

    return run_largest
