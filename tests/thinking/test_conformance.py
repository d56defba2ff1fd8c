"""The 200 conformance cases, on every implementation: `tests/data/thinking.json` fixes what a budget means."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from s1engine.thinking import simulate


def test_there_are_200_cases(conformance: list[Any]) -> None:
    assert len(conformance) == 200


def test_reference(conformance: list[Any]) -> None:
    for name, case, expect in conformance:
        assert asdict(simulate(case.format, case.budget, case.prompt, case.sampled)) == expect, name


def test_stepper(conformance: list[Any], any_step: Callable[..., Any], replay_batch: Callable[..., Any]) -> None:
    replayed = replay_batch(any_step, [case for _, case, _ in conformance])
    for (name, _, expect), got in zip(conformance, replayed, strict=True):
        got.pop("steps")
        assert got == expect, name
