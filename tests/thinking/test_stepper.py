"""The choice of implementation, and what the front door refuses."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

from s1engine.thinking import ThinkingBudget, ThinkingFormat, Trigger, native_step, stepper
from s1engine.thinking.layout import PROGRAM_WIDTH, STATE_WIDTH, Flag
from s1engine.thinking.native_step import NativeLibraryError
from s1engine.thinking.program import compile_program, initial_state

FORMAT = ThinkingFormat(start=[100], triggers=[Trigger([101], [101])], forced_close=[101], eos_ids=[2])


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    stepper._chosen.cache_clear()
    native_step.load.cache_clear()
    yield
    stepper._chosen.cache_clear()
    native_step.load.cache_clear()


def slots(count: int) -> tuple[Any, Any]:
    programs = np.repeat(compile_program(FORMAT)[None], count, axis=0)
    return programs, np.stack([initial_state(programs[0], FORMAT, ThinkingBudget(max_tokens=2), [100])] * count)


def ints(*values: int) -> Any:
    return np.array(values, dtype=np.int32)


def test_only_the_named_rows_are_stepped(any_step: Callable[..., Any]) -> None:
    programs, states = slots(4)
    before = states.copy()
    assert any_step(programs, states, ints(3, 1), ints(200, 101)).tolist() == [
        [0, 200, 0, 0],
        [0, 101, Flag.CLOSED_NATURAL, 0],
    ]
    assert (states[[0, 2]] == before[[0, 2]]).all()
    assert (states[[1, 3]] != before[[1, 3]]).any(axis=1).all()


def test_a_finished_row_stays_as_it_is(any_step: Callable[..., Any]) -> None:
    programs, states = slots(1)
    for token, result in [(101, [0, 101, 8, 0]), (2, [0, 2, 2, 0]), (200, [0, -1, 2, 0])]:
        assert any_step(programs, states, ints(0), ints(token)).tolist() == [result]
    after = states.copy()
    any_step(programs, states, ints(0), ints(5))
    assert (states == after).all()


def test_nothing_to_step(any_step: Callable[..., Any]) -> None:
    programs, states = slots(2)
    assert any_step(programs, states, ints(), ints()).shape == (0, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"programs": np.zeros((2, PROGRAM_WIDTH), dtype=np.int64)}, r"programs is int64 \[2, 2048\]"),
        ({"programs": np.zeros((2, 7), dtype=np.int32)}, r"programs is int32 \[2, 7\]"),
        ({"states": np.zeros((3, STATE_WIDTH), dtype=np.int32)}, r"states is .*\[3, 32\].*valid is int32 \[2, 32\]"),
        ({"states": np.zeros((STATE_WIDTH, 2), dtype=np.int32).T}, r"C-contiguous: False"),
        ({"rows": ints(2)}, r"rows=\[2\].*0 to 1"),
        ({"rows": ints(-1)}, r"rows=\[-1\]"),
        ({"sampled": ints(1, 2)}, r"sampled is int32 \[2\].*valid is int32 \[1\]"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    programs, states = slots(2)
    arguments = {"programs": programs, "states": states, "rows": ints(0), "sampled": ints(5), **changes}
    with pytest.raises(ValueError, match=message):
        stepper.step(**arguments)


@pytest.mark.usefixtures("fresh_choice")
def test_without_the_library_python_steps_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("S1ENGINE_DISABLE_CSRC", raising=False)
    monkeypatch.setattr(native_step, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            programs, states = slots(1)
            assert stepper.step(programs, states, ints(0), ints(200))[0, 1] == 200
    assert stepper.implementation() == "table"
    assert ["was not built" in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.usefixtures("fresh_choice")
def test_a_library_of_another_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("s1engine._native") is None:
        pytest.skip("s1engine._native was not built")
    monkeypatch.setattr(native_step, "LAYOUT_VERSION", 999)
    with pytest.raises(NativeLibraryError, match=r"s1_thinking_layout_version is 1, not 999\); build it again"):
        native_step.load()


def test_the_environment_forces_python() -> None:
    source = "from s1engine.thinking.stepper import implementation; print(implementation())"
    environment = {**os.environ, "S1ENGINE_DISABLE_CSRC": "1"}
    done = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["table"]
    assert done.stderr == ""


def test_importing_thinking_imports_neither_transformers_nor_torch() -> None:
    source = "import sys, s1engine.thinking.stepper; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
