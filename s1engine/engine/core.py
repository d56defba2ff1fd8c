"""The loop: add_request / step / abort_request, and what a step's tokens do to their sequences."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from s1engine.engine.completion import request_output
from s1engine.engine.detokenize import Detokenizer
from s1engine.engine.kv_cache import KVCache
from s1engine.engine.request import Request, Sequence, Status
from s1engine.engine.runner import Runner, Sampled
from s1engine.engine.scheduler import Plan, Scheduler
from s1engine.engine.slots import SlotTable
from s1engine.engine.thinking import cut_thinking, update_thinking
from s1engine.outputs import RequestOutput
from s1engine.thinking import Splitter, ThinkingFormat
from s1engine.thinking.layout import Flag

# Plain integers: `&` on an enum member takes a microsecond, and this is done for every token.
FORCED, FINISHED, TRUNCATED = int(Flag.FORCED), int(Flag.FINISHED), int(Flag.TRUNCATED)


class EngineCore:
    """Requests in, outputs out, one step at a time. Admission (what a user may ask) is `admission.Admission`'s."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        kv: KVCache,
        slots: SlotTable,
        tokenizer: Any,
        eos_token_ids: frozenset[int],
        split_format: ThinkingFormat | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.kv = kv
        self.slots = slots
        self.tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids
        self.split_format = split_format
        self.clock = clock
        self.requests: dict[str, Request] = {}
        self._idle = False

    def add(self, request: Request) -> None:
        """Queue a request whose samples are made; samples but the first wait for its prefill, to fork it."""
        self.requests[request.request_id] = request
        for seq in request.samples:
            params = request.params
            if self.tokenizer is not None and (request.stream or params.stop_strings):
                seq.text = Detokenizer(self.tokenizer, request.prompt_token_ids, params.skip_special_tokens)
            if request.stream and seq.thinking is None and self.split_format is not None:
                seq.splitter = Splitter(self.split_format, request.prompt_token_ids)
            if seq.index == 0:
                self.scheduler.add(seq)
            else:
                seq.status = Status.BLOCKED

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now. Returns what it had, or None if there is no such unfinished request."""
        request = self.requests.get(request_id)
        if request is None:
            return None
        for seq in request.samples:
            if seq.status is not Status.FINISHED:
                self._finish(seq, "abort")
        return self._retire(request)

    @torch.inference_mode()
    def step(self) -> list[RequestOutput]:
        """Run one step. Returns the requests that finished, and the streaming ones that took part in it.

        An exception, or an interrupt, in the middle of a step leaves nobody able to say which of its effects happened:
        every unfinished request is aborted before it goes on.
        """
        plan = self.scheduler.schedule()
        if not plan.chunks:
            # A step may go by with preemptions alone; two in a row would go on for ever.
            if self._idle and self.requests:
                raise RuntimeError(f"the scheduler found nothing to run with {len(self.requests)} requests unfinished")
            self._idle = True
            return []
        self._idle = False
        try:
            return self._commit(plan, self.runner.run(plan))
        except BaseException:
            for request_id, request in list(self.requests.items()):
                for seq in request.samples:
                    seq.computed = 0  # its blocks may be half written: none of them may enter the prefix cache
                self.abort(request_id)
            raise

    def _commit(self, plan: Plan, sampled: Sampled) -> list[RequestOutput]:
        touched: dict[Request, None] = {}  # in order, each once
        for chunk in plan.chunks:
            seq = chunk.seq
            seq.computed = chunk.start + chunk.length
            request = seq.request
            if seq.index == 0 and len(request.samples) > 1 and seq.computed >= seq.num_prompt - 1:
                self._fork(seq)
            if request.score_only and seq.computed >= seq.known - 1:
                self._finish(seq, "length")
                touched[request] = None
        for i, seq in enumerate(sampled.seqs):
            self._append(seq, sampled, i)
            touched[seq.request] = None
        for chunk in plan.chunks:
            seq = chunk.seq
            if seq.status is Status.RUNNING:
                assert seq.table is not None
                self.kv.register(seq.table, seq.tokens, min(seq.computed, seq.known - seq.held))
        outputs = []
        for request in touched:
            if request.finished:
                outputs.append(self._retire(request))
            elif request.stream:
                outputs.append(request_output(request, self.tokenizer, self.split_format))
        return outputs

    def _fork(self, leader: Sequence) -> None:
        """Let the other samples share the leader's prompt; each computes the last prompt token itself, and samples."""
        assert leader.table is not None
        shared = leader.num_prompt - 1
        for seq in leader.request.samples[1:]:
            if seq.status is Status.BLOCKED:
                seq.table = self.kv.fork(leader.table, shared)
                seq.computed = shared
                self.scheduler.add(seq)

    def _append(self, seq: Sequence, sampled: Sampled, i: int) -> None:
        """Commit one sampled position: take back what was rewound, write the token, look whether that ends it."""
        token, rewind, flags = sampled.tokens[i], sampled.rewinds[i], sampled.flags[i]
        banned = seq.banned[-rewind] if rewind else sampled.banned[i]
        if rewind:
            seq.drop_last(rewind)
            self._rewind_blocks(seq)
        if seq.request.metrics.first_token_time is None:
            seq.request.metrics.first_token_time = self.clock()
        if token >= 0:
            seq.tokens.append(token)
            seq.forced.append(bool(flags & FORCED))
            seq.banned.append(banned)
            if seq.output_counts is not None:
                seq.output_counts[token] += 1
            logprob = sampled.logprobs[i]
            if logprob is not None:
                seq.logprobs.append(logprob)
                seq.chosen_logprobs.append(logprob[token].logprob)
        seq.held = sampled.held[i]
        if seq.thinking is not None:
            update_thinking(seq, self.slots, flags, sampled.counts[i], sampled.phases[i], token >= 0)
        if flags & TRUNCATED:
            self._look(seq, seq.num_output)
            if seq.status is not Status.FINISHED:
                self._finish(seq, "length", "thinking_budget")
        elif flags & FINISHED:
            self._look(seq, seq.num_output - 1)
            if seq.status is not Status.FINISHED:
                self._end_by_token(seq, token, None)
        else:
            full = seq.known >= seq.limit
            self._look(seq, seq.num_output if full else seq.num_output - seq.held)
            if full and seq.status is not Status.FINISHED:
                self._finish(seq, "length")

    def _rewind_blocks(self, seq: Sequence) -> None:
        assert seq.table is not None
        seq.computed = min(seq.computed, seq.known)
        self.kv.rewind(seq.table, seq.computed)
        self.slots.invalidate_blocks(seq, len(seq.table.blocks))

    def _look(self, seq: Sequence, end: int) -> None:
        """Apply the stop conditions to output tokens up to `end` that were not looked at; forced ones never stop."""
        request, params = seq.request, seq.request.params
        while seq.checked < end:
            position = seq.checked
            token = seq.tokens[seq.num_prompt + position]
            seq.checked += 1
            if seq.splitter is not None:
                seq.splitter.push(token)
            forced = seq.forced[position]
            # With a thinking machine, it is the machine that knows which EOS ends the request.
            by_eos = token in self.eos_token_ids and not params.ignore_eos and seq.thinking is None
            if by_eos or (token in request.stop_token_ids and not forced):
                self._cut(seq)
                self._end_by_token(seq, token, None if by_eos else token)
                return
            if seq.text is not None and (matched := self._grow_text(seq, token, forced)):
                self._cut(seq)
                self._finish(seq, "stop", matched)
                return

    @staticmethod
    def _cut(seq: Sequence) -> None:
        """Drop what was generated while a stop condition's token was held back."""
        surplus = seq.num_output - seq.checked
        if surplus:
            seq.drop_last(surplus)
            cut_thinking(seq)

    def _end_by_token(self, seq: Sequence, token: int, stop_reason: int | None) -> None:
        if seq.text is not None and seq.request.params.include_stop_str_in_output:
            seq.text.push(token)
        self._finish(seq, "stop", stop_reason)

    @staticmethod
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

    def _finish(self, seq: Sequence, reason: str, stop_reason: int | str | None = None) -> None:
        seq.finish_reason, seq.stop_reason = reason, stop_reason
        if seq.text is not None and reason != "stop":
            while seq.checked < seq.num_output:  # what was held back is final now
                seq.text.push(seq.tokens[seq.num_prompt + seq.checked])
                seq.checked += 1
        if seq.text is not None and not (reason == "stop" and isinstance(stop_reason, str)):
            seq.text.flush()
        if seq.status is Status.RUNNING and seq.table is not None:
            # What it computed serves those that come after it; a token that was cut off has no place in that.
            self.kv.register(seq.table, seq.tokens, min(seq.computed, seq.known))
        self.scheduler.finish(seq)

    def _retire(self, request: Request) -> RequestOutput:
        request.metrics.finished_time = self.clock()
        del self.requests[request.request_id]
        return request_output(request, self.tokenizer, self.split_format)
