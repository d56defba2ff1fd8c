"""The compiled state machine in Python: one step over a program and a state row, function by function as in thinking.h.

It serves where no C++ compiler was at hand, and shows what a kernel for another device has to compute: integer loads
and bounded loops, no allocation. What the rules mean is written in `machine.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from s1engine.thinking.layout import OUT_WIDTH, Ban, Flag, Header, Phase, Queue, State, StopReason, TriggerRecord

Array = npt.NDArray[np.int32]
Program = Sequence[int]
Result = tuple[int, int, int, int]  # the columns of layout.Out


def table_step(programs: Array, states: Array, rows: Array, sampled: Array) -> Array:
    """One sampled token for each of the slots `rows`; shapes as in `stepper.step`."""
    out = np.empty((len(rows), OUT_WIDTH), dtype=np.int32)
    for i, (row, token) in enumerate(zip(rows.tolist(), sampled.tolist(), strict=True)):
        state = states[row].tolist()
        out[i] = step_row(memoryview(programs[row]), state, token)
        states[row] = state
    return out


def step_row(program: Program, state: list[int], x: int) -> Result:
    """Consumes `x`, sampled at the next position; changes `state` in place. A finished request stays as it is."""
    if state[State.FINISHED]:
        return 0, -1, Flag.FINISHED, 0
    state[State.BAN] = Ban.NOTHING
    if state[State.PENDING]:
        return _write_queued(program, state, 0, 0)
    if state[State.PHASE] == Phase.THINKING:
        return _think(program, state, x)
    return _outside(program, state, x)


def _write_queued(program: Program, state: list[int], rewind: int, events: int) -> Result:
    token = program[state[State.QUEUE_AT]]
    state[State.QUEUE_AT] += 1
    state[State.PENDING] -= 1
    state[State.LAST_TOKEN] = token
    if state[State.QUEUE_KIND] == Queue.EXTENSION:
        state[State.THINKING_TOKENS] += 1
    if state[State.PENDING] == 0:
        _queue_written(state)
    return rewind, token, Flag.FORCED | events, 0


def _queue_written(state: list[int]) -> None:
    state[State.BAN] = state[State.QUEUE_KIND]
    if state[State.QUEUE_KIND] == Queue.CLOSE:
        state[State.PHASE] = Phase.ANSWER


def _queue(state: list[int], kind: Queue, at: int, size: int) -> None:
    state[State.QUEUE_KIND] = kind
    state[State.QUEUE_AT] = at
    state[State.PENDING] = size
    _forget_delimiters(state)


def _forget_delimiters(state: list[int]) -> None:
    state[State.START_STATE] = 0
    state[State.TRIGGER_STATE] = 0
    state[State.FORCED_CLOSE_STATE] = 0
    state[State.SECOND_CLOSE_STATE] = 0
    state[State.HELD] = 0


def _outside(program: Program, state: list[int], x: int) -> Result:
    flags = 0
    if _find(program, program[Header.EOS_AT], program[Header.EOS_SIZE], x) >= 0:
        state[State.FINISHED] = 1
        flags |= Flag.FINISHED
    size = program[Header.START_SIZE]
    state[State.START_STATE] = _advance(program, program[Header.START_AT], size, state[State.START_STATE], x)
    if state[State.START_STATE] == size:
        _forget_delimiters(state)
        state[State.PHASE] = Phase.THINKING
        state[State.LAST_TOKEN] = -1
        flags |= Flag.STARTED
    return 0, x, flags, 0


def _think(program: Program, state: list[int], x: int) -> Result:
    alphabet_at, alphabet_size = program[Header.ALPHABET_AT], program[Header.ALPHABET_SIZE]
    place = _find(program, alphabet_at, alphabet_size, x)
    symbol = 0 if place < 0 else program[alphabet_at + alphabet_size + place]
    nodes, symbol_count = program[Header.TRIGGER_NEXT_AT], program[Header.SYMBOL_COUNT]
    node = program[nodes + state[State.TRIGGER_STATE] * symbol_count + symbol]
    if node < 0:
        return _end(program, state, -node - 1, x)

    limit, spent = state[State.MAX_TOKENS], _used(program, state)
    if limit >= 0 and spent >= limit - state[State.GRACE_TOKENS]:
        line_ended = _ends_line(program, state[State.LAST_TOKEN])
        if spent >= limit or line_ended:
            return _out_of_budget(program, state, line_ended)

    state[State.TRIGGER_STATE] = node
    state[State.FORCED_CLOSE_STATE] = _advance_close(
        program, program[Header.FORCED_CLOSE_AT], program[Header.FORCED_CLOSE_SIZE], state[State.FORCED_CLOSE_STATE], x
    )
    state[State.SECOND_CLOSE_STATE] = _advance_close(
        program, program[Header.SECOND_CLOSE_AT], program[Header.SECOND_CLOSE_SIZE], state[State.SECOND_CLOSE_STATE], x
    )
    state[State.THINKING_TOKENS] += 1
    state[State.SEGMENT_TOKENS] += 1
    state[State.LAST_TOKEN] = x
    state[State.HELD] = program[program[Header.TRIGGER_DEPTH_AT] + node]
    return 0, x, 0, state[State.HELD]


def _end(program: Program, state: list[int], index: int, x: int) -> Result:
    record = program[Header.TRIGGERS_AT] + index * TriggerRecord.WIDTH
    begun = program[record + TriggerRecord.LENGTH] - 1
    state[State.THINKING_TOKENS] -= begun
    state[State.SEGMENT_TOKENS] -= begun
    count = program[Header.EXTENSION_COUNT]
    if program[record + TriggerRecord.IGNORABLE] and count:
        place = program[Header.EXTENSIONS_AT] + 2 * (state[State.EXTENSIONS_USED] % count)
        if _may_ignore(program, state, program[place + 1]):
            state[State.EXTENSIONS_USED] += 1
            state[State.SEGMENT_TOKENS] = 0
            _queue(state, Queue.EXTENSION, program[place], program[place + 1])
            return _write_queued(program, state, begun, Flag.IGNORED)
    state[State.STOP_REASON] = StopReason.NATURAL
    common = program[record + TriggerRecord.COMMON]
    _queue(state, Queue.CLOSE, program[record + TriggerRecord.REST_AT], program[record + TriggerRecord.REST_SIZE])
    if common <= begun:
        return _write_queued(program, state, begun - common, Flag.CLOSED_NATURAL)
    state[State.LAST_TOKEN] = x
    if state[State.PENDING] == 0:
        _queue_written(state)
    return 0, x, Flag.CLOSED_NATURAL, 0


def _may_ignore(program: Program, state: list[int], extension_size: int) -> bool:
    thinking_tokens, limit = state[State.THINKING_TOKENS], state[State.MAX_TOKENS]
    wanted = state[State.EXTENSIONS_USED] < state[State.IGNORE_END] or thinking_tokens < state[State.MIN_TOKENS]
    if not wanted or 0 <= limit <= _used(program, state):
        return False
    return limit < 0 or bool(program[Header.SEGMENT]) or thinking_tokens + extension_size < limit


def _used(program: Program, state: list[int]) -> int:
    return state[State.SEGMENT_TOKENS] if program[Header.SEGMENT] else state[State.THINKING_TOKENS]


def _out_of_budget(program: Program, state: list[int], line_ended: bool) -> Result:
    state[State.STOP_REASON] = StopReason.BUDGET
    if program[Header.TRUNCATE]:
        state[State.FINISHED] = 1
        state[State.HELD] = 0
        return 0, -1, Flag.FINISHED | Flag.TRUNCATED, 0
    if state[State.FORCED_CLOSES]:
        at, size = program[Header.SECOND_CLOSE_AT], program[Header.SECOND_CLOSE_SIZE]
        kept = state[State.SECOND_CLOSE_STATE]
    else:
        at, size = program[Header.FORCED_CLOSE_AT], program[Header.FORCED_CLOSE_SIZE]
        kept = state[State.FORCED_CLOSE_STATE]
    state[State.FORCED_CLOSES] = 1
    state[State.THINKING_TOKENS] -= kept
    state[State.SEGMENT_TOKENS] -= kept
    separator = 0 if kept or line_ended else program[Header.SEPARATOR_SIZE]  # it lies right before the close
    _queue(state, Queue.CLOSE, at + kept - separator, size - kept + separator)
    return _write_queued(program, state, 0, Flag.CLOSED_BUDGET)


def _advance(program: Program, at: int, size: int, matched: int, token: int) -> int:
    """Knuth, Morris and Pratt: `size` tokens lie at `at`, their fail table after them."""
    while matched and program[at + matched] != token:
        matched = program[at + size + matched]
    return matched + 1 if program[at + matched] == token else 0


def _advance_close(program: Program, at: int, size: int, matched: int, token: int) -> int:
    """The same, where a complete match goes on as its longest proper part."""
    matched = _advance(program, at, size, matched, token)
    return program[at + size + size] if matched == size else matched


def _ends_line(program: Program, token: int) -> bool:
    page = token >> 8
    if token < 0 or page >= program[Header.NEWLINE_PAGES]:
        return False
    pages, low_bytes = program[Header.NEWLINE_PAGES_AT], program[Header.NEWLINE_BYTES_AT]
    low, high = _unpack(program, pages, page, 16), _unpack(program, pages, page + 1, 16)
    while low < high:
        middle = (low + high) // 2
        byte = _unpack(program, low_bytes, middle, 8)
        if byte == token & 255:
            return True
        low, high = (middle + 1, high) if byte < token & 255 else (low, middle)
    return False


def _unpack(program: Program, at: int, i: int, bits: int) -> int:
    per_word = 32 // bits
    return (program[at + i // per_word] >> (bits * (i % per_word))) & ((1 << bits) - 1)


def _find(program: Program, at: int, size: int, token: int) -> int:
    """The place of `token` in the ascending list of `size` at `at`, or -1."""
    low, high = at, at + size
    while low < high:
        middle = (low + high) // 2
        if program[middle] == token:
            return middle - at
        low, high = (middle + 1, high) if program[middle] < token else (low, middle)
    return -1
