"""What a user sees of a request: text, thinking and answer, from the engine's records."""

from __future__ import annotations

from dataclasses import fields
from typing import Any
from weakref import WeakKeyDictionary

from s1engine.engine.detokenize import decode_after
from s1engine.engine.request import Request, Sequence, Status
from s1engine.outputs import CompletionOutput, Logprob, RequestOutput, SweepBranch, SweepOutput, ThinkingOutput
from s1engine.thinking import ThinkingBudget, ThinkingFormat, split_thinking


def request_output(request: Request, tokenizer: Any, split_format: ThinkingFormat | None) -> RequestOutput:
    """The request as it may be shown now: tokens that a rewind may still take back are left out.

    split_format: the format by which the thinking of a request without a budget is told apart, if the model has one.
    """
    prompt_logprobs = request.prompt_logprobs
    if tokenizer is not None and request.finished and not request.score_only:
        _name_tokens([entry for entry in prompt_logprobs or [] if entry], tokenizer)
    return RequestOutput(
        request_id=request.request_id,
        prompt=request.prompt,
        prompt_token_ids=request.prompt_token_ids,
        prompt_logprobs=prompt_logprobs,
        outputs=[_completion(seq, tokenizer, split_format) for seq in request.samples],
        finished=request.finished,
        num_cached_tokens=request.num_cached_tokens,
        metrics=request.metrics,
    )


def sweep_output(request: Request, budgets: tuple[ThinkingBudget, ...], tokenizer: Any) -> SweepOutput:
    """A finished sweep, by its branches."""
    output = request_output(request, tokenizer, None)
    branches = [SweepBranch(budget, [], []) for budget in budgets]
    for seq, completion in sorted(zip(request.samples, output.outputs, strict=True), key=lambda pair: pair[0].sample):
        assert seq.branches is not None
        for place, number in enumerate(seq.branches.numbers):
            branches[number].outputs.append(completion)
            branches[number].shared_tokens.append(seq.num_output if place else seq.shared)
    return SweepOutput(**{f.name: getattr(output, f.name) for f in fields(output)}, branches=branches)


def _completion(seq: Sequence, tokenizer: Any, split_format: ThinkingFormat | None) -> CompletionOutput:
    request = seq.request
    shown = seq.num_output if seq.status is Status.FINISHED else seq.num_output - seq.held
    token_ids = seq.tokens[seq.num_prompt : seq.num_prompt + shown]
    text = _Text(seq, token_ids, tokenizer)
    thinking, answer = _thinking(seq, token_ids, text, split_format)
    logprobs, logprob_sum = None, None
    if request.params.logprobs is not None:
        logprobs = seq.logprobs[:shown]
        logprob_sum = seq.logprob_sums[shown - 1] if shown else 0.0
        if tokenizer is not None:
            _name_tokens(logprobs[seq.num_named :], tokenizer)
            seq.num_named = shown
    return CompletionOutput(
        index=seq.sample,
        text=text.full,
        token_ids=token_ids,
        logprobs=logprobs,
        cumulative_logprob=logprob_sum,
        finish_reason=seq.finish_reason,
        stop_reason=seq.stop_reason,
        forced_mask=seq.forced[:shown],
        banned_mask=seq.banned[:shown],
        thinking=thinking,
        answer=answer,
    )


class _Text:
    """The text of a sample's shown tokens, whole and by spans of tokens."""

    def __init__(self, seq: Sequence, token_ids: list[int], tokenizer: Any) -> None:
        self._seq, self._tokenizer = seq, tokenizer
        self._prompt = seq.request.prompt_token_ids
        self._skip_special = seq.request.params.skip_special_tokens
        # The token that ended the request is kept in the ids and, unless asked for, left out of the text.
        ended_by_token = seq.finish_reason == "stop" and not isinstance(seq.stop_reason, str)
        hide_last = ended_by_token and not seq.request.params.include_stop_str_in_output
        self._ids = token_ids[:-1] if hide_last else token_ids
        if tokenizer is None:
            self.full = ""
        elif seq.text is None:
            self.full = self._decode(0, len(self._ids))
        else:
            self.full = seq.text.text[: len(seq.text.text) - _begun_stop(seq)]

    def span(self, start: int, end: int) -> str:
        """Text of output tokens [start, end), cut where a stop string cut the whole."""
        end = min(end, len(self._ids))
        if self._tokenizer is None or start >= end:
            return ""
        if self._seq.text is None:
            return self._decode(start, end)
        ends = self._seq.text.ends
        return self.full[ends[start - 1] if start else 0 : ends[end - 1]]

    def _decode(self, start: int, end: int) -> str:
        before = self._ids[:start] if start else self._prompt
        return decode_after(self._tokenizer, before, self._ids[start:end], self._skip_special)


def _begun_stop(seq: Sequence) -> int:
    """How many characters at the end of an unfinished text may become part of a stop string, and be cut with it."""
    params = seq.request.params
    if seq.status is Status.FINISHED or params.include_stop_str_in_output or seq.text is None:
        return 0
    reach = max(map(len, params.stop_strings), default=0)
    tail = seq.text.text[max(seq.stop_floor, len(seq.text.text) - reach) :]
    begun = [n for stop in params.stop_strings for n in range(1, len(stop)) if tail.endswith(stop[:n])]
    return max(begun, default=0)


def _thinking(
    seq: Sequence, token_ids: list[int], text: _Text, split_format: ThinkingFormat | None
) -> tuple[ThinkingOutput | None, str]:
    record = seq.thinking
    if record is not None:
        # Tokens that are held back are not shown, nor counted.
        spans = [(start, min(end, len(token_ids))) for start, end in record.spans if start < len(token_ids)]
        output = ThinkingOutput(
            text="".join(text.span(*span) for span in spans),
            num_tokens=sum(end - start for start, end in spans),
            stop_reason=record.stop_reason,
            num_extensions=sum(event.kind == "ignored" for event in record.events),
            events=list(record.events),
        )
        thought = record.opened_by_prompt or any(event.kind == "started" for event in record.events)
        start = record.answer_start if thought else 0
        return output, "" if start is None else text.span(start, len(token_ids))
    if split_format is None:
        return None, text.full
    if seq.splitter is not None:
        split = seq.splitter.spans()
    else:
        split = split_thinking(split_format, seq.request.prompt_token_ids, token_ids)
    if not split.thinking and not split.open:
        return None, text.full
    output = ThinkingOutput(
        text="".join(text.span(*span) for span in split.thinking),
        num_tokens=split.num_tokens,
        stop_reason=None if split.open else "natural",
    )
    return output, text.span(split.answer_start, len(token_ids))


# By tokenizer, the texts of single tokens: decoding one costs as much as sampling it does with a small model.
_names: WeakKeyDictionary[Any, dict[int, str]] = WeakKeyDictionary()


def _name_tokens(entries: list[dict[int, Logprob]], tokenizer: Any) -> None:
    if not entries:
        return
    names = _names.setdefault(tokenizer, {})
    for entry in entries:
        for token, logprob in entry.items():
            if logprob.decoded_token is None:
                name = names.get(token)
                if name is None:
                    name = names[token] = tokenizer.decode([token])
                logprob.decoded_token = name
