"""The compiled rows: what is shared, what is refused, and what a host reads and writes in them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from s1engine.thinking import ThinkingBudget, ThinkingFormat, Trigger
from s1engine.thinking.automata import TriggerAutomaton
from s1engine.thinking.layout import PROGRAM_WIDTH, STATE_WIDTH, Ban, Flag, Out, Phase, State
from s1engine.thinking.program import banned_ids, compile_program, initial_state
from s1engine.thinking.table_step import _ends_line

R1 = ThinkingFormat(
    start=[100, 7],
    triggers=[Trigger([101], [101]), Trigger([2], [101]), Trigger([70], [70], False), Trigger([60, 61], [60, 61])],
    forced_close=[101, 10, 50],
    separator=[10],
    newline_ids=[10],
    eos_ids=[3, 2],
)


def test_programs_are_shared_between_budgets_that_differ_in_numbers() -> None:
    again = dataclasses.replace(R1, triggers=list(R1.triggers))
    assert compile_program(R1, ((90,),)) is compile_program(again, ((90,),))
    assert compile_program(R1).shape == (PROGRAM_WIDTH,)
    assert compile_program(R1).dtype == np.int32
    with pytest.raises(ValueError, match="read-only"):
        compile_program(R1)[0] = 1


def test_what_does_not_fit_is_refused_with_its_size() -> None:
    long = dataclasses.replace(R1, forced_close=range(1500))
    with pytest.raises(ValueError, match=r"needs 3\d\d\d integers, 1\d\d\d more than the 2048.*\(forced_close 3001, "):
        compile_program(long)
    with pytest.raises(ValueError, match=r"newline_ids has 70000 ids: .*65535"):
        compile_program(dataclasses.replace(R1, newline_ids=range(70000)))


def test_banned_ids_ascend() -> None:
    program = compile_program(R1)
    assert banned_ids(program, Ban.NOTHING) == ()
    assert banned_ids(program, Ban.TRIGGERS) == (2, 101)  # 70 may not be ignored, 60 61 is no single token
    assert banned_ids(program, Ban.EOS) == (2, 3)


@pytest.mark.parametrize("count", [0, 1, 5, 2000])
def test_newline_ids_are_found(count: int) -> None:
    rng = np.random.default_rng(count)
    ids = {int(token) for token in rng.choice(160_000, count, replace=False)} | ({255, 256, 511} if count else set())
    program = memoryview(compile_program(dataclasses.replace(R1, newline_ids=sorted(ids, reverse=True))))
    near = {token + shift for token in ids for shift in (-256, -1, 0, 1, 256)} | set(range(1024)) | {2**31 - 1, -1}
    assert {token for token in near if _ends_line(program, token)} == ids


def test_initial_state() -> None:
    budget = ThinkingBudget(max_tokens=5, min_tokens=1, ignore_end=2, grace_tokens=3, extensions=[[90]])
    program = compile_program(R1, ((90,),))
    state = initial_state(program, R1, budget, [100, 7, 10, 10])
    assert (state.shape, state.dtype) == ((STATE_WIDTH,), np.int32)
    assert state[State.PHASE] == Phase.THINKING
    limits = [State.MAX_TOKENS, State.MIN_TOKENS, State.IGNORE_END, State.GRACE_TOKENS]
    assert state[limits].tolist() == [5, 1, 2, 3]
    begun = initial_state(program, R1, ThinkingBudget(), [5, 100])
    assert begun[[State.PHASE, State.START_STATE, State.MAX_TOKENS]].tolist() == [Phase.BEFORE, 1, -1]
    with pytest.raises(ValueError, match="compiled with its extensions"):
        initial_state(compile_program(R1), R1, budget, [100])


def test_answer_now(any_step: Callable[..., Any]) -> None:
    """A host that sets the limit to 0 between two steps closes the thinking at the next position."""
    programs = compile_program(R1)[None].copy()
    states = initial_state(programs[0], R1, ThinkingBudget(), [100, 7])[None]
    row = np.zeros(1, dtype=np.int32)

    def feed(token: int) -> list[int]:
        return any_step(programs, states, row, np.array([token], dtype=np.int32))[0].tolist()

    assert feed(200) == [0, 200, 0, 0]
    states[0, State.MAX_TOKENS] = 0
    assert feed(201) == [0, 10, Flag.FORCED | Flag.CLOSED_BUDGET, 0]
    assert [feed(202)[Out.TOKEN] for _ in range(4)] == [101, 10, 50, 202]


def test_a_raised_ignore_end_is_harmless_without_extensions(any_step: Callable[..., Any]) -> None:
    programs = compile_program(R1)[None].copy()
    states = initial_state(programs[0], R1, ThinkingBudget(), [100, 7])[None]
    states[0, State.IGNORE_END] = 4
    out = any_step(programs, states, np.zeros(1, dtype=np.int32), np.array([101], dtype=np.int32))
    assert out[0].tolist() == [0, 101, Flag.CLOSED_NATURAL, 0]


def test_tokens_that_no_trigger_tells_apart_share_a_symbol() -> None:
    spellings = [Trigger([a, 50, b], [a, 50, b]) for a in range(10) for b in range(20, 30)]
    automaton = TriggerAutomaton.build([*spellings, Trigger([2], [9, 50, 29])])
    assert set(automaton.symbols.values()) == {1, 2, 3, 4}
    assert automaton.symbols[0] == automaton.symbols[9] != automaton.symbols[20] == automaton.symbols[29]
    assert automaton.depths == [0, 1, 2]
    kept_apart = TriggerAutomaton.build([*spellings[1:], Trigger([0, 50, 20], [4])])
    assert kept_apart.symbols[0] != kept_apart.symbols[9]
