"""The thinking state machine in plain Python: the specification that every faster implementation is held to.

It is written to be read, on lists of token ids, with no table and no cleverness. `program.py` compiles the same rules
to integer tables, and `stepper.py` and `csrc/include/s1engine/thinking.h` run them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from s1engine.thinking.budget import ThinkingBudget, resolve_extensions
from s1engine.thinking.formats import ThinkingFormat, Trigger, common_prefix

Phase = Literal["before", "thinking", "answer"]
StopReason = Literal["natural", "budget"]
Event = Literal["started", "ignored", "closed_natural", "closed_budget", "truncated"]


@dataclass
class Trace:
    """What a run of sampled tokens became under a budget.

    Args:
        output: the tokens that stand, after all rewinds.
        forced: parallel to `output`: 1 where the engine wrote the token, 0 where the model sampled it.
        banned: one entry per step, also for steps that were rewound later: the ids banned in its logits, ascending.
        phase: "before", "thinking" or "answer".
        thinking_tokens: tokens inside thinking blocks, extensions included, delimiters not.
        extensions: how many ends were ignored.
        stop_reason: why the last thinking block ended, "natural" or "budget"; None where none has.
        finished: whether an EOS or a truncation ended the request.
        pending: forced tokens that were decided but not yet written.
    """

    output: list[int]
    forced: list[int]
    banned: list[list[int]]
    phase: Phase
    thinking_tokens: int
    extensions: int
    stop_reason: StopReason | None
    finished: bool
    pending: int


@dataclass(frozen=True)
class Step:
    """What one sampled token became.

    Args:
        rewind: how many tokens of the output were taken back first.
        token: the token that stands at this position; None where the request ended without one.
        forced: whether the engine wrote it.
        events: what was decided at this step.
    """

    rewind: int
    token: int | None
    forced: bool
    events: tuple[Event, ...] = ()


@dataclass
class Machine:
    """The state of one request. `step` consumes one sampled token at a time.

    Args:
        format: the delimiters.
        budget: the limits; extensions that may be used must be token ids.
        prompt_ids: only its end matters: whether it opens a thinking block, or begins to.
    """

    format: ThinkingFormat
    budget: ThinkingBudget
    prompt_ids: Sequence[int]

    phase: Phase = "before"
    output: list[int] = field(default_factory=list)
    forced: list[int] = field(default_factory=list)
    thinking_tokens: int = 0
    segment_tokens: int = 0  # thinking tokens sampled since the last extension
    extensions_used: int = 0
    forced_closes: int = 0
    stop_reason: StopReason | None = None
    finished: bool = False
    queue: list[int] = field(default_factory=list)  # decided, not yet written
    writing: Literal["extension", "close"] = "close"  # what the queue holds
    banned: tuple[int, ...] = ()  # at the next position
    block_start: int = 0  # where in the output the current thinking block begins
    window: list[int] = field(default_factory=list)  # tokens that may still become part of a delimiter

    def __post_init__(self) -> None:
        self.extensions = resolve_extensions(self.budget)
        delimiters = [self.format.start, self.format.forced_close]
        delimiters += [ids for trigger in self.format.triggers for ids in (trigger.tokens, trigger.close)]
        self.reach = max(map(len, delimiters))
        if opens_thinking(self.format, self.prompt_ids):
            self._start_block()
        else:
            self.window = marker_tail(self.format, self.prompt_ids)

    @property
    def held(self) -> int:
        """How many of the last output tokens a later step may take back: those that begin a trigger."""
        if self.phase != "thinking" or self.queue or self.finished:
            return 0
        return max(longest_begun(self.window, trigger.tokens) for trigger in self.format.triggers)

    def step(self, x: int) -> Step:
        """Consumes `x`, sampled at the next position. A finished request stays as it is."""
        if self.finished:
            return Step(0, None, False)
        self.banned = ()
        if self.queue:
            return self._write_queued()
        if self.phase != "thinking":
            return self._outside(x)
        trigger = self._completed_trigger(x)
        if trigger is not None:
            return self._end(trigger, x)
        if self._used_up() or self._line_ended_in_grace():
            return self._out_of_budget()
        self._remember(x)
        self.thinking_tokens += 1
        self.segment_tokens += 1
        return self._emit(x)

    def _remember(self, x: int) -> None:
        self.window.append(x)
        del self.window[: -self.reach]

    # 1. A non-empty queue wins, whatever was sampled.
    def _write_queued(self, rewind: int = 0, *events: Event) -> Step:
        token = self.queue.pop(0)
        self.window = []  # a forced token is never part of a delimiter that the model writes
        if self.writing == "extension":
            self.thinking_tokens += 1
        if not self.queue:
            self._queue_written()
        return self._emit(token, rewind, True, *events)

    def _queue_written(self) -> None:
        if self.writing == "extension":
            self.banned = tuple(sorted(t.tokens[0] for t in self.format.triggers if len(t.tokens) == 1 and t.ignorable))
        else:
            self.phase = "answer"
            self.window = []
            self.banned = tuple(sorted(self.format.eos_ids))

    # 2. Before thinking and in the answer, the model writes what it wants.
    def _outside(self, x: int) -> Step:
        self.finished = x in self.format.eos_ids
        self._remember(x)
        step = self._emit(x)
        if ends_with(self.window, self.format.start):
            self._start_block()
            step = Step(0, x, False, ("started",))
        return step

    def _start_block(self) -> None:
        self.phase = "thinking"
        self.block_start = len(self.output)
        self.window = []

    # 3. The model tries to end its thinking.
    def _completed_trigger(self, x: int) -> Trigger | None:
        return longest_trigger(self.format, [*self.window, x])

    def _end(self, trigger: Trigger, x: int) -> Step:
        begun = len(trigger.tokens) - 1  # the trigger's tokens that were written as if they were thinking
        self.thinking_tokens -= begun
        self.segment_tokens -= begun
        if self._may_ignore(trigger):
            self.queue = list(self.extensions[self.extensions_used % len(self.extensions)])
            self.writing = "extension"
            self.extensions_used += 1
            self.segment_tokens = 0
            return self._write_queued(begun, "ignored")
        self.stop_reason = "natural"
        self.writing = "close"
        kept = common_prefix(trigger.tokens, trigger.close)
        self.queue = list(trigger.close[kept:])
        if kept <= begun:  # x itself is not part of the close
            return self._write_queued(begun - kept, "closed_natural")
        if not self.queue:
            self._queue_written()
        return self._emit(x, 0, False, "closed_natural")

    def _may_ignore(self, trigger: Trigger) -> bool:
        wanted = self.extensions_used < self.budget.ignore_end or self.thinking_tokens < self.budget.min_tokens
        if not (trigger.ignorable and wanted) or self._used_up():
            return False
        if self.budget.max_tokens is None or self.budget.scope == "segment":
            return True
        extension = self.extensions[self.extensions_used % len(self.extensions)]
        return self.thinking_tokens + len(extension) < self.budget.max_tokens

    # 4. and 5. The budget is used up, or nearly so at the end of a line.
    def _used(self) -> int:
        return self.segment_tokens if self.budget.scope == "segment" else self.thinking_tokens

    def _used_up(self) -> bool:
        return self.budget.max_tokens is not None and self._used() >= self.budget.max_tokens

    def _line_ended(self) -> bool:
        return len(self.output) > self.block_start and self.output[-1] in self.format.newline_ids

    def _line_ended_in_grace(self) -> bool:
        max_tokens, grace = self.budget.max_tokens, self.budget.grace_tokens
        return max_tokens is not None and self._used() >= max_tokens - grace and self._line_ended()

    def _out_of_budget(self) -> Step:
        self.stop_reason = "budget"
        if self.budget.on_budget == "truncate":
            self.finished = True
            return Step(0, None, False, ("truncated",))
        close = self.format.forced_close if self.forced_closes == 0 else self.format.triggers[0].close
        self.forced_closes += 1
        kept = longest_begun(self.window, close)
        self.thinking_tokens -= kept
        self.segment_tokens -= kept
        separator = () if kept or self._line_ended() else self.format.separator
        self.queue = [*separator, *close[kept:]]
        self.writing = "close"
        return self._write_queued(0, "closed_budget")

    # 6. and the end of every step: one token stands.
    def _emit(self, token: int, rewind: int = 0, forced: bool = False, *events: Event) -> Step:
        if rewind:
            del self.output[-rewind:], self.forced[-rewind:]
        self.output.append(token)
        self.forced.append(int(forced))
        return Step(rewind, token, forced, events)


def simulate(
    format: ThinkingFormat, budget: ThinkingBudget, prompt_ids: Sequence[int], sampled_ids: Sequence[int]
) -> Trace:
    """What `sampled_ids`, sampled after `prompt_ids`, would have become under `budget`: the machine with no model.

    The ids are taken as they stand, banned or not; those after the end of the request are not looked at.

    Raises:
        ValueError: where an extension that the budget may use is a string (token ids are needed here).
    """
    machine = Machine(format, budget, prompt_ids)
    banned: list[list[int]] = []
    for x in sampled_ids:
        if machine.finished:
            break
        banned.append(list(machine.banned))
        machine.step(x)
    return Trace(
        output=machine.output,
        forced=machine.forced,
        banned=banned,
        phase=machine.phase,
        thinking_tokens=machine.thinking_tokens,
        extensions=machine.extensions_used,
        stop_reason=machine.stop_reason,
        finished=machine.finished,
        pending=len(machine.queue),
    )


def opens_thinking(format: ThinkingFormat, prompt_ids: Sequence[int]) -> bool:
    """Whether the prompt ends in the start marker, newline tokens after it being skipped."""
    newline_ids = format.newline_set
    end = len(prompt_ids)
    while True:
        if ends_with(prompt_ids, format.start, end):
            return True
        if end == 0 or prompt_ids[end - 1] not in newline_ids:
            return False
        end -= 1


def marker_tail(format: ThinkingFormat, prompt_ids: Sequence[int]) -> list[int]:
    """The end of the prompt that may hold the first part of a start marker."""
    reach = len(format.start) - 1
    return list(prompt_ids[max(0, len(prompt_ids) - reach) :])


def longest_trigger(format: ThinkingFormat, ids: Sequence[int]) -> Trigger | None:
    """The longest trigger that `ids` ends with."""
    complete = (format.trigger_of.get(tuple(ids[-length:])) for length in format.trigger_lengths)
    return next((trigger for trigger in complete if trigger is not None), None)


def ends_with(ids: Sequence[int], suffix: Sequence[int], end: int | None = None) -> bool:
    """Whether `ids[:end]` ends with `suffix`."""
    end = len(ids) if end is None else end
    return end >= len(suffix) and tuple(ids[end - len(suffix) : end]) == tuple(suffix)


def longest_begun(ids: Sequence[int], delimiter: Sequence[int]) -> int:
    """The length of the longest proper prefix of `delimiter` that `ids` ends with."""
    return next(n for n in range(len(delimiter) - 1, -1, -1) if n == 0 or ends_with(ids, delimiter[:n]))
