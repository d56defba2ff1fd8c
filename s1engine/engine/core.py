"""The loop: add_request / step / abort_request.

With a runner of depth 0 a step is plan, run, commit. With depth 1 a plan is launched before the results of the one
before are looked at, so that the device never waits for the host. What the host finds late (a stop string, an abort)
has a surplus of tokens by then, which is dropped; what the device can see itself (EOS, stop ids, lengths) ends a row
there, and the launches after it leave that row alone.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from s1engine.engine.branches import follow
from s1engine.engine.completion import request_output, sweep_output
from s1engine.engine.detokenize import Detokenizer
from s1engine.engine.kv_cache import KVCache
from s1engine.engine.progress import COUNT, TOKEN, End, extend, take, uneventful
from s1engine.engine.request import Request, Sequence, Status
from s1engine.engine.runner import Launch, Runner
from s1engine.engine.scheduler import Chunk, Plan, Scheduler
from s1engine.engine.slots import SlotTable
from s1engine.kernels.slot_layout import MAX_STOP_IDS
from s1engine.outputs import Logprob, RequestOutput
from s1engine.thinking import Splitter, ThinkingFormat


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
        self._launched: deque[tuple[Plan, Launch]] = deque()  # oldest first
        self._idle = False

    def add(self, request: Request) -> None:
        """Queue a request whose samples are made; samples but the first wait for its prefill, to fork it."""
        self.requests[request.request_id] = request
        for seq in request.samples:
            params = request.params
            seq.needs_host = self.runner.needs_host(seq)
            if self.tokenizer is not None and (request.stream or params.stop_strings):
                seq.text = Detokenizer(self.tokenizer, request.prompt_token_ids, params.skip_special_tokens)
            if request.stream and seq.thinking is None and self.split_format is not None:
                seq.splitter = Splitter(self.split_format, request.prompt_token_ids)
            by_host = seq.needs_host or seq.text is not None or len(seq.end_ids) > MAX_STOP_IDS
            seq.watched = by_host or request.stream or request.score_only
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
                self._finish(seq, End("abort"))
        return self._retire(request)

    @torch.inference_mode()
    def step(self) -> list[RequestOutput]:
        """Launch the next step and commit what is due. Returns the requests that finished, and the streaming ones that
        have something new.

        An exception, or an interrupt, in the middle of a step leaves nobody able to say which of its effects happened:
        every unfinished request is aborted before it goes on.
        """
        try:
            outputs = self._commit_down_to(self._depth())
            plan = self.scheduler.schedule(may_preempt=not self._launched)
            if plan.chunks:
                self._launch(plan)
                self._idle = False
                return outputs + self._commit_down_to(self._depth())
            if self._launched:
                return outputs + self._commit_down_to(len(self._launched) - 1)
        except BaseException:
            self._launched.clear()
            for request_id, request in list(self.requests.items()):
                for seq in request.samples:
                    seq.computed = 0  # its blocks may be half written: none of them may enter the prefix cache
                self.abort(request_id)
            raise
        # A step may go by with preemptions alone; two in a row would go on for ever.
        if self._idle and self.requests:
            raise RuntimeError(f"the scheduler found nothing to run with {len(self.requests)} requests unfinished")
        self._idle = True
        return outputs

    def _depth(self) -> int:
        """How many launches may be unseen: none where the host has to know the last token before it can plan."""
        return 0 if any(seq.needs_host for seq in self.scheduler.running) else self.runner.depth

    def _launch(self, plan: Plan) -> None:
        launch = self.runner.launch(plan)
        for chunk in plan.chunks:
            seq = chunk.seq
            if chunk.samples:
                seq.ahead += plan.replays
                seq.computed = chunk.start + chunk.length + plan.replays - 1
            else:
                seq.computed = chunk.start + chunk.length
        self._launched.append((plan, launch))

    def _commit_down_to(self, depth: int) -> list[RequestOutput]:
        outputs: list[RequestOutput] = []
        while len(self._launched) > depth:
            outputs += self._commit(*self._launched.popleft())
        return outputs

    def _commit(self, plan: Plan, launch: Launch) -> list[RequestOutput]:
        sampled = launch.collect()
        touched: dict[Request, None] = {}  # in order, each once
        for chunk in plan.chunks:
            if chunk.start < chunk.seq.num_prompt and chunk.seq.status is Status.RUNNING:
                self._prompt_progress(chunk, touched)
        results = sampled.results
        calm = uneventful(results)
        tokens, counts = (results[:, :, column].T.ravel().tolist() for column in (TOKEN, COUNT))
        replays = plan.replays
        for i, seq in enumerate(plan.sampling):
            if seq.status is not Status.RUNNING:
                continue
            seq.ahead -= replays
            request = seq.request
            if not seq.forced and request.metrics.first_token_time is None:
                request.metrics.first_token_time = self.clock()
            its_own = slice(i * replays, (i + 1) * replays)
            branches = None if seq.branches is None or seq.branches.alone else seq.branches
            quiet = calm[i] and (branches is None or counts[its_own][-1] <= branches.quiet_until)
            if quiet and extend(seq, results[:, i], tokens[its_own], counts[its_own]):
                if branches is not None:
                    branches.unseen += tokens[its_own]
            else:
                end = self._take(seq, results[:, i].tolist(), sampled.logprobs[i])
                if end is not None:
                    self._finish(seq, end)
                if end is not None or request.stream:
                    touched[request] = None
            # It decodes from here on: one token is known that was not computed, or on its way.
            seq.computed = seq.known + seq.ahead - 1
        if self.kv.enable_prefix_caching:
            for chunk in plan.chunks:
                if chunk.seq.status is Status.RUNNING:
                    self._register(chunk.seq)
        outputs = []
        for request in touched:
            if request.finished:
                outputs.append(self._retire(request))
            elif request.stream:
                outputs.append(request_output(request, self.tokenizer, self.split_format))
        return outputs

    def _take(self, seq: Sequence, rows: list[list[int]], logprobs: dict[int, Logprob] | None) -> End | None:
        """Write down what a sequence sampled, and send the branches that leave it on their way. Returns its end."""
        if seq.branches is None:
            return take(seq, rows, logprobs, self.eos_token_ids)
        end, born = follow(seq, rows, logprobs, self.eos_token_ids)
        for child in born:
            if child.ending is not None:
                self._finish(child, child.ending)
                continue
            assert seq.table is not None
            child.table = self.kv.fork(seq.table, child.computed)
            self.scheduler.add(child)
        return end

    def _prompt_progress(self, chunk: Chunk, touched: dict[Request, None]) -> None:
        seq, end = chunk.seq, chunk.start + chunk.length
        request = seq.request
        if seq.index == 0 and len(request.samples) > 1 and end >= seq.num_prompt - 1:
            self._fork(seq)
        if request.score_only and end >= seq.known - 1:
            self._finish(seq, End("length"))
            touched[request] = None

    def _register(self, seq: Sequence) -> None:
        """Enter its final blocks in the prefix cache.

        Not those of the newest token, whose keys and values may not exist yet, nor of tokens that may be taken back,
        not even at the end: launches that are on their way may write others in their place.
        """
        assert seq.table is not None
        final = min(seq.computed, seq.known - max(seq.held, 1))
        if final >= (seq.table.num_registered + 1) * self.kv.block_size:
            self.kv.register(seq.table, seq.tokens, final)

    def _fork(self, leader: Sequence) -> None:
        """Let the other samples share the leader's prompt; each computes the last prompt token itself, and samples."""
        assert leader.table is not None
        shared = leader.num_prompt - 1
        for seq in leader.request.samples[1:]:
            if seq.status is Status.BLOCKED:
                seq.table = self.kv.fork(leader.table, shared)
                seq.computed = shared
                self.scheduler.add(seq)

    def _finish(self, seq: Sequence, end: End) -> None:
        seq.finish_reason, seq.stop_reason = end.reason, end.stop_reason
        if seq.text is not None and end.reason != "stop":
            while seq.checked < seq.num_output:  # what was held back is final now
                seq.text.push(seq.tokens[seq.num_prompt + seq.checked])
                seq.checked += 1
        if seq.text is not None and not (end.reason == "stop" and isinstance(end.stop_reason, str)):
            seq.text.flush()
        if seq.status is Status.RUNNING and seq.table is not None:
            self._register(seq)  # what it computed serves those that come after it
        self.scheduler.finish(seq)

    def _retire(self, request: Request) -> RequestOutput:
        request.metrics.finished_time = self.clock()
        del self.requests[request.request_id]
        if request.sweep is not None:
            return sweep_output(request, request.sweep, self.tokenizer)
        return request_output(request, self.tokenizer, self.split_format)
