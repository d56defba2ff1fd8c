"""Cases, the turns that the engines take at them, and the figures that turns give."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from s1engine.bench.peers.processes import Worker, busy_seconds
from s1engine.bench.speed.floor import Rates, Sizes, run_seconds

CALL_TIMEOUT = 900.0
QUIET_SECONDS = 0.2
# Cores: above this share of one, other work is named. A tick is 10 ms, so less could not be told over QUIET_SECONDS.
BUSY = 0.1
ITEM_BYTES = 2  # bfloat16, of weights and of the KV cache: the floor is that of bfloat16 for all engines


@dataclass(frozen=True, kw_only=True)
class Case:
    """`batch` prompts of `prompt` tokens; `new` tokens after each, or 1 where the prompts' own speed is measured."""

    batch: int
    prompt: int
    new: int

    @property
    def name(self) -> str:
        return f"batch {self.batch}" if self.new > 1 else f"prefill {self.prompt}"

    def rate(self, first: float, whole: float) -> float:
        """Tokens a second, of the seconds for one new token and for all: of the prompts, or of those after the first.

        Raises ValueError where all take no longer than one: the difference is noise.
        """
        if self.new == 1:
            return self.batch * self.prompt / first
        if whole <= first:
            raise ValueError(f"{self.new} tokens took {whole:.3f} s and one took {first:.3f} s")
        return self.batch * (self.new - 1) / (whole - first)

    def floor(self, sizes: Sizes, rates: Rates) -> float:
        """The rate that the machine's rates admit at most."""
        first, whole = (
            run_seconds(sizes, [(self.prompt, new)] * self.batch, ITEM_BYTES, rates) for new in (1, self.new)
        )
        return self.rate(first, whole)


def timed(worker: Worker, case: Case, prompts: Sequence[Sequence[int]]) -> dict[str, float]:
    """Seconds of one new token and of all, and the cores that were busy with other things: before it, and beside it."""
    before = _others(QUIET_SECONDS)
    busy, own, begun = busy_seconds(), worker.cpu_seconds(), time.perf_counter()
    first, _ = worker.generate(prompts, 1, CALL_TIMEOUT)
    whole = worker.generate(prompts, case.new, CALL_TIMEOUT)[0] if case.new > 1 else first
    beside = busy_seconds() - busy - (worker.cpu_seconds() - own)
    return {
        "first_seconds": first,
        "seconds": whole,
        "busy_before": before,
        "busy_beside": max(0.0, beside / (time.perf_counter() - begun)),
    }


def _others(seconds: float) -> float:
    """Cores that are busy while nobody should be: all workers are stopped and this process sleeps."""
    busy = busy_seconds()
    time.sleep(seconds)
    return (busy_seconds() - busy) / seconds


def rotated(names: Iterable[str], turn: int) -> list[str]:
    """Each goes first as often as any other."""
    order = list(names)
    start = turn % len(order) if order else 0
    return order[start:] + order[:start]


def warn_of_others(name: str, result: Mapping[str, float]) -> None:
    most = max(result["busy_before"], result["busy_beside"])
    if most > BUSY:
        print(
            f"  other work kept {most:.1f} cores busy before or beside {name}: its figure is too low", file=sys.stderr
        )


def rows(case: Case, turns: Sequence[Mapping[str, Any]], ours: Sequence[str]) -> list[dict[str, Any]]:
    """Medians of the turns, an engine a row: rate, share of the floor, and how often as fast as it each of `ours` is.

    turns  each {"floor": tokens a second, "engines": {name: {"rate": tokens a second}}}
    """
    found = []
    for name in dict.fromkeys(name for turn in turns for name in turn["engines"]):
        its = [turn for turn in turns if name in turn["engines"]]
        rates = [turn["engines"][name]["rate"] for turn in its]
        ratios = {}
        for other in ours:
            shared = [
                turn["engines"][other]["rate"] / turn["engines"][name]["rate"]
                for turn in its
                if other in turn["engines"]
            ]
            if shared:
                ratios[other] = statistics.median(shared)
        found.append(
            {
                "case": case.name,
                "engine": name,
                "turns": len(its),
                "tokens_per_second": statistics.median(rates),
                "lowest": min(rates),
                "highest": max(rates),
                "share_of_floor": statistics.median(turn["engines"][name]["rate"] / turn["floor"] for turn in its),
                "ratios": ratios,
            }
        )
    return found


def leading(made: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]) -> int:
    """Tokens that agree before the first of their prompt that does not."""
    count = 0
    for ids, others in zip(made, reference, strict=True):
        for token, other in zip(ids, others, strict=True):
            if token != other:
                break
            count += 1
    return count
