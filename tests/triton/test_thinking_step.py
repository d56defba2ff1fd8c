"""The thinking step in Triton: the conformance cases, random ones, and long tables against the step in Python."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from thinking_cases import by_reference, by_stepper, draw_cases, load_conformance

from s1engine.kernels.thinking_step_triton import OPTIONS, ROWS_PER_PROGRAM, step_slots, step_slots_kernel
from s1engine.thinking import ThinkingBudget, ThinkingFormat, Trigger, resolve_extensions
from s1engine.thinking.layout import OUT_WIDTH, PROGRAM_WIDTH, STATE_WIDTH, Flag, Phase, State
from s1engine.thinking.program import compile_program, initial_state
from s1engine.thinking.table_step import table_step

Array = npt.NDArray[np.int32]
Step = Callable[[Array, Array, Array, Array], Array]
POISON = 77_777_777


def ints(values: Any) -> Array:
    return np.array(values, dtype=np.int32)


def stepper(device: torch.device, rows_per_program: int) -> Step:
    """`step_slots` on arrays, as the other steppers have it."""

    def step(programs: Array, states: Array, rows: Array, sampled: Array) -> Array:
        on_device = [torch.tensor(array, device=device) for array in (programs, states, rows, sampled)]
        out = step_slots(*on_device, rows_per_program=rows_per_program)
        states[:] = on_device[1].cpu().numpy()
        return out.cpu().numpy()

    return step


@pytest.fixture
def step(device: torch.device, real_sizes: bool) -> Step:
    """In the interpreter, where a program costs the same whatever its rows, all rows lie in one."""
    return stepper(device, ROWS_PER_PROGRAM if real_sizes else 1024)


def middles(seed: int, count: int) -> tuple[Array, Array, Array]:
    """(programs, states, sampled): random cases as they stand after some of their samples, and the next of each."""
    rng = np.random.default_rng(seed)
    cases = [case for case in draw_cases(seed, 2 * count) if case.sampled][:count]
    programs = np.zeros((len(cases), PROGRAM_WIDTH), np.int32)
    states = np.zeros((len(cases), STATE_WIDTH), np.int32)
    sampled = np.zeros(len(cases), np.int32)
    for i, case in enumerate(cases):
        budget = case.budget
        programs[i] = compile_program(case.format, resolve_extensions(budget), budget.scope, budget.on_budget)
        states[i] = initial_state(programs[i], case.format, budget, case.prompt)
        done = int(rng.integers(len(case.sampled)))
        for token in case.sampled[:done]:
            table_step(programs, states, ints([i]), ints([token]))
        sampled[i] = case.sampled[done]
    return programs, states, sampled


def check_against_python(step: Step, programs: Array, states: Array, sampled: Array) -> Array:
    """Steps all slots, in another order than they lie in; returns what Python yields for each, as they lie."""
    rows = np.random.default_rng(4).permutation(len(states)).astype(np.int32)
    expected_states, found_states = states.copy(), states.copy()
    expected = table_step(programs, expected_states, rows, sampled[rows])
    found = step(programs, found_states, rows, sampled[rows])
    assert found.tolist() == expected.tolist()
    assert found_states.tolist() == expected_states.tolist()
    return expected[np.argsort(rows)]


def test_conformance(step: Step) -> None:
    cases = load_conformance()
    replayed = by_stepper(step, [case for _, case, _ in cases])
    for (name, _, expect), got in zip(cases, replayed, strict=True):
        got.pop("steps")
        assert got == expect, name


def check_random(step: Step, seed: int, count: int) -> None:
    cases = draw_cases(seed, count)
    for begin in range(0, count, 1000):
        chunk = cases[begin : begin + 1000]
        for case, got in zip(chunk, by_stepper(step, chunk, seed=begin), strict=True):
            assert got == by_reference(case), case


def test_random_cases(step: Step) -> None:
    check_random(step, seed=1000, count=1000)


@pytest.mark.slow
def test_10_000_random_cases(step: Step) -> None:
    check_random(step, seed=10_000, count=10_000)


def test_every_column_of_the_state(step: Step) -> None:
    """A replay looks at what comes out; this at all that is kept, held tokens of a truncated request among it."""
    out = check_against_python(step, *middles(seed=10, count=1000))
    assert all(((out[:, 2] & flag) != 0).sum() > 5 for flag in Flag)


def test_block_length_changes_nothing(device: torch.device) -> None:
    programs, states, sampled = middles(seed=11, count=70)
    assert len(set(states[:, State.PHASE].tolist())) == 3 and states[:, State.PENDING].any()
    outcomes = []
    for rows_per_program in (1, 64):  # the last of the two blocks of 64 has 6 rows
        after = states.copy()
        out = stepper(device, rows_per_program)(programs, after, np.arange(70, dtype=np.int32), sampled)
        outcomes.append((out.tolist(), after.tolist()))
    assert outcomes[0] == outcomes[1]


def test_only_the_named_rows_are_stepped(device: torch.device) -> None:
    programs, states, sampled = middles(seed=12, count=6)
    states[:, State.FINISHED] = 0
    states[:, State.GRACE_TOKENS + 1 :] = POISON  # columns that no stepper knows
    expected = states.copy()
    slots = ints([4, 1, 3])
    expected_out = table_step(programs, expected, slots, sampled[slots])

    named = [4, 1, 3, 0, -1, 2, 5, POISON]  # those from the fourth on lie past the count
    arrays = (programs, states, ints(named), ints([sampled[slot % 6] for slot in named]))
    on_device = [torch.tensor(array, device=device) for array in arrays]
    out = torch.full((8, OUT_WIDTH), POISON, dtype=torch.int32, device=device)
    step_slots_kernel[(2,)](*on_device, out, len(slots), BLOCK=4, **OPTIONS)
    found = on_device[1]
    assert found.tolist() == expected.tolist()
    assert out[:3].tolist() == expected_out.tolist()
    assert (out[3:] == POISON).all()


def test_a_finished_row_stays_as_it_is(device: torch.device) -> None:
    programs, states, sampled = middles(seed=13, count=40)
    states[:, State.FINISHED] = 1
    found = states.copy()
    out = stepper(device, 64)(programs, found, np.arange(40, dtype=np.int32), sampled)
    assert out.tolist() == [[0, -1, Flag.FINISHED, 0]] * 40
    assert found.tolist() == states.tolist()


def test_nothing_to_step(step: Step) -> None:
    programs, states, _ = middles(seed=14, count=2)
    before = states.copy()
    assert step(programs, states, ints([]), ints([])).shape == (0, OUT_WIDTH)
    assert states.tolist() == before.tolist()


def repeated(program: Array, state: Array, count: int) -> tuple[Array, Array]:
    return np.repeat(program[None], count, axis=0), np.repeat(state[None], count, axis=0)


def test_newlines_of_a_large_vocabulary(step: Step) -> None:
    """In the grace, the last token decides: thousands of ids, a full page of them, empty ones, and neighbours."""
    rng = np.random.default_rng(5)
    newlines = {0, 255, 151_700, *range(512, 768), *rng.choice(range(1024, 150_000), 5000, replace=False).tolist()}
    format = ThinkingFormat(
        start=[100], triggers=[Trigger([101], [101])], forced_close=[101], newline_ids=sorted(newlines)
    )
    budget = ThinkingBudget(max_tokens=100, grace_tokens=50)
    program = compile_program(format)
    assert len(newlines) == 5259
    chosen = [0, 255, *range(508, 772), *range(151_700, 152_200), *rng.choice(sorted(newlines), 300).tolist()]
    last = ints(sorted({token + offset for token in chosen for offset in (-1, 0, 1, 256)} | {2**31 - 1}))
    programs, states = repeated(program, initial_state(program, format, budget, [100]), len(last))
    states[:, State.THINKING_TOKENS] = states[:, State.SEGMENT_TOKENS] = 60
    states[:, State.LAST_TOKEN] = last
    out = check_against_python(step, programs, states, np.full(len(last), 7, np.int32))
    assert [bool(flags & Flag.CLOSED_BUDGET) for flags in out[:, 2]] == [token in newlines for token in last.tolist()]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 255, 1023, 1024, 1900])
def test_eos_ids_of_any_number(step: Step, count: int) -> None:
    eos_ids = list(range(3, 3 + 2 * count, 2))
    format = ThinkingFormat(start=[1], triggers=[Trigger([2], [2])], forced_close=[2], eos_ids=eos_ids)
    program = compile_program(format)
    sampled = np.arange(3 + 2 * count + 2, dtype=np.int32)
    programs, states = repeated(program, initial_state(program, format, ThinkingBudget(), []), len(sampled))
    states[:, State.PHASE] = Phase.ANSWER
    out = check_against_python(step, programs, states, sampled)
    assert np.flatnonzero(out[:, 2] & Flag.FINISHED).tolist() == eos_ids


def test_many_triggers(step: Step) -> None:
    """An alphabet of 600 tokens, most of them in triggers of one."""
    tokens = range(1000, 2200, 2)
    format = ThinkingFormat(start=[1], triggers=[Trigger([t], [t]) for t in tokens], forced_close=[2])
    program = compile_program(format)
    sampled = np.arange(999, 2203, dtype=np.int32)
    programs, states = repeated(program, initial_state(program, format, ThinkingBudget(), [1]), len(sampled))
    out = check_against_python(step, programs, states, sampled)
    assert sampled[(out[:, 2] & Flag.CLOSED_NATURAL) != 0].tolist() == list(tokens)


def test_a_close_that_falls_back_far(step: Step) -> None:
    """Of 5, 5, ..., 5, 6 most is matched: another token falls back step by step, some rows further than others."""
    format = ThinkingFormat(
        start=[5] * 40 + [6], triggers=[Trigger([9], [5, 5, 6] * 20 + [7])], forced_close=[5] * 60 + [6], separator=[8]
    )
    program = compile_program(format)
    tokens = [5, 6, 7, 8, 9]
    matched = np.repeat(np.arange(60), len(tokens))
    programs, states = repeated(
        program, initial_state(program, format, ThinkingBudget(max_tokens=200), []), len(matched)
    )
    states[:, State.PHASE] = Phase.THINKING
    states[:, State.FORCED_CLOSE_STATE] = states[:, State.SECOND_CLOSE_STATE] = matched
    sampled = ints(tokens * 60)
    check_against_python(step, programs, states, sampled)

    states[:, State.PHASE] = Phase.BEFORE
    states[:, State.START_STATE] = np.minimum(matched, 40)
    out = check_against_python(step, programs, states, sampled)
    assert (out[:, 2] & Flag.STARTED).any()


def test_slots_far_apart(device: torch.device, real_sizes: bool) -> None:
    if not real_sizes:
        pytest.skip("8 GiB of programs: on a GPU only")
    programs, states, sampled = middles(seed=15, count=1)
    slot = 2**31 // PROGRAM_WIDTH  # its first integer is out of reach of an int32
    many_programs = torch.zeros((slot + 1, PROGRAM_WIDTH), dtype=torch.int32, device=device)
    many_states = torch.zeros((slot + 1, STATE_WIDTH), dtype=torch.int32, device=device)
    many_programs[slot], many_states[slot] = torch.tensor(programs[0]), torch.tensor(states[0])
    expected = table_step(programs, states, ints([0]), sampled)
    slots = torch.tensor([slot], dtype=torch.int32, device=device)
    out = step_slots(many_programs, many_states, slots, torch.tensor(sampled, device=device))
    assert out.tolist() == expected.tolist()
    assert many_states[slot].tolist() == states[0].tolist()
