"""The engine's side of a thinking budget: from a request's parameters to a machine, and the records kept of it.

The machine itself (s1engine.thinking) decides about tokens. Here is only what it cannot know: the room that a request
has left, and what its owner will want to read afterwards.
"""

from __future__ import annotations

from s1engine.engine.request import Sequence, ThinkingRecord
from s1engine.engine.slots import SlotTable
from s1engine.kernels.slot_step import thinking_cap
from s1engine.outputs import ThinkingEvent
from s1engine.thinking import ThinkingBudget, ThinkingFormat
from s1engine.thinking.layout import Flag, Phase, State
from s1engine.thinking.program import compile_program, initial_state

# Plain integers: `&` on an enum member takes a microsecond, and this is done for every token.
STARTED, IGNORED = int(Flag.STARTED), int(Flag.IGNORED)
CLOSED_NATURAL, CLOSED_BUDGET, TRUNCATED = int(Flag.CLOSED_NATURAL), int(Flag.CLOSED_BUDGET), int(Flag.TRUNCATED)
EVENTS = {STARTED: "started", IGNORED: "ignored", CLOSED_NATURAL: "natural", CLOSED_BUDGET: "budget"}
ANY_EVENT = STARTED | IGNORED | CLOSED_NATURAL | CLOSED_BUDGET | TRUNCATED
THINKING, ANSWER = int(Phase.THINKING), int(Phase.ANSWER)


def start_thinking(
    budget: ThinkingBudget,
    fmt: ThinkingFormat,
    extensions: tuple[tuple[int, ...], ...],
    prompt_ids: list[int],
    limit: int,
) -> ThinkingRecord:
    """A machine for a sequence that may grow to `limit` tokens, its prompt included.

    fmt and extensions are in token ids. Raises ValueError where min_answer_tokens leaves no room to think in.
    """
    program = compile_program(fmt, extensions, budget.scope, budget.on_budget)
    state = initial_state(program, fmt, budget, prompt_ids)
    reserve = 0
    if budget.min_answer_tokens:
        close = max(len(fmt.forced_close), *(len(trigger.close) for trigger in fmt.triggers))
        reserve = len(fmt.separator) + close + budget.min_answer_tokens
        if budget.scope == "segment" and extensions:
            reserve += max(map(len, extensions))  # not counted by the cap there, yet it takes room
        room = limit - len(prompt_ids)
        if room < reserve:
            raise ValueError(
                f"thinking.min_answer_tokens={budget.min_answer_tokens}: with the {reserve - budget.min_answer_tokens} "
                f"tokens that close the thinking it needs {reserve}, but max_tokens and the context leave {room}; "
                "raise max_tokens, shorten the prompt or lower min_answer_tokens"
            )
    record = ThinkingRecord(
        format=fmt,
        program=program,
        state=state,
        user_cap=budget.max_tokens,
        reserve=reserve,
        opened_by_prompt=int(state[State.PHASE]) == THINKING,
        may_end=bool(fmt.eos_ids) or budget.on_budget == "truncate",
    )
    if reserve:
        cap = -1 if budget.max_tokens is None else budget.max_tokens
        state[State.MAX_TOKENS] = thinking_cap(program, state, limit - len(prompt_ids), reserve, cap)
    return record


def update_thinking(seq: Sequence, flags: int, count: int, phase: int, wrote: bool) -> None:
    """Record what the machine did at this step; `wrote`: it put a token at the sequence's last position."""
    record = seq.thinking
    assert record is not None
    position = seq.num_output - (1 if wrote else 0)
    if wrote:
        record.counts.append(count)
        _extend_spans(record.spans, position, count)
    if flags & ANY_EVENT:
        _record_events(record, flags, position)
    if phase == ANSWER and record.answer_start is None:
        record.answer_start = seq.num_output


def extend_thinking(seq: Sequence, counts: list[int]) -> None:
    """Record sampled tokens at which nothing happened but, perhaps, one more thinking token each.

    counts  thinking tokens after each of them; the sequence has them already
    """
    record = seq.thinking
    assert record is not None
    thought = counts[-1] - (record.counts[-1] if record.counts else 0)
    record.counts += counts
    if thought:
        end = seq.num_output
        if record.spans and record.spans[-1][1] == end - thought:
            record.spans[-1] = (record.spans[-1][0], end)
        else:
            record.spans.append((end - thought, end))


def cut_thinking(seq: Sequence) -> None:
    """Forget what was decided at tokens that a stop condition, looked at late, has cut off."""
    record = seq.thinking
    if record is None:
        return
    record.spans = []
    for position, count in enumerate(record.counts):
        _extend_spans(record.spans, position, count)
    record.events = [event for event in record.events if event.position < seq.num_output]
    closes = [event.kind for event in record.events if event.kind in ("natural", "budget")]
    record.stop_reason = closes[-1] if closes else None
    if record.answer_start is not None and record.answer_start > seq.num_output:
        record.answer_start = None


def _extend_spans(spans: list[tuple[int, int]], position: int, count: int) -> None:
    """Let `spans` hold the `count` thinking tokens there are after the token at `position`.

    Tokens from `position` on were taken back. A lower count than before says that the newest thinking tokens have
    become part of a delimiter; a higher one, that the token at `position` is a thinking token.
    """
    while spans and spans[-1][1] > position:
        start, _ = spans.pop()
        if start < position:
            spans.append((start, position))
    total = sum(end - start for start, end in spans)
    while total > count:
        start, end = spans.pop()
        if total - (end - start) < count:
            spans.append((start, end - (total - count)))
            break
        total -= end - start
    if count > total:
        if spans and spans[-1][1] == position:
            spans[-1] = (spans[-1][0], position + 1)
        else:
            spans.append((position, position + 1))


def _record_events(record: ThinkingRecord, flags: int, position: int) -> None:
    for flag, kind in EVENTS.items():
        if flags & flag:
            record.events.append(ThinkingEvent(kind, position))
    if flags & STARTED:
        record.answer_start = None
    if flags & CLOSED_NATURAL:
        record.stop_reason = "natural"
    elif flags & (CLOSED_BUDGET | TRUNCATED):
        record.stop_reason = "budget"


def answer_now(seq: Sequence, slots: SlotTable) -> None:
    """Let the sequence close its thinking at its next position: from here on its budget is used up."""
    if seq.thinking is None:
        raise ValueError("only a request with a thinking budget (ThinkingBudget() will do) can be told to answer now")
    seq.thinking.user_cap = 0
    if seq.slot >= 0:
        slots.close_thinking(seq.slot)
    else:
        seq.thinking.state[State.MAX_TOKENS] = 0
