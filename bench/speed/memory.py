"""Peak memory of a fresh process that loads a model and generates, against the model's weights and its KV cache.

Fresh, since what a measurement does beside (probing the machine's rates, loading a peer) is no engine's memory.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from typing import Any, TypeVar

import torch

from s1engine.bench.speed import machine
from s1engine.bench.speed.machine import Memory, PeakMemory

Result = TypeVar("Result")

# What an engine may hold at most: so many times weights and KV cache, and so many bytes more.
LIMIT_FACTOR, LIMIT_BYTES = 1.15, 128 << 20


def in_fresh_process(function: Callable[..., Result], *args: Any) -> Result:
    """function(*args), in a new process that has only imported the function's module and what the arguments need."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def measure(load: Callable[..., Callable[[], None]], *args: Any, weight_bytes: int, kv_bytes: int) -> dict[str, Any]:
    """A report of what a new process holds at most while `load(*args)` runs, and while what that returns runs.

    load          a function of a module; it returns what is to be run
    weight_bytes  of the model, and kv_bytes of the tokens that the largest run has at once
    Returned in bytes: `imported`, of a process that imported the package and did nothing; `rows`, for "load" and "run"
    the peaks of anonymous and of file-mapped memory apart, and anonymous memory less that of `imported`; `limit_bytes`.
    """
    imported = in_fresh_process(machine.process_memory)
    rows = []
    for phase, peak in in_fresh_process(_peaks, load, *args).items():
        own = peak.anonymous - imported.anonymous
        rows.append({"phase": phase} | asdict(peak) | {"own": own, "ratio": own / (weight_bytes + kv_bytes)})
    limit = LIMIT_FACTOR * (weight_bytes + kv_bytes) + LIMIT_BYTES
    return {
        "rows": rows,
        "imported": asdict(imported),
        "weight_bytes": weight_bytes,
        "kv_bytes": kv_bytes,
        "limit_bytes": int(limit),
        "within_limit": max(row["own"] for row in rows) <= limit,
    }


def weight_bytes(model: str, dtype: torch.dtype) -> int:
    """Of the parameters of a model folder or hub id, a tied embedding once."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    return sum(p.numel() for p in net.parameters()) * dtype.itemsize


def table(report: dict[str, Any]) -> str:
    def mebibytes(count: int) -> str:
        return f"{count / 2**20:.0f} MiB"

    lines = [f"{'memory, peak':<13} {'anonymous':>10} {'less import':>12} {'of weights + KV':>16} {'file-mapped':>12}"]
    for row in report["rows"]:
        lines.append(
            f"{row['phase']:<13} {mebibytes(row['anonymous']):>10} {mebibytes(row['own']):>12} {row['ratio']:>16.2f} "
            f"{mebibytes(row['file_mapped']):>12}"
        )
    verdict = "within" if report["within_limit"] else "ABOVE"
    lines.append(
        f"weights {mebibytes(report['weight_bytes'])} + KV cache {mebibytes(report['kv_bytes'])}; {verdict} the limit, "
        f"{LIMIT_FACTOR} x both + {mebibytes(LIMIT_BYTES)} = {mebibytes(report['limit_bytes'])}"
    )
    return "\n".join(lines)


def _peaks(load: Callable[..., Callable[[], None]], *args: Any) -> dict[str, Memory]:
    with PeakMemory() as loading:
        run = load(*args)
    with PeakMemory() as running:
        run()
    return {"load": loading.peak, "run": running.peak}
