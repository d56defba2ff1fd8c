"""Runs one planned step: inputs from the slot table, model, sampler, thinking machine.

The host learns what came out afterwards; nothing here decides about requests.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from s1engine.engine.logit_edits import BANNED, edit_logits
from s1engine.engine.request import Sequence
from s1engine.engine.scheduler import Chunk, Plan
from s1engine.engine.slots import SlotTable
from s1engine.kernels.logprobs import token_logprobs
from s1engine.kernels.sampler import processed_logits, sample
from s1engine.models import CausalLM
from s1engine.models.batch import PackedBatch
from s1engine.outputs import Logprob
from s1engine.thinking.layout import State
from s1engine.thinking.program import banned_ids
from s1engine.thinking.stepper import step

# Rows of prompt whose logits exist at a time, where prompt logprobs are asked for: a whole prompt's would not fit.
PROMPT_LOGIT_ROWS = 64


@dataclass(slots=True)
class Sampled:
    """What the step did to the sequences that sampled; everything runs parallel to `seqs`."""

    seqs: list[Sequence] = field(default_factory=list)
    rewinds: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)  # -1: none was written
    flags: list[int] = field(default_factory=list)  # of the thinking machine
    held: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)  # thinking tokens so far
    phases: list[int] = field(default_factory=list)
    banned: list[bool] = field(default_factory=list)
    logprobs: list[dict[int, Logprob] | None] = field(default_factory=list)


class Runner:
    """Executes plans. `valid_tokens`: bool [vocab], False for ids that the tokenizer lacks (None: all are valid)."""

    def __init__(self, model: CausalLM, kv_cache: Tensor, slots: SlotTable, valid_tokens: Tensor | None) -> None:
        self.model = model
        self.kv_cache = kv_cache  # [layers, 2, blocks, block_size, kv_heads, head_dim]
        self.slots = slots
        self.block_size = kv_cache.shape[3]
        self._invalid_ids = None if valid_tokens is None else torch.nonzero(~valid_tokens).flatten()

    def run(self, plan: Plan) -> Sampled:
        if plan.copies:
            source, target = (torch.tensor(side) for side in zip(*plan.copies, strict=True))
            self.kv_cache[:, :, target] = self.kv_cache[:, :, source]
        token_ids, batch = self._inputs(plan.chunks)
        hidden = self.model(token_ids, batch, self.kv_cache)
        for chunk, start in zip(plan.chunks, batch.query_start_list, strict=False):
            if chunk.seq.request.prompt_logprobs is not None:
                self._prompt_logprobs(chunk, hidden[start : start + chunk.length])
        sampling = [
            (c.seq, end - 1) for c, end in zip(plan.chunks, batch.query_start_list[1:], strict=True) if c.samples
        ]
        if not sampling:
            return Sampled()
        rows = torch.tensor([row for _, row in sampling])
        logits = self._logits(hidden[rows])
        return self._sample(logits, [seq for seq, _ in sampling])

    def _inputs(self, chunks: list[Chunk]) -> tuple[Tensor, PackedBatch]:
        token_ids: list[int] = []
        query_start = [0]
        for chunk in chunks:
            self.slots.sync_blocks(chunk.seq)
            token_ids += chunk.seq.tokens[chunk.start : chunk.start + chunk.length]
            query_start.append(len(token_ids))
        lengths = np.array([c.length for c in chunks])
        starts = np.array([c.start for c in chunks])
        slots = np.array([c.seq.slot for c in chunks])
        owner = np.repeat(slots, lengths)
        positions = np.arange(len(token_ids)) - np.repeat(np.array(query_start[:-1]) - starts, lengths)
        blocks = self.slots.block_tables[owner, positions // self.block_size].astype(np.int64)
        context = starts + lengths
        num_blocks = -(-int(context.max()) // self.block_size)
        batch = PackedBatch(
            positions=torch.from_numpy(positions),
            slot_mapping=torch.from_numpy(blocks * self.block_size + positions % self.block_size),
            query_start=torch.tensor(query_start, dtype=torch.int32),
            query_start_list=query_start,
            context_lens=torch.from_numpy(context.astype(np.int32)),
            context_lens_list=context.tolist(),
            block_tables=torch.from_numpy(self.slots.block_tables[slots, :num_blocks]),
            num_decodes=int((lengths == 1).sum()),
        )
        return torch.tensor(token_ids), batch

    def _logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits [R, vocab] of hidden rows [R, hidden], without ids that the tokenizer lacks."""
        logits = self.model.compute_logits(hidden)
        if self._invalid_ids is not None and len(self._invalid_ids):
            logits.index_fill_(1, self._invalid_ids, BANNED)
        return logits

    def _prompt_logprobs(self, chunk: Chunk, hidden: Tensor) -> None:
        """Extend the request's prompt logprobs by the rows of this chunk; row at position p predicts token p + 1."""
        request = chunk.seq.request
        record, prompt = request.prompt_logprobs, request.prompt_token_ids
        assert record is not None
        last = min(chunk.start + chunk.length, len(prompt) - 1)
        for low in range(max(chunk.start, len(record) - 1), last, PROMPT_LOGIT_ROWS):
            high = min(low + PROMPT_LOGIT_ROWS, last)
            logits = self._logits(hidden[low - chunk.start : high - chunk.start])
            targets = torch.tensor(prompt[low + 1 : high + 1])
            top = request.params.prompt_logprobs or 0
            record += _logprob_dicts(logits, targets, [top] * (high - low))

    def _sample(self, logits: Tensor, seqs: list[Sequence]) -> Sampled:
        slots = np.array([seq.slot for seq in seqs])
        raw = [i for i, s in enumerate(seqs) if _wants(s, "raw_logprobs")]
        raw_logits = logits[torch.tensor(raw)] if raw else None
        banned = self._edit(logits, seqs, slots)
        positions = np.array([seq.known for seq in seqs])
        sampling = self.slots.sampling_batch(slots, positions)
        sampled = sample(logits, sampling).numpy()

        result = Sampled(seqs=seqs, banned=banned, logprobs=[None] * len(seqs))
        result.tokens = sampled.tolist()
        result.rewinds = [0] * len(seqs)
        result.flags, result.held = [0] * len(seqs), [0] * len(seqs)
        result.counts, result.phases = [0] * len(seqs), [0] * len(seqs)
        machine = np.flatnonzero(self.slots.has_machine[slots])
        if len(machine):
            self._think(result, machine, slots[machine], sampled[machine])

        if raw_logits is not None:
            self._record(result, raw, raw_logits)
        processed = [i for i, s in enumerate(seqs) if _wants(s, "processed_logprobs")]
        if processed:
            self._record(result, processed, processed_logits(logits, sampling)[torch.tensor(processed)])
        return result

    def _edit(self, logits: Tensor, seqs: list[Sequence], slots: np.ndarray) -> list[bool]:
        banned = [False] * len(seqs)
        rows = [i for i, seq in enumerate(seqs) if seq.request.edits_logits]
        if rows:
            for i, was in zip(rows, edit_logits(logits, rows, [seqs[i] for i in rows]), strict=True):
                banned[i] = was
        kinds = self.slots.states[slots, State.BAN] * self.slots.has_machine[slots]
        for i in np.flatnonzero(kinds).tolist():
            ids = banned_ids(self.slots.programs[slots[i]], int(kinds[i]))
            if ids:
                logits[i, list(ids)] = BANNED
                banned[i] = True
        return banned

    def _think(self, result: Sampled, index: np.ndarray, slots: np.ndarray, sampled: np.ndarray) -> None:
        table = self.slots
        out = step(table.programs, table.states, slots.astype(np.int32), sampled.astype(np.int32))
        counts, phases = table.states[slots, State.THINKING_TOKENS], table.states[slots, State.PHASE]
        for i, (rewind, token, flags, held), count, phase in zip(
            index.tolist(), out.tolist(), counts.tolist(), phases.tolist(), strict=True
        ):
            result.rewinds[i], result.tokens[i], result.flags[i], result.held[i] = rewind, token, flags, held
            result.counts[i], result.phases[i] = count, phase

    @staticmethod
    def _record(result: Sampled, index: list[int], logits: Tensor) -> None:
        """Logprobs of the tokens that were written, each from the logits of its own position.

        A rewind puts its token at an earlier position, so the rows of tokens that may be taken back are kept.
        """
        rows = list(logits)
        for k, i in enumerate(index):
            seq, row, rewind, held = result.seqs[i], rows[k], result.rewinds[i], result.held[i]
            if rewind:
                rows[k] = seq.held_logits[-rewind]
            # (A copy, lest one row keep the logits of the whole step.)
            seq.held_logits = [*seq.held_logits, row.clone()][-held:] if held else []
        tokens = torch.tensor([max(result.tokens[i], 0) for i in index])
        tops = [result.seqs[i].request.params.logprobs or 0 for i in index]
        for i, entry in zip(index, _logprob_dicts(torch.stack(rows), tokens, tops), strict=True):
            result.logprobs[i] = entry


def _wants(seq: Sequence, mode: str) -> bool:
    params = seq.request.params
    return params.logprobs is not None and params.logprobs_mode == mode


def _logprob_dicts(logits: Tensor, tokens: Tensor, tops: list[int]) -> list[dict[int, Logprob]]:
    """For each row of logits [R, vocab]: its token and its `tops[r]` most likely ones."""
    chosen, ranks, top_values, top_ids = token_logprobs(logits, tokens, max(tops))
    result = []
    for token, value, rank, values, ids, top in zip(
        tokens.tolist(), chosen.tolist(), ranks.tolist(), top_values.tolist(), top_ids.tolist(), tops, strict=True
    ):
        entry = {token: Logprob(value, rank)}
        for position, (other, its_value) in enumerate(zip(ids[:top], values[:top], strict=True)):
            entry.setdefault(other, Logprob(its_value, position + 1))
        result.append(entry)
    return result
