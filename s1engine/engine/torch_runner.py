"""Runs plans on the CPU, at once: inputs from the slot table, model, sampler, thinking machine, back into the slots."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from s1engine.engine.logit_edits import BANNED, edit_logits
from s1engine.engine.request import Sequence
from s1engine.engine.runner import PromptLogprobs, Sampled, copy_blocks, record_logprobs, wants
from s1engine.engine.scheduler import Chunk, Plan
from s1engine.engine.slots import SlotTable
from s1engine.kernels.sampler import processed_logits, sample
from s1engine.kernels.slot_layout import RESULT_WIDTH, Field, Result
from s1engine.kernels.slot_step import advance_slots
from s1engine.models import CausalLM
from s1engine.models.batch import PackedBatch
from s1engine.outputs import Logprob
from s1engine.thinking.layout import OUT_WIDTH, State
from s1engine.thinking.program import banned_ids
from s1engine.thinking.stepper import step


@dataclass(slots=True)
class Done:
    """A launch that is over."""

    sampled: Sampled

    def collect(self) -> Sampled:
        return self.sampled


class TorchRunner:
    """See `runner.Runner`. valid_tokens: bool [vocab], False for ids that the tokenizer lacks (None: all are valid).

    kv_cache  [layers, 2, blocks, block_size, kv_heads, head_dim]
    depth     0: nothing is gained by planning ahead of what is done at once. (It may be set, to see that it works.)
    """

    def __init__(self, model: CausalLM, kv_cache: Tensor, slots: SlotTable, valid_tokens: Tensor | None) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.slots = slots
        self.block_size = kv_cache.shape[3]
        self.depth = 0
        self._prompts = PromptLogprobs(model, valid_tokens, kv_cache.device)

    def needs_host(self, seq: Sequence) -> bool:
        """What the slot does not know of: edits of the logits, and kept logits."""
        return seq.request.edits_logits or seq.request.params.logprobs is not None

    def launch(self, plan: Plan) -> Done:
        if plan.copies:
            copy_blocks(self.kv_cache, *(torch.tensor(side) for side in zip(*plan.copies, strict=True)))
        for chunk in plan.chunks:
            self.slots.sync_blocks(chunk.seq)
        sampled = Sampled([[] for _ in plan.sampling], [None] * len(plan.sampling))
        for _ in range(plan.replays):
            self._step(plan.chunks, sampled)
        return Done(sampled)

    def _step(self, chunks: list[Chunk], sampled: Sampled) -> None:
        active = [c for c in chunks if not c.samples or self.slots.fields[c.seq.slot, Field.ACTIVE]]
        places = [
            i for i, c in enumerate(c for c in chunks if c.samples) if self.slots.fields[c.seq.slot, Field.ACTIVE]
        ]
        results: list[list[int]] = []
        logprobs: list[dict[int, Logprob] | None] = []
        if active:
            token_ids, batch = self._inputs(active)
            hidden = self.model(token_ids, batch, self.kv_cache)
            for chunk, start in zip(active, batch.query_start_list, strict=False):
                if chunk.seq.request.prompt_logprobs is not None:
                    self._prompts.extend(chunk, hidden[start : start + chunk.length])
            last = [end - 1 for c, end in zip(active, batch.query_start_list[1:], strict=True) if c.samples]
            if last:
                logits = self._prompts.logits(hidden[torch.tensor(last)])
                results, logprobs = self._sample(logits, [c.seq for c in active if c.samples])
        for rows in sampled.rows:
            rows.append(NOTHING)
        for place, row, entry in zip(places, results, logprobs, strict=True):
            sampled.rows[place][-1] = row
            sampled.logprobs[place] = entry

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

    def _sample(self, logits: Tensor, seqs: list[Sequence]) -> tuple[list[list[int]], list[dict[int, Logprob] | None]]:
        table = self.slots
        slots = np.array([seq.slot for seq in seqs], np.int32)
        raw = [i for i, s in enumerate(seqs) if wants(s, "raw_logprobs")]
        raw_logits = logits[torch.tensor(raw)] if raw else None
        banned = self._edit(logits, seqs, slots)
        sampling = table.sampling_batch(slots)
        sampled = sample(logits, sampling).numpy().astype(np.int32)

        stepped = np.zeros((len(seqs), OUT_WIDTH), np.int32)
        stepped[:, Result.TOKEN] = sampled
        machine = np.flatnonzero(table.fields[slots, Field.HAS_MACHINE])
        if len(machine):
            stepped[machine] = step(table.programs, table.states, slots[machine], sampled[machine])
        rows = advance_slots(table.fields, table.tokens, table.programs, table.states, slots, stepped, banned).tolist()

        logprobs: list[dict[int, Logprob] | None] = [None] * len(seqs)
        if raw_logits is not None:
            record_logprobs(seqs, raw, raw_logits, rows, logprobs)
        processed = [i for i, s in enumerate(seqs) if wants(s, "processed_logprobs")]
        if processed:
            kept = processed_logits(logits, sampling)[torch.tensor(processed)]
            record_logprobs(seqs, processed, kept, rows, logprobs)
        return rows, logprobs

    def _edit(self, logits: Tensor, seqs: list[Sequence], slots: np.ndarray) -> np.ndarray:
        """Apply bias, bans and penalties in place. Returns bool [R], whether anything was banned."""
        banned = np.zeros(len(seqs), bool)
        rows = [i for i, seq in enumerate(seqs) if seq.request.edits_logits]
        if rows:
            banned[rows] = edit_logits(logits, rows, [seqs[i] for i in rows])
        kinds = self.slots.states[slots, State.BAN] * self.slots.fields[slots, Field.HAS_MACHINE]
        for i in np.flatnonzero(kinds).tolist():
            ids = banned_ids(self.slots.programs[slots[i]], int(kinds[i]))
            if ids:
                logits[i, list(ids)] = BANNED
                banned[i] = True
        return banned


# The row of a sequence that had ended before the step.
NOTHING = [0] * RESULT_WIDTH
NOTHING[Result.TOKEN] = -1
