"""One point of a scaling curve: so many rows that decode at so many tokens of context, and how long their step takes.

Decoding alone is timed. The prompts that bring the rows to their context are computed in a warm-up; the turns after it
find them in the prefix cache. Rows share no block, so each of them reads keys and values of its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context

import torch

from s1engine import LLMEngine, SamplingParams
from s1engine.bench.speed import machine
from s1engine.bench.speed.floor import Rates, Sizes, model_sizes, step_seconds
from s1engine.bench.speed.workloads import uniform
from s1engine.config import EngineConfig
from s1engine.outputs import RequestOutput


@dataclass(frozen=True, kw_only=True)
class Point:
    """sweep: the curve that it is of. context: tokens of each row's prompt. steps: timed, one after another."""

    sweep: str
    batch: int
    context: int
    threads: int
    block_size: int
    steps: int

    @property
    def mean_context(self) -> float:
        """Tokens that a row attends to, on the average over the steps."""
        return self.context + (self.steps + 1) / 2

    def kv_bytes(self, sizes: Sizes, item_bytes: int) -> float:
        """Keys and values that a step reads, of all rows and layers."""
        return self.batch * self.mean_context * sizes.kv * item_bytes

    def floor(self, sizes: Sizes, item_bytes: int, rates: Rates) -> float:
        """Seconds of a step."""
        return step_seconds(sizes, self.batch, round(self.batch * self.mean_context), item_bytes, rates)


class Engines:
    """Engines over one copy of a model's weights, one a block size, with room for the prompts of all points."""

    def __init__(self, model: str, dtype: str, points: Iterable[Point]) -> None:
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._sizes = model_sizes(model)
        self._engines: dict[int, LLMEngine] = {}
        points = list(points)
        for size in dict.fromkeys(point.block_size for point in points):
            config = self._config(size, [point for point in points if point.block_size == size])
            loaded = next((engine.model for engine in self._engines.values()), model)
            self._engines[size] = LLMEngine(loaded, dtype=dtype, device="cpu", config=config)

    def warm_up(self, point: Point) -> None:
        """Compute the prompts of a point, and decode after them."""
        decode_seconds(self._engines[point.block_size], self._prompts(point), point.steps)

    def seconds(self, point: Point) -> float:
        """Of a step at a point that is warm. Raises RuntimeError where its rows do not decode side by side."""
        seconds = decode_seconds(self._engines[point.block_size], self._prompts(point), point.steps)
        if seconds is None:
            raise RuntimeError(f"{point}: its rows did not begin and end together")
        return seconds

    def rates(self) -> Rates:
        """Of the machine, with the threads of this process."""
        return Rates(bandwidth=machine.read_bandwidth(), operations=machine.matmul_rate(self._dtype))

    def _prompts(self, point: Point) -> list[list[int]]:
        """Of a row, the shorter one is the beginning of the longer."""
        return [uniform(1, point.context, 1, self._sizes.vocab, seed=row).prompts[0] for row in range(point.batch)]

    def _config(self, block_size: int, points: list[Point]) -> EngineConfig:
        # A sweep's shorter prompts are in its longest; what was generated after each stays in the cache for a while.
        prompts = {sweep: 0 for sweep in dict.fromkeys(point.sweep for point in points)}
        generated = 0
        for point in points:
            blocks = point.batch * -(-point.context // block_size)
            prompts[point.sweep] = max(prompts[point.sweep], blocks)
            generated += point.batch * (-(-(point.steps + 1) // block_size) + 2)
        tokens = (sum(prompts.values()) + generated) * block_size
        return EngineConfig(
            max_model_len=max(point.context + point.steps + 1 for point in points),
            max_num_seqs=max(point.batch for point in points),
            block_size=block_size,
            kv_cache_memory=tokens * self._sizes.kv * self._dtype.itemsize,
        )


def decode_seconds(engine: LLMEngine, prompts: list[list[int]], steps: int) -> float | None:
    """Seconds of a decode step of all the prompts' requests together, the mean of `steps` after their first tokens.

    None where they do not end together, and so did not begin together: then fewer than all of them decoded in a step.
    """
    params = SamplingParams(temperature=0.0, max_tokens=steps + 1, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), prompt, params)
    ended: list[RequestOutput] = []
    while engine.has_unfinished_requests():
        ended = engine.step()
    if len(ended) < len(prompts):
        return None
    begun = max(output.metrics.first_token_time or 0.0 for output in ended)
    return (time.monotonic() - begun) / steps


class Worker:
    """Engines in a process of its own with so many threads, until it is closed."""

    def __init__(self, threads: int, model: str, dtype: str, points: Iterable[Point]) -> None:
        self._setting: Setting = (model, dtype, tuple(points))
        self._pool = ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"))
        # OpenMP reads it when the process begins, whichever library has brought it along.
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = str(threads)
        try:
            found = self._pool.submit(torch.get_num_threads).result()
        finally:
            if before is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = before
        if found != threads:
            raise RuntimeError(f"a process that was given {threads} threads has {found}")

    def warm_up(self, point: Point) -> None:
        self._pool.submit(_warm_up, self._setting, point).result()

    def seconds(self, point: Point) -> float:
        return self._pool.submit(_seconds, self._setting, point).result()

    def rates(self) -> Rates:
        return self._pool.submit(_rates, self._setting).result()

    def close(self) -> None:
        self._pool.shutdown()


Setting = tuple[str, str, tuple[Point, ...]]


@cache
def _engines(setting: Setting) -> Engines:
    return Engines(*setting)


def _warm_up(setting: Setting, point: Point) -> None:
    _engines(setting).warm_up(point)


def _seconds(setting: Setting, point: Point) -> float:
    return _engines(setting).seconds(point)


def _rates(setting: Setting) -> Rates:
    return _engines(setting).rates()
