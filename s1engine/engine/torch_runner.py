"""Runs plans on the CPU, at once: inputs from the slot table, model, sampler, thinking machine, back into the slots."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from s1engine.engine.logit_edits import BANNED, edit_logits
from s1engine.engine.request import Sequence
from s1engine.engine.runner import (
    PromptLogprobs,
    Sampled,
    copy_blocks,
    keeps_logits,
    record_logprobs,
    release_storage,
    restore_storage,
    wants,
)
from s1engine.engine.scheduler import Chunk, Plan
from s1engine.engine.slots import SlotTable
from s1engine.engine.step_rows import DecodeRows, StepRows
from s1engine.kernels.logprobs import token_logprobs
from s1engine.kernels.sampler import processed_logits, sample
from s1engine.kernels.slot_layout import RESULT_WIDTH, Field, Result
from s1engine.kernels.slot_step import advance_slots
from s1engine.models import CausalLM
from s1engine.models.batch import PackedBatch
from s1engine.outputs import Logprob
from s1engine.thinking.layout import OUT_WIDTH, Out, State
from s1engine.thinking.program import banned_ids
from s1engine.thinking.stepper import step

# Decode steps of a launch at most, and its seconds: nobody is let in, nor shown anything, before it is over. A single
# step of a large model takes longer than that.
MAX_REPLAYS = 8
LAUNCH_SECONDS = 0.02


@dataclass(slots=True)
class Done:
    """A launch that is over."""

    sampled: Sampled

    def collect(self) -> Sampled:
        return self.sampled


class TorchRunner:
    """See `runner.Runner`. valid_tokens: bool [vocab], False for ids that the tokenizer lacks (None: all are valid).

    kv_cache        [layers, 2, blocks, block_size, kv_heads, head_dim]
    max_replays     steps of a launch at most
    depth           0: nothing is gained by planning ahead of what is done at once. (It may be set, to test the engine.)
    launch_seconds  a launch ends before the step that would take it beyond that; it has one at least
    """

    rows_may_end = True

    def __init__(
        self, model: CausalLM, kv_cache: Tensor, slots: SlotTable, valid_tokens: Tensor | None, max_replays: int = 1
    ) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.slots = slots
        self.block_size = kv_cache.shape[3]
        self.depth = 0
        self.max_replays = max_replays
        self.launch_seconds = LAUNCH_SECONDS
        self.clock = time.perf_counter
        self._prompts = PromptLogprobs(model, valid_tokens, kv_cache.device)
        self._decoding: DecodeRows | None = None  # those of the last launch

    def needs_host(self, seq: Sequence) -> bool:
        """What the slot does not know of: edits of the logits, and kept logits."""
        return seq.request.edits_logits or (seq.request.params.logprobs is not None and keeps_logits(seq))

    def release_cache(self) -> int:
        self._decoding = None
        return release_storage(self.kv_cache)

    def restore_cache(self) -> None:
        restore_storage(self.kv_cache)

    def launch(self, plan: Plan) -> Done:
        if plan.copies:
            copy_blocks(self.kv_cache, *(torch.tensor(side) for side in zip(*plan.copies, strict=True)))
        written = self.slots.sync_blocks()
        rows = len(plan.sampling)
        sampled = Sampled(np.tile(NOTHING, (plan.replays, rows, 1)), [None] * rows)
        if plan.chunks[-1].length == 1 and len(plan.sampling) == len(plan.chunks):
            plan.replays = self._decode(plan, written, sampled)
            sampled.results = sampled.results[: plan.replays]
        else:
            self._decoding = None
            self._mixed(plan.chunks, sampled)
        return Done(sampled)

    def _decode(self, plan: Plan, written: list[tuple[int, int, int]], sampled: Sampled) -> int:
        """Steps in which every row decodes. Returns how many."""
        start = self.clock()
        seqs, places = plan.sampling, np.arange(len(plan.sampling))
        decoding = self._decoding
        if decoding is None or not decoding.are(seqs):
            decoding = DecodeRows(seqs, self.slots, self.block_size)
        else:
            decoding.update(written)
        active = self.slots.fields[decoding.rows.slots, Field.ACTIVE] != 0
        done = 0
        for done, results in enumerate(sampled.results, 1):
            if not active.all():
                kept = np.flatnonzero(active)
                if not len(kept):
                    break
                seqs, places = [seqs[i] for i in kept.tolist()], places[kept]
                decoding = DecodeRows(seqs, self.slots, self.block_size)
            token_ids, batch = decoding.inputs()
            logits = self._prompts.logits(self.model(token_ids, batch, self.kv_cache))
            rows, logprobs = self._sample(logits, seqs, decoding.rows)
            results[places] = rows
            for i, entry in logprobs.items():
                sampled.logprobs[places[i]] = entry
            active = rows[:, Result.ACTIVE] != 0
            if (self.clock() - start) * (done + 1) > self.launch_seconds * done:
                break
        self._decoding = decoding
        return done

    def _mixed(self, chunks: list[Chunk], sampled: Sampled) -> None:
        """One step of chunks of any length."""
        active = [c for c in chunks if not c.samples or self.slots.fields[c.seq.slot, Field.ACTIVE]]
        sampling = [c for c in chunks if c.samples]
        places = [i for i, c in enumerate(sampling) if self.slots.fields[c.seq.slot, Field.ACTIVE]]
        if not active:
            return
        token_ids, batch = self._inputs(active)
        hidden = self.model(token_ids, batch, self.kv_cache)
        for chunk, start in zip(active, batch.query_start_list, strict=False):
            if chunk.seq.request.prompt_logprobs is not None:
                self._prompts.extend(chunk, hidden[start : start + chunk.length])
        if not places:
            return
        last = [end - 1 for c, end in zip(active, batch.query_start_list[1:], strict=True) if c.samples]
        seqs = [c.seq for c in active if c.samples]
        logits = self._prompts.logits(hidden[torch.tensor(last)])
        sampled.results[0, places], logprobs = self._sample(logits, seqs, StepRows.of(seqs, self.slots))
        for i, entry in logprobs.items():
            sampled.logprobs[places[i]] = entry

    def _inputs(self, chunks: list[Chunk]) -> tuple[Tensor, PackedBatch]:
        slots = np.array([c.seq.slot for c in chunks])
        lengths = np.array([c.length for c in chunks])
        starts = np.array([c.start for c in chunks])
        decodes = np.array([c.samples and c.length == 1 for c in chunks])
        starts[decodes] = self.slots.fields[slots[decodes], Field.LENGTH] - 1
        query_start, positions, places, token_ids = self.slots.lay_out(slots, starts, lengths, self.block_size)
        context = starts + lengths
        num_blocks = -(-int(context.max()) // self.block_size)
        batch = PackedBatch(
            positions=torch.from_numpy(positions),
            slot_mapping=torch.from_numpy(places),
            query_start=torch.tensor(query_start, dtype=torch.int32),
            query_start_list=query_start,
            context_lens=torch.from_numpy(context.astype(np.int32)),
            context_lens_list=context.tolist(),
            block_tables=torch.from_numpy(self.slots.block_tables[slots, :num_blocks]),
            num_decodes=int((lengths == 1).sum()),
        )
        return torch.from_numpy(token_ids), batch

    def _sample(
        self, logits: Tensor, seqs: list[Sequence], rows: StepRows
    ) -> tuple[np.ndarray, dict[int, dict[int, Logprob]]]:
        """Sample from logits, which may be edited, and advance the slots.

        Returns int32 [R, RESULT_WIDTH], and the logprobs of the rows where they are asked for.
        """
        table, slots = self.slots, rows.slots
        raw = [i for i in rows.by_host if wants(seqs[i], "raw_logprobs")]
        raw_logits = logits[torch.tensor(raw)] if raw else None
        unedited = logits[torch.from_numpy(rows.raw)] if len(rows.raw) else None
        banned = self._edit(logits, seqs, rows)
        sampled = sample(logits, rows.sampling).numpy().astype(np.int32)

        stepped = np.zeros((len(seqs), OUT_WIDTH), np.int32)
        stepped[:, Out.TOKEN] = sampled
        if len(rows.machine):
            machine = rows.machine
            stepped[machine] = step(table.programs, table.states, slots[machine], sampled[machine])
        results = advance_slots(
            table.fields, table.tokens, table.programs, table.states, slots, sampled, stepped, banned
        )

        if unedited is not None:
            _fill_logprobs(results, rows.raw, unedited)
        if len(rows.processed):
            _fill_logprobs(
                results, rows.processed, processed_logits(logits, rows.sampling)[torch.from_numpy(rows.processed)]
            )
        logprobs: dict[int, dict[int, Logprob]] = {}
        if raw_logits is not None:
            logprobs |= record_logprobs(seqs, raw, raw_logits, results.tolist())
        processed = [i for i in rows.by_host if wants(seqs[i], "processed_logprobs")]
        if processed:
            kept = processed_logits(logits, rows.sampling)[torch.tensor(processed)]
            logprobs |= record_logprobs(seqs, processed, kept, results.tolist())
        return results, logprobs

    def _edit(self, logits: Tensor, seqs: list[Sequence], rows: StepRows) -> np.ndarray:
        """Apply bias, bans and penalties in place. Returns bool [R], whether anything was banned."""
        banned = np.zeros(len(seqs), bool)
        edited = [i for i in rows.by_host if seqs[i].request.edits_logits]
        if edited:
            banned[edited] = edit_logits(logits, edited, [seqs[i] for i in edited])
        if len(rows.machine):
            slots = rows.slots[rows.machine]
            kinds = self.slots.states[slots, State.BAN]
            for k in np.flatnonzero(kinds).tolist():
                ids = banned_ids(self.slots.programs[slots[k]], int(kinds[k]))
                if ids:
                    logits[rows.machine[k], list(ids)] = BANNED
                    banned[rows.machine[k]] = True
        return banned


def _fill_logprobs(results: np.ndarray, rows: np.ndarray, logits: Tensor) -> None:
    """LOGPROB and RANK of results[rows], of their own logits [R, vocab]; nothing was taken back there."""
    tokens = torch.from_numpy(results[rows, Result.TOKEN].clip(0).astype(np.int64))
    chosen, rank, *_ = token_logprobs(logits, tokens, 0)
    results[rows, Result.LOGPROB] = chosen.numpy().view(np.int32)
    results[rows, Result.RANK] = rank.numpy()


# The row of a sequence that had ended before the step.
NOTHING = np.zeros(RESULT_WIDTH, np.int32)
NOTHING[Result.TOKEN] = -1
