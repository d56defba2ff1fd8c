"""10,000 random cases: table and native stepper against the reference, in all that a step yields.

The delimiters are short sequences over a tiny alphabet, so that they overlap themselves and each other all the time.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

CHUNK = 500
COUNT = 10_000


@pytest.fixture(scope="module")
def cases(random_cases: Callable[..., Sequence[Any]]) -> Sequence[Any]:
    return random_cases(seed=20250131, count=COUNT)


@pytest.fixture(scope="module")
def expected(cases: Sequence[Any], replay_reference: Callable[..., Any]) -> list[dict[str, Any]]:
    return [replay_reference(case) for case in cases]


def test_the_cases_reach_every_rule(expected: list[dict[str, Any]]) -> None:
    steps = [step for trace in expected for step in trace["steps"]]
    for flag in (1, 2, 4, 8, 16, 32, 64):
        assert sum(bool(step[2] & flag) for step in steps) > 300, flag
    assert {step[0] for step in steps} >= {0, 1, 2, 3}
    assert {step[3] for step in steps} >= {0, 1, 2, 3}
    assert {trace["stop_reason"] for trace in expected} == {None, "natural", "budget"}


def test_stepper_is_the_reference(
    cases: Sequence[Any],
    expected: list[dict[str, Any]],
    any_step: Callable[..., Any],
    replay_batch: Callable[..., Any],
) -> None:
    for begin in range(0, len(cases), CHUNK):
        replayed = replay_batch(any_step, cases[begin : begin + CHUNK], seed=begin)
        for case, want, got in zip(cases[begin:], expected[begin:], replayed, strict=False):
            assert got == want, case


def test_only_held_tokens_are_taken_back(expected: list[dict[str, Any]]) -> None:
    for trace in expected:
        held = 0
        for rewind, _, _, now_held in trace["steps"]:
            assert rewind <= held
            held = now_held
