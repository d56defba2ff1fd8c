"""What must hold of the machine for any delimiters, budget, prompt and samples, and a few cases by hand."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s1engine.thinking import Machine, Step, ThinkingBudget, ThinkingFormat, Trigger, simulate, split_thinking

R1 = ThinkingFormat(
    start=[100],
    triggers=[Trigger([101], [101]), Trigger([2], [101])],
    forced_close=[101, 10, 50],
    newline_ids=[10],
    eos_ids=[2],
)
tokens = st.sampled_from([2, 10, 50, 100, 101, 200, 201])
budgets = st.builds(
    ThinkingBudget,
    max_tokens=st.none() | st.integers(0, 9),
    min_tokens=st.integers(0, 9),
    ignore_end=st.integers(0, 4),
    extensions=st.lists(st.lists(st.integers(90, 93), min_size=1, max_size=3), min_size=1, max_size=3),
    scope=st.sampled_from(["total", "segment"]),
    grace_tokens=st.integers(0, 4),
    on_budget=st.sampled_from(["force_end", "truncate"]),
)
drawn = settings(max_examples=300, deadline=None)


@pytest.fixture(scope="module")
def draw(random_cases: Callable[..., Any]) -> Callable[[int], Any]:
    """A random case from a seed."""
    return lambda seed: random_cases(seed, 1)[0]


def run(case: Any, **changes: Any) -> Iterator[tuple[Machine, Step, str]]:
    """The machine after each step, what the step yielded, and the phase before it; `changes` are to the budget."""
    machine = Machine(case.format, dataclasses.replace(case.budget, **changes), case.prompt)
    for x in case.sampled:
        if machine.finished:
            return
        before = machine.phase
        yield machine, machine.step(x), before


@given(seed=st.integers(0, 2**32))
@drawn
def test_the_cap_holds(draw: Callable[[int], Any], seed: int) -> None:
    case = draw(seed)
    cap = case.budget.max_tokens
    for machine, _, _ in run(case, scope="total"):
        assert cap is None or 0 <= machine.thinking_tokens <= cap
    for machine, _, _ in run(case, scope="segment"):
        assert cap is None or 0 <= machine.segment_tokens <= cap


@given(budget=budgets, sampled=st.lists(tokens, max_size=40))
@drawn
def test_the_count_is_that_of_the_output(budget: ThinkingBudget, sampled: list[int]) -> None:
    trace = simulate(R1, budget, [100], sampled)
    assert split_thinking(R1, [100], trace.output).num_tokens == trace.thinking_tokens


@given(budget=budgets, sampled=st.lists(tokens, max_size=40))
@drawn
def test_no_segment_is_longer_than_the_cap(budget: ThinkingBudget, sampled: list[int]) -> None:
    trace = simulate(R1, dataclasses.replace(budget, scope="segment"), [100], sampled)
    sampled_since_extension = 0
    for start, end in split_thinking(R1, [100], trace.output).thinking:
        for forced in trace.forced[start:end]:
            sampled_since_extension = 0 if forced else sampled_since_extension + 1
            assert budget.max_tokens is None or sampled_since_extension <= budget.max_tokens


@given(seed=st.integers(0, 2**32))
@drawn
def test_only_held_sampled_tokens_are_taken_back(draw: Callable[[int], Any], seed: int) -> None:
    before: list[int] = []
    forced_before: list[int] = []
    held = 0
    for machine, step, _ in run(draw(seed)):
        assert step.rewind <= held
        assert 1 not in forced_before[len(before) - step.rewind :]
        assert machine.output[: len(before) - step.rewind] == before[: len(before) - step.rewind]
        before, forced_before, held = list(machine.output), list(machine.forced), machine.held
        assert 1 not in forced_before[len(before) - held :]


@given(seed=st.integers(0, 2**32))
@drawn
def test_a_block_ends_in_a_close(draw: Callable[[int], Any], seed: int) -> None:
    case = draw(seed)
    closes = {tuple(trigger.close) for trigger in case.format.triggers}
    forced_closes = 0
    for machine, step, was in run(case):
        forced_closes += "closed_budget" in step.events
        if machine.phase == "answer" and was == "thinking":
            if machine.stop_reason == "natural":
                assert any(tuple(machine.output[-len(close) :]) == close for close in closes)
            else:
                close = case.format.forced_close if forced_closes == 1 else case.format.triggers[0].close
                assert tuple(machine.output[-len(close) :]) == close


@given(seed=st.integers(0, 2**32))
@drawn
def test_an_end_is_taken_only_when_it_may_be(draw: Callable[[int], Any], seed: int) -> None:
    """Without a cap, an ignorable end is taken only after `min_tokens` and `ignore_end`, and no close is forced."""
    case = draw(seed)
    ignorable = all(trigger.ignorable for trigger in case.format.triggers)
    for machine, step, _ in run(case, max_tokens=None):
        assert "closed_budget" not in step.events
        if "closed_natural" in step.events and ignorable:
            assert machine.thinking_tokens >= case.budget.min_tokens
            assert machine.extensions_used >= case.budget.ignore_end


@given(seed=st.integers(0, 2**32), other=tokens)
@drawn
def test_what_is_sampled_under_the_queue_changes_nothing(draw: Callable[[int], Any], seed: int, other: int) -> None:
    case = draw(seed)
    machine = Machine(case.format, case.budget, case.prompt)
    samples = []
    for x in case.sampled:
        samples.append(other if machine.queue else x)
        machine.step(x)
    assert simulate(case.format, case.budget, case.prompt, samples) == simulate(
        case.format, case.budget, case.prompt, case.sampled
    )


@given(seed=st.integers(0, 2**32), cap=st.integers(0, 12), more=st.integers(1, 12))
@drawn
def test_a_smaller_cap_gives_a_prefix(draw: Callable[[int], Any], seed: int, cap: int, more: int) -> None:
    """Up to its forced close a trace is that of any larger cap: what lets one trunk serve a whole sweep."""
    case = draw(seed)
    plain = {"ignore_end": 0, "min_tokens": 0, "grace_tokens": 0}
    small, large = run(case, max_tokens=cap, **plain), run(case, max_tokens=cap + more, **plain)
    for (_, step, _), (_, other, _) in zip(small, large, strict=False):
        if "closed_budget" in step.events or "truncated" in step.events:
            break
        assert step == other


@given(seed=st.integers(0, 2**32))
@drawn
def test_each_ban_lasts_one_position(draw: Callable[[int], Any], seed: int) -> None:
    case = draw(seed)
    single = sorted(t.tokens[0] for t in case.format.triggers if len(t.tokens) == 1 and t.ignorable)
    for machine, step, was in run(case):
        expected: list[int] = []
        if step.forced and not machine.queue and machine.writing == "extension":
            expected = single
        elif was == "thinking" and machine.phase == "answer":
            expected = sorted(case.format.eos_ids)
        assert list(machine.banned) == expected


def test_a_prompt_is_read_at_its_end_only() -> None:
    for prompt, phase in [([100], "thinking"), ([100, 10, 10], "thinking"), ([100, 5], "before"), ([], "before")]:
        assert Machine(R1, ThinkingBudget(), prompt).phase == phase


def test_a_start_marker_may_hold_a_newline() -> None:
    format = dataclasses.replace(R1, start=[100, 10])
    assert Machine(format, ThinkingBudget(), [100, 10, 10]).phase == "thinking"
    machine = Machine(format, ThinkingBudget(), [100])
    machine.step(10)
    assert machine.phase == "thinking"


def test_a_finished_request_stays_as_it_is() -> None:
    machine = Machine(R1, ThinkingBudget(max_tokens=0, on_budget="truncate"), [100])
    assert machine.step(200) == Step(0, None, False, ("truncated",))
    assert machine.step(200) == Step(0, None, False)
    assert machine.output == []


def test_string_extensions_need_a_tokenizer_only_where_they_can_be_used() -> None:
    assert simulate(R1, ThinkingBudget(max_tokens=1), [100], [200, 201]).output == [200, 101]
    with pytest.raises(ValueError, match=r"'Wait'.*tokenizer"):
        simulate(R1, ThinkingBudget(ignore_end=1), [100], [200])
