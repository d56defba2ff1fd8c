"""What sampled tokens do to their sequence: written down, taken back, and looked at for whether they end it."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from s1engine.engine.request import Sequence
from s1engine.engine.thinking import cut_thinking, extend_thinking, update_thinking
from s1engine.kernels.slot_layout import Result
from s1engine.outputs import Logprob
from s1engine.thinking.layout import Flag

# Plain integers: `&` on an enum member takes a microsecond, and this is done for every token.
FORCED, FINISHED, TRUNCATED = int(Flag.FORCED), int(Flag.FINISHED), int(Flag.TRUNCATED)
REWIND, TOKEN, FLAGS, HELD = int(Result.REWIND), int(Result.TOKEN), int(Result.FLAGS), int(Result.HELD)
COUNT, PHASE, BANNED = int(Result.COUNT), int(Result.PHASE), int(Result.BANNED)
LOGPROB, RANK, ACTIVE = int(Result.LOGPROB), int(Result.RANK), int(Result.ACTIVE)


@dataclass(frozen=True, slots=True)
class End:
    """Why a sequence has ended, in a user's words."""

    reason: str
    stop_reason: int | str | None = None


def uneventful(results: np.ndarray) -> list[bool]:
    """For each sequence, whether nothing happened to it but that tokens were sampled, and it goes on.

    results  int32 [replays, R, RESULT_WIDTH]
    """
    events = results[:, :, REWIND] | results[:, :, FLAGS] | results[:, :, HELD] | results[:, :, BANNED]
    return ((events == 0) & (results[:, :, ACTIVE] != 0)).all(0).tolist()


def extend(seq: Sequence, rows: np.ndarray, tokens: list[int], counts: list[int]) -> bool:
    """Write down the tokens of an uneventful launch, all at once. Returns False where somebody looks at each.

    rows    int32 [replays, RESULT_WIDTH]; tokens and counts (thinking tokens after each) are two of its columns
    """
    if seq.watched or seq.checked != len(seq.forced):
        return False
    if seq.request.params.logprobs is not None:
        if seq.needs_host:
            return False
        values, ranks = rows[:, LOGPROB].copy().view(np.float32).tolist(), rows[:, RANK].tolist()
        for token, value, rank in zip(tokens, values, ranks, strict=True):
            _add_logprobs(seq, token, {token: Logprob(value, rank)})
    seq.tokens += tokens
    nothing = [False] * len(tokens)
    seq.forced += nothing
    seq.banned += nothing
    seq.checked += len(tokens)
    if seq.thinking is not None:
        extend_thinking(seq, counts)
    return True


def take(
    seq: Sequence, rows: list[list[int]], logprobs: dict[int, Logprob] | None, eos_token_ids: frozenset[int]
) -> End | None:
    """Write down what a launch sampled, token by token. Returns the end of the sequence, if it has come.

    rows      one row of slot_layout.Result a replay; those after the end are dropped
    logprobs  of the only replay, where they are asked for and not in the rows
    """
    for row in rows:
        end = _append(seq, row, logprobs, eos_token_ids)
        if end is not None:
            return end
    return None


def _append(
    seq: Sequence, row: list[int], logprobs: dict[int, Logprob] | None, eos_token_ids: frozenset[int]
) -> End | None:
    """One sampled position: take back what was rewound, write the token, look whether that ends the sequence."""
    token, rewind, flags = row[TOKEN], row[REWIND], row[FLAGS]
    if token < 0 and not flags & TRUNCATED:
        raise RuntimeError(f"the step ended a sequence of request {seq.request.request_id!r} that has not ended")
    banned = seq.banned[-rewind] if rewind else bool(row[BANNED])
    seq.drop_last(rewind)
    if token >= 0:
        seq.tokens.append(token)
        seq.forced.append(bool(flags & FORCED))
        seq.banned.append(banned)
        if seq.output_counts is not None:
            seq.output_counts[token] += 1
        if seq.request.params.logprobs is not None:
            _add_logprobs(seq, token, logprobs or {token: Logprob(_float(row[LOGPROB]), row[RANK])})
    seq.held = row[HELD]
    if seq.thinking is not None:
        update_thinking(seq, flags, row[COUNT], row[PHASE], token >= 0)
    if flags & TRUNCATED:
        return _look(seq, seq.num_output, eos_token_ids) or End("length", "thinking_budget")
    if flags & FINISHED:
        end = _look(seq, seq.num_output - 1, eos_token_ids)
        return end or _end_by_token(seq, token, None)
    full = seq.known >= seq.limit
    end = _look(seq, seq.num_output if full else seq.num_output - seq.held, eos_token_ids)
    return end or (End("length") if full else None)


def _add_logprobs(seq: Sequence, token: int, entry: dict[int, Logprob]) -> None:
    seq.logprobs.append(entry)
    so_far = seq.logprob_sums[-1] if seq.logprob_sums else 0.0
    seq.logprob_sums.append(so_far + entry[token].logprob)


def _float(bits: int) -> float:
    return struct.unpack("f", struct.pack("i", bits))[0]


def _look(seq: Sequence, until: int, eos_token_ids: frozenset[int]) -> End | None:
    """Apply the stop conditions to output tokens up to `until` that were not looked at; forced ones never stop."""
    params = seq.request.params
    while seq.checked < until:
        position = seq.checked
        token = seq.tokens[seq.num_prompt + position]
        seq.checked += 1
        if seq.splitter is not None:
            seq.splitter.push(token)
        forced = seq.forced[position]
        if token in seq.end_ids and not forced:
            by_eos = token in eos_token_ids and not params.ignore_eos and seq.thinking is None
            _cut(seq)
            return _end_by_token(seq, token, None if by_eos else token)
        if seq.text is not None and (matched := _grow_text(seq, token, forced)):
            _cut(seq)
            return End("stop", matched)
    return None


def _cut(seq: Sequence) -> None:
    """Drop what was generated while a stop condition's token was held back."""
    surplus = seq.num_output - seq.checked
    if surplus:
        seq.drop_last(surplus)
        cut_thinking(seq)


def _end_by_token(seq: Sequence, token: int, stop_reason: int | None) -> End:
    if seq.text is not None and seq.request.params.include_stop_str_in_output:
        seq.text.push(token)
    return End("stop", stop_reason)


def _grow_text(seq: Sequence, token: int, forced: bool) -> str | None:
    """Add a token's text. Returns the stop string that it completed, after cutting the text there."""
    text, params = seq.text, seq.request.params
    assert text is not None
    before = len(text.text)
    text.push(token)
    if forced or seq.checked < params.min_tokens:
        seq.stop_floor = len(text.text)
        return None
    found = None
    for stop in params.stop_strings:
        at = text.text.find(stop, max(seq.stop_floor, before - len(stop) + 1))
        if at >= 0 and (found is None or at < found[0]):
            found = (at, stop)
    if found is None:
        return None
    text.cut(found[0] + (len(found[1]) if params.include_stop_str_in_output else 0))
    return found[1]
