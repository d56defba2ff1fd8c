"""The thinking state machine on a GPU: `s1engine/thinking/table_step.py`, one step of many slots at once.

`thinking_step` is a device function over a block of rows, for the end of a sampling kernel; `step_slots` launches it
alone. Rows of one block are in different rules of the machine, so every rule is computed for all of them under a mask:
a load whose row is not in the rule costs no memory access, and a state column takes the value of the one rule that
applies.
"""

import torch
import triton
import triton.language as tl

from s1engine.kernels.thinking_program_triton import (
    FORCED_CLOSE_AT,
    FORCED_CLOSE_SIZE,
    SECOND_CLOSE_AT,
    SECOND_CLOSE_SIZE,
    SEGMENT,
    SEPARATOR_SIZE,
    START_AT,
    START_SIZE,
    TRIGGER_DEPTH_AT,
    TRUNCATE,
    advance,
    advance_close,
    ends_line,
    header,
    is_eos,
    next_extension,
    next_node,
    trigger_record,
)
from s1engine.kernels.triton_build import Build, ModelShape
from s1engine.thinking import layout

PROGRAM_WIDTH = tl.constexpr(layout.PROGRAM_WIDTH)
STATE_WIDTH = tl.constexpr(layout.STATE_WIDTH)
OUT_WIDTH = tl.constexpr(layout.OUT_WIDTH)

PHASE = tl.constexpr(int(layout.State.PHASE))
THINKING_TOKENS = tl.constexpr(int(layout.State.THINKING_TOKENS))
SEGMENT_TOKENS = tl.constexpr(int(layout.State.SEGMENT_TOKENS))
EXTENSIONS_USED = tl.constexpr(int(layout.State.EXTENSIONS_USED))
STOP_REASON = tl.constexpr(int(layout.State.STOP_REASON))
FINISHED = tl.constexpr(int(layout.State.FINISHED))
BAN = tl.constexpr(int(layout.State.BAN))
HELD = tl.constexpr(int(layout.State.HELD))
PENDING = tl.constexpr(int(layout.State.PENDING))
QUEUE_AT = tl.constexpr(int(layout.State.QUEUE_AT))
QUEUE_KIND = tl.constexpr(int(layout.State.QUEUE_KIND))
START_STATE = tl.constexpr(int(layout.State.START_STATE))
TRIGGER_STATE = tl.constexpr(int(layout.State.TRIGGER_STATE))
FORCED_CLOSE_STATE = tl.constexpr(int(layout.State.FORCED_CLOSE_STATE))
SECOND_CLOSE_STATE = tl.constexpr(int(layout.State.SECOND_CLOSE_STATE))
FORCED_CLOSES = tl.constexpr(int(layout.State.FORCED_CLOSES))
LAST_TOKEN = tl.constexpr(int(layout.State.LAST_TOKEN))
MAX_TOKENS = tl.constexpr(int(layout.State.MAX_TOKENS))
MIN_TOKENS = tl.constexpr(int(layout.State.MIN_TOKENS))
IGNORE_END = tl.constexpr(int(layout.State.IGNORE_END))
GRACE_TOKENS = tl.constexpr(int(layout.State.GRACE_TOKENS))

PHASE_THINKING = tl.constexpr(int(layout.Phase.THINKING))
PHASE_ANSWER = tl.constexpr(int(layout.Phase.ANSWER))
STOP_NATURAL = tl.constexpr(int(layout.StopReason.NATURAL))
STOP_BUDGET = tl.constexpr(int(layout.StopReason.BUDGET))
BAN_NOTHING = tl.constexpr(int(layout.Ban.NOTHING))
QUEUE_EXTENSION = tl.constexpr(int(layout.Queue.EXTENSION))
QUEUE_CLOSE = tl.constexpr(int(layout.Queue.CLOSE))
FLAG_FORCED = tl.constexpr(int(layout.Flag.FORCED))
FLAG_FINISHED = tl.constexpr(int(layout.Flag.FINISHED))
FLAG_TRUNCATED = tl.constexpr(int(layout.Flag.TRUNCATED))
FLAG_CLOSED_NATURAL = tl.constexpr(int(layout.Flag.CLOSED_NATURAL))
FLAG_CLOSED_BUDGET = tl.constexpr(int(layout.Flag.CLOSED_BUDGET))
FLAG_IGNORED = tl.constexpr(int(layout.Flag.IGNORED))
FLAG_STARTED = tl.constexpr(int(layout.Flag.STARTED))

