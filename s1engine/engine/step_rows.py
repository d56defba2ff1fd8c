"""The rows of a step that sample, as arrays: all that stays the same of them from one step to the next.

Made once for a batch and kept while nobody enters it, so that a step costs no loop over its rows in Python.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from s1engine.engine.request import Sequence
from s1engine.engine.slots import SlotTable
from s1engine.kernels.sampler import SamplingBatch
from s1engine.kernels.slot_layout import Field
from s1engine.models.batch import PackedBatch


@dataclass(slots=True)
class StepRows:
    """R rows, one a sequence.

    slots      int32 [R]
    machine    int64 [M], the rows that have a thinking machine
    by_host    the rows whose logits the host edits or keeps
    raw, processed   int64, the rows that want the log probability of their token alone, of that distribution
    sampling   how they are sampled, at the positions that come next
    """

    slots: np.ndarray
    machine: np.ndarray
    by_host: list[int]
    raw: np.ndarray
    processed: np.ndarray
    sampling: SamplingBatch

    @classmethod
    def of(cls, seqs: list[Sequence], table: SlotTable) -> StepRows:
        slots = np.array([seq.slot for seq in seqs], np.int32)
        modes = [
            None if seq.needs_host or seq.request.params.logprobs is None else seq.request.params.logprobs_mode
            for seq in seqs
        ]
        return cls(
            slots=slots,
            machine=np.flatnonzero(table.fields[slots, Field.HAS_MACHINE]),
            by_host=[i for i, seq in enumerate(seqs) if seq.needs_host],
            raw=np.array([i for i, mode in enumerate(modes) if mode == "raw_logprobs"], np.int64),
            processed=np.array([i for i, mode in enumerate(modes) if mode == "processed_logprobs"], np.int64),
            sampling=table.sampling_batch(slots),
        )


class DecodeRows:
    """Rows that all decode, and where their blocks are."""

    def __init__(self, seqs: list[Sequence], table: SlotTable, block_size: int) -> None:
        self.rows = StepRows.of(seqs, table)
        self._table, self._block_size = table, block_size
        self._num_assigned = table.num_assigned
        slots = self._slots = self.rows.slots.tolist()
        self._row_of = {slot: row for row, slot in enumerate(slots)}
        self._index = np.arange(len(slots))
        self._query_start = torch.arange(len(slots) + 1, dtype=torch.int32)
        # As wide as the table, so that rows can grow; what lies beyond a row's blocks is never read.
        used = max(len(seq.table.blocks) for seq in seqs if seq.table is not None)
        self._blocks = np.zeros((len(slots), table.block_tables.shape[1]), np.int32)
        self._blocks[:, :used] = table.block_tables[slots, :used]

    def are(self, seqs: list[Sequence]) -> bool:
        """Whether these are the sequences it was made of. (A slot is a sequence's until another one is given out.)"""
        return self._num_assigned == self._table.num_assigned and self._slots == [seq.slot for seq in seqs]

    def update(self, written: list[tuple[int, int, int]]) -> None:
        """Follow what `SlotTable.sync_blocks` wrote."""
        for slot, start, end in written:
            row = self._row_of.get(slot)
            if row is not None:
                self._blocks[row, start:end] = self._table.block_tables[slot, start:end]

    def inputs(self) -> tuple[Tensor, PackedBatch]:
        """Token ids int64 [R] and batch of the next step, in which each row computes its newest token."""
        slots = self.rows.slots
        lengths = self._table.fields[slots, Field.LENGTH]
        positions = lengths.astype(np.int64) - 1
        block, offset = np.divmod(positions, self._block_size)
        places = self._blocks[self._index, block].astype(np.int64) * self._block_size + offset
        self.rows.sampling.positions = torch.from_numpy(positions + 1)
        batch = PackedBatch(
            positions=torch.from_numpy(positions),
            slot_mapping=torch.from_numpy(places),
            query_start=self._query_start,
            query_start_list=list(range(len(slots) + 1)),
            context_lens=torch.from_numpy(lengths),
            context_lens_list=lengths.tolist(),
            block_tables=torch.from_numpy(self._blocks),
            num_decodes=len(slots),
        )
        return torch.from_numpy(self._table.tokens[slots, positions].astype(np.int64)), batch
