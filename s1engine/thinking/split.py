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


class Splitter:
    """Splits an output as it grows, a token at a time: start marker, then the first trigger, any number of times.

    A prompt that ends in the start marker opens the first block; it may also end in the marker's first part. Of a close
    that goes beyond its trigger (s1 ends thinking by `<|im_start|>` and goes on with "answer"), as much as is there
    belongs to the delimiter. A trigger that is only begun at the end of the output counts as thinking.
    """

    def __init__(self, format: ThinkingFormat, prompt_ids: Sequence[int]) -> None:
        self._format = format
        self._thinking = opens_thinking(format, prompt_ids)
        self._ids: list[int] = [] if self._thinking else list(marker_tail(format, prompt_ids))
        self._shift = len(self._ids)
        self._part = 0  # where the current part begins, thinking or not
        self._answer_start = self._shift
        self._closed: list[tuple[int, int]] = []
        self._rest: tuple[int, ...] = ()  # of a close whose trigger was complete

    def push(self, token: int) -> None:
        self._ids.append(token)
        at = len(self._ids)
        if self._rest and token == self._rest[0]:
            self._rest = self._rest[1:]
            self._part = self._answer_start = at
            return
        self._rest = ()
        if not self._thinking:
            if at - self._part >= len(self._format.start) and ends_with(self._ids, self._format.start, at):
                self._thinking, self._part = True, at
            return
        window = self._ids[max(self._part, at - self._format.trigger_lengths[0]) :]
        trigger = longest_trigger(self._format, window)
        if trigger is not None:
            self._closed.append((self._part - self._shift, at - len(trigger.tokens) - self._shift))
            self._rest = _rest_of_close(trigger)
            self._thinking, self._part, self._answer_start = False, at, at

    def spans(self) -> ThinkingSpans:
        """The parts of what was pushed so far."""
        if not self._thinking:
            return ThinkingSpans(tuple(self._closed), self._answer_start - self._shift, False)
        end = len(self._ids) - self._shift
        return ThinkingSpans((*self._closed, (self._part - self._shift, end)), end, True)


def split_thinking(format: ThinkingFormat, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> ThinkingSpans:
    """Splits a whole output by its delimiters, as `Splitter` does."""
    splitter = Splitter(format, prompt_ids)
    for token in output_ids:
        splitter.push(token)
    return splitter.spans()


def _rest_of_close(trigger: Trigger) -> tuple[int, ...]:
    """What a close has after its trigger, where it goes on after it."""
    if common_prefix(trigger.tokens, trigger.close) < len(trigger.tokens):
        return ()
    return tuple(trigger.close[len(trigger.tokens) :])