OUT_REWIND = tl.constexpr(int(layout.Out.REWIND))
OUT_TOKEN = tl.constexpr(int(layout.Out.TOKEN))
OUT_FLAGS = tl.constexpr(int(layout.Out.FLAGS))
OUT_HELD = tl.constexpr(int(layout.Out.HELD))

ROWS_PER_PROGRAM = 128
WARPS = 4  # a thread for each row
OPTIONS = {"enable_fp_fusion": False}  # there are no floats: only so that Triton 3.9 does not warn


@triton.jit
def thinking_step(programs, states, slots, x, mask):
    """Each row of a block consumes the token sampled for its slot.

    programs  *int32 [N, PROGRAM_WIDTH]
    states    *int32 [N, STATE_WIDTH], those of the named slots are changed in place
    slots     int32 [B], distinct where `mask` is set; B is a power of two, 1 included
    x         int32 [B], the sampled tokens
    mask      int1 [B]; the other rows store nothing, and what they return means nothing
    Returns (rewind, token, flags, held), int32 [B] each: the columns of layout.Out.

    All threads of the program have to come here together: there is a barrier before the states are stored and one
    after, so that whatever the caller then loads of them is new.
    """
    program = programs + slots.to(tl.int64) * PROGRAM_WIDTH
    state = states + slots.to(tl.int64) * STATE_WIDTH
    phase = tl.load(state + PHASE, mask=mask, other=0)
    thinking_tokens = tl.load(state + THINKING_TOKENS, mask=mask, other=0)
    segment_tokens = tl.load(state + SEGMENT_TOKENS, mask=mask, other=0)
    extensions_used = tl.load(state + EXTENSIONS_USED, mask=mask, other=0)
    stop_reason = tl.load(state + STOP_REASON, mask=mask, other=0)
    finished = tl.load(state + FINISHED, mask=mask, other=1)
    held = tl.load(state + HELD, mask=mask, other=0)
    pending = tl.load(state + PENDING, mask=mask, other=0)
    queue_at = tl.load(state + QUEUE_AT, mask=mask, other=0)
    queue_kind = tl.load(state + QUEUE_KIND, mask=mask, other=0)
    start_state = tl.load(state + START_STATE, mask=mask, other=0)
    trigger_state = tl.load(state + TRIGGER_STATE, mask=mask, other=0)
    forced_close_state = tl.load(state + FORCED_CLOSE_STATE, mask=mask, other=0)
    second_close_state = tl.load(state + SECOND_CLOSE_STATE, mask=mask, other=0)
    forced_closes = tl.load(state + FORCED_CLOSES, mask=mask, other=0)
    last_token = tl.load(state + LAST_TOKEN, mask=mask, other=-1)
    max_tokens = tl.load(state + MAX_TOKENS, mask=mask, other=-1)
    min_tokens = tl.load(state + MIN_TOKENS, mask=mask, other=0)
    ignore_end = tl.load(state + IGNORE_END, mask=mask, other=0)
    grace_tokens = tl.load(state + GRACE_TOKENS, mask=mask, other=0)

    live = finished == 0
    queued = live & (pending > 0)
    thinks = live & (pending == 0) & (phase == PHASE_THINKING)
    outside = live & (pending == 0) & (phase != PHASE_THINKING)

    # Outside of thinking: the end of the request, or a start marker.
    found_eos = outside & is_eos(program, x, outside)
    start_at, start_size = header(program, START_AT, mask), header(program, START_SIZE, mask)
    start_state = tl.where(outside, advance(program, start_at, start_size, start_state, x, outside), start_state)
    starts = outside & (start_state == start_size)

    # Thinking: a trigger that x completes takes back what was written of it.
    node = next_node(program, trigger_state, x, thinks)
    ends = thinks & (node < 0)
    length, ignorable, common, rest_at, rest_size = trigger_record(program, node, ends)
    begun = length - 1
    thinking_tokens -= begun
    segment_tokens -= begun
    segment = header(program, SEGMENT, mask) != 0
    spent = tl.where(segment, segment_tokens, thinking_tokens)
    used_up = (max_tokens >= 0) & (spent >= max_tokens)

    # The end is ignored, or taken.
    extension_at, extension_size = next_extension(program, extensions_used, ends & ignorable)
    wanted = (extensions_used < ignore_end) | (thinking_tokens < min_tokens)
    fits = (max_tokens < 0) | segment | (thinking_tokens + extension_size < max_tokens)
    ignores = (extension_size > 0) & wanted & (used_up == 0) & fits
    extensions_used += ignores.to(tl.int32)
    segment_tokens = tl.where(ignores, 0, segment_tokens)
    closes = ends & (ignores == 0)
    keeps_x = closes & (common > begun)  # x itself is part of the close

    # No end: the budget is used up, or nearly so at the end of a line.
    near_limit = thinks & (ends == 0) & (max_tokens >= 0) & (spent >= max_tokens - grace_tokens)
    line_ended = ends_line(program, last_token, near_limit)
    out_of_budget = near_limit & (used_up | line_ended)
    truncated = out_of_budget & (header(program, TRUNCATE, mask) != 0)
    forces = out_of_budget & (truncated == 0)
    forced_at, forced_size = header(program, FORCED_CLOSE_AT, mask), header(program, FORCED_CLOSE_SIZE, mask)
    second_at, second_size = header(program, SECOND_CLOSE_AT, mask), header(program, SECOND_CLOSE_SIZE, mask)
    second = forced_closes != 0
    kept = tl.where(forces, tl.where(second, second_close_state, forced_close_state), 0)
    thinking_tokens -= kept
    segment_tokens -= kept
    forced_closes = tl.where(forces, 1, forced_closes)
    separator_size = tl.where((kept > 0) | line_ended, 0, header(program, SEPARATOR_SIZE, mask))
    close_at = tl.where(second, second_at, forced_at) + kept - separator_size  # the separator lies right before it
    close_size = tl.where(second, second_size, forced_size) - kept + separator_size

    # None of these: one more token of thinking.
    goes_on = thinks & (ends == 0) & (out_of_budget == 0)
    depth = tl.load(program + header(program, TRIGGER_DEPTH_AT, mask) + node, mask=goes_on, other=0)
    forced_close_now = advance_close(program, forced_at, forced_size, forced_close_state, x, goes_on)
    second_close_now = advance_close(program, second_at, second_size, second_close_state, x, goes_on)
    thinking_tokens += goes_on.to(tl.int32)
    segment_tokens += goes_on.to(tl.int32)

    # What was decided is queued. That and a start marker make the delimiters begin anew.
    queues_close = closes | forces
    queue_kind = tl.where(ignores, QUEUE_EXTENSION, tl.where(queues_close, QUEUE_CLOSE, queue_kind))
    queue_at = tl.where(ignores, extension_at, tl.where(closes, rest_at, tl.where(forces, close_at, queue_at)))
    pending = tl.where(ignores, extension_size, tl.where(closes, rest_size, tl.where(forces, close_size, pending)))
    stop_reason = tl.where(closes, STOP_NATURAL, tl.where(out_of_budget, STOP_BUDGET, stop_reason))
    forgets = starts | ignores | queues_close
    start_state = tl.where(forgets, 0, start_state)
    trigger_state = tl.where(forgets, 0, tl.where(goes_on, node, trigger_state))
    forced_close_state = tl.where(forgets, 0, tl.where(goes_on, forced_close_now, forced_close_state))
    second_close_state = tl.where(forgets, 0, tl.where(goes_on, second_close_now, second_close_state))
    held = tl.where(forgets | truncated, 0, tl.where(goes_on, depth, held))

    # One token stands: the next of the queue, or x.
    writes = queued | ignores | forces | (closes & (keeps_x == 0))
    token = tl.where(writes, tl.load(program + queue_at, mask=writes, other=0), x)
    queue_at += writes.to(tl.int32)
    pending -= writes.to(tl.int32)
    thinking_tokens += (writes & (queue_kind == QUEUE_EXTENSION)).to(tl.int32)
    last_token = tl.where(starts, -1, tl.where(writes | goes_on | keeps_x, token, last_token))
    queue_written = (writes | keeps_x) & (pending == 0)
    ban = tl.where(queue_written, queue_kind, BAN_NOTHING)
    answers = queue_written & (queue_kind == QUEUE_CLOSE)
    phase = tl.where(answers, PHASE_ANSWER, tl.where(starts, PHASE_THINKING, phase))
    finished = tl.where(found_eos | truncated, 1, finished)

    rewind = tl.where(ignores, begun, tl.where(closes & (keeps_x == 0), begun - common, 0))
    token = tl.where(live & (truncated == 0), token, -1)
    flags = tl.where(finished != 0, FLAG_FINISHED, 0) | tl.where(writes, FLAG_FORCED, 0)
    flags |= tl.where(truncated, FLAG_TRUNCATED, 0) | tl.where(closes, FLAG_CLOSED_NATURAL, 0)
    flags |= tl.where(forces, FLAG_CLOSED_BUDGET, 0) | tl.where(ignores, FLAG_IGNORED, 0)
    flags |= tl.where(starts, FLAG_STARTED, 0)

    # Threads may share a row: each has loaded its state for itself, and one of them stores it.
    tl.debug_barrier()
    tl.store(state + PHASE, phase, mask=live)
    tl.store(state + THINKING_TOKENS, thinking_tokens, mask=live)
    tl.store(state + SEGMENT_TOKENS, segment_tokens, mask=live)
    tl.store(state + EXTENSIONS_USED, extensions_used, mask=live)
    tl.store(state + STOP_REASON, stop_reason, mask=live)
    tl.store(state + FINISHED, finished, mask=live)
    tl.store(state + BAN, ban, mask=live)
    tl.store(state + HELD, held, mask=live)
    tl.store(state + PENDING, pending, mask=live)
    tl.store(state + QUEUE_AT, queue_at, mask=live)
    tl.store(state + QUEUE_KIND, queue_kind, mask=live)
    tl.store(state + START_STATE, start_state, mask=live)
    tl.store(state + TRIGGER_STATE, trigger_state, mask=live)
    tl.store(state + FORCED_CLOSE_STATE, forced_close_state, mask=live)
    tl.store(state + SECOND_CLOSE_STATE, second_close_state, mask=live)
    tl.store(state + FORCED_CLOSES, forced_closes, mask=live)
    tl.store(state + LAST_TOKEN, last_token, mask=live)
    tl.debug_barrier()
    return rewind, token, flags, tl.where(goes_on, held, 0)


