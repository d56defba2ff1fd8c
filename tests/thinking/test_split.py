"""Thinking in outputs that no machine touched."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s1engine.thinking import ThinkingBudget, ThinkingFormat, ThinkingSpans, Trigger, simulate, split_thinking

R1 = ThinkingFormat(start=[100], triggers=[Trigger([101], [101])], forced_close=[101], newline_ids=[10], eos_ids=[2])
S1 = ThinkingFormat(
    start=[110, 26],
    triggers=[Trigger([110], [110, 27, 28]), Trigger([112], [110, 27, 28])],
    forced_close=[110, 27],
    newline_ids=[10],
    eos_ids=[112],
)
PAIR = ThinkingFormat(
    start=[80, 81],
    triggers=[Trigger([82, 83], [82, 83]), Trigger([86, 82, 83], [86, 82, 83])],
    forced_close=[82, 83],
)


@pytest.mark.parametrize(
    ("format", "prompt", "output", "thinking", "answer_start", "is_open"),
    [
        pytest.param(R1, [5], [7, 8], [], 0, False, id="none"),
        pytest.param(R1, [100, 10], [7, 8, 101, 9], [(0, 2)], 3, False, id="opened by the prompt"),
        pytest.param(R1, [100], [], [(0, 0)], 0, True, id="nothing yet"),
        pytest.param(R1, [100], [7, 8], [(0, 2)], 2, True, id="still open"),
        pytest.param(R1, [5], [7, 100, 8, 101, 9], [(2, 3)], 4, False, id="opened by the model"),
        pytest.param(R1, [100], [101, 7, 100, 8, 101], [(0, 0), (3, 4)], 5, False, id="two blocks"),
        pytest.param(R1, [100], [7, 101, 9, 100, 8], [(0, 1), (4, 5)], 5, True, id="open again"),
        pytest.param(R1, [100, 5], [7, 101, 9], [], 0, False, id="start earlier in the prompt only"),
        pytest.param(S1, [110], [26, 7, 110, 27, 28, 9], [(1, 2)], 5, False, id="marker over the border, long close"),
        pytest.param(S1, [110, 26], [7, 110, 27, 9], [(0, 1)], 3, False, id="part of the close"),
        pytest.param(S1, [110, 26], [7, 112], [(0, 1)], 2, False, id="closed by EOS"),
        pytest.param(PAIR, [80, 81], [7, 86, 82, 83, 9], [(0, 1)], 4, False, id="the longest trigger"),
        pytest.param(PAIR, [80, 81], [83, 7, 82], [(0, 3)], 3, True, id="a trigger that is only begun"),
        pytest.param(PAIR, [80, 81, 82], [83, 7], [], 0, False, id="no trigger over the border"),
    ],
)
def test_split(
    format: ThinkingFormat, prompt: list[int], output: list[int], thinking: Any, answer_start: int, is_open: bool
) -> None:
    assert split_thinking(format, prompt, output) == ThinkingSpans(tuple(thinking), answer_start, is_open)


prompts = st.sampled_from([[100], [5], [100, 10]])
outputs = st.lists(st.sampled_from([7, 10, 100, 101]), max_size=30)


@given(prompt=prompts, sampled=outputs)
def test_it_agrees_with_a_machine_that_changes_nothing(prompt: list[int], sampled: list[int]) -> None:
    trace = simulate(R1, ThinkingBudget(), prompt, sampled)
    assert trace.output == sampled
    spans = split_thinking(R1, prompt, sampled)
    assert (spans.num_tokens, spans.open) == (trace.thinking_tokens, trace.phase == "thinking")
