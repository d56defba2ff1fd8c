"""Where the thinking is in an output that no machine touched: what a request without a budget reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from s1engine.thinking.formats import ThinkingFormat, Trigger, common_prefix
from s1engine.thinking.machine import ends_with, longest_trigger, marker_tail, opens_thinking


@dataclass(frozen=True)
class ThinkingSpans:
    """The parts of an output.

    Args:
        thinking: [start, end) of each thinking block within the output, delimiters left out.
        answer_start: where the answer begins: after the last close; 0 without thinking, the length while it is open.
        open: whether the output ends inside a thinking block.
    """

    thinking: tuple[tuple[int, int], ...]
    answer_start: int
    open: bool

    @property
    def num_tokens(self) -> int:
        """Thinking tokens, as the machine counts them."""
        return sum(end - start for start, end in self.thinking)


def split_thinking(format: ThinkingFormat, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> ThinkingSpans:
    """Splits an output by its delimiters: start marker, then the first trigger, any number of times.

    A prompt that ends in the start marker opens the first block; it may also end in the marker's first part. Of a close
    that goes beyond its trigger (s1 ends thinking by `<|im_start|>` and goes on with "answer"), as much as is there
    belongs to the delimiter. A trigger that is only begun at the end of the output counts as thinking.
    """
    longest = format.trigger_lengths[0]
    thinking = opens_thinking(format, prompt_ids)
    tail = [] if thinking else marker_tail(format, prompt_ids)
    ids = (*tail, *output_ids)
    spans: list[tuple[int, int]] = []
    at, part, answer_start = len(tail), 0, len(tail)  # `part`: where the current part begins, thinking or not
    while at < len(ids):
        at += 1
        if not thinking:
            if at - part >= len(format.start) and ends_with(ids, format.start, at):
                thinking, part = True, at
            continue
        trigger = longest_trigger(format, ids[max(part, at - longest) : at])
        if trigger is not None:
            spans.append((part, at - len(trigger.tokens)))
            at += _rest_of_close(trigger, ids[at : at + len(trigger.close)])
            thinking, part, answer_start = False, at, at
    if thinking:
        spans.append((part, at))
        answer_start = at
    shift = len(tail)
    return ThinkingSpans(tuple((start - shift, end - shift) for start, end in spans), answer_start - shift, thinking)


def _rest_of_close(trigger: Trigger, following: Sequence[int]) -> int:
    """How many of the tokens that follow a trigger belong to a close that goes on after it."""
    if common_prefix(trigger.tokens, trigger.close) < len(trigger.tokens):
        return 0
    return common_prefix(trigger.close[len(trigger.tokens) :], following)