@triton.jit(do_not_specialize=["count"])
def step_slots_kernel(programs, states, slots, sampled, out, count, BLOCK: tl.constexpr):
    """Program p steps the rows p * BLOCK to p * BLOCK + BLOCK - 1 of `count`."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = row < count
    slot = tl.load(slots + row, mask=mask, other=0)
    x = tl.load(sampled + row, mask=mask, other=0)
    rewind, token, flags, held = thinking_step(programs, states, slot, x, mask)
    result = out + row * OUT_WIDTH
    tl.store(result + OUT_REWIND, rewind, mask=mask)
    tl.store(result + OUT_TOKEN, token, mask=mask)
    tl.store(result + OUT_FLAGS, flags, mask=mask)
    tl.store(result + OUT_HELD, held, mask=mask)


def step_slots(
    programs: torch.Tensor,
    states: torch.Tensor,
    slots: torch.Tensor,
    sampled: torch.Tensor,
    rows_per_program: int = ROWS_PER_PROGRAM,
) -> torch.Tensor:
    """Each of the slots consumes one sampled token, as `s1engine.thinking.stepper.step` says; unchecked.

    programs          int32 [N, PROGRAM_WIDTH], contiguous
    states            int32 [N, STATE_WIDTH], contiguous, changed in place
    slots             int32 [n], distinct
    sampled           int32 [n]
    rows_per_program  a power of two
    Returns int32 [n, 4], columns as in layout.Out.
    """
    out = torch.empty((len(slots), layout.OUT_WIDTH), dtype=torch.int32, device=slots.device)
    if len(slots):
        grid = (triton.cdiv(len(slots), rows_per_program),)
        step_slots_kernel[grid](
            programs, states, slots, sampled, out, len(slots), BLOCK=rows_per_program, num_warps=WARPS, **OPTIONS
        )
    return out


def builds(shape: ModelShape) -> list[Build]:
    """The standalone step, which is the same for every model."""
    pointers = ("programs", "states", "slots", "sampled", "out")
    return [
        Build(
            name="step_slots",
            kernel=step_slots_kernel,
            signature={**dict.fromkeys(pointers, "*i32"), "count": "i32"},
            constexprs={"BLOCK": ROWS_PER_PROGRAM},
            aligned=frozenset(pointers),
            num_warps=WARPS,
            options=OPTIONS,
        )
    ]
