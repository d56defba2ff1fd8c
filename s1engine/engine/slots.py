"""The slot table: one row a running sequence, at addresses that never move.

A step refers to sequences by their slots. The host writes a row when a sequence enters it, and only differences after.
"""

from __future__ import annotations

import numpy as np
import torch

from s1engine.engine.request import Sequence
from s1engine.kernels.sampler import SamplingBatch
from s1engine.thinking.layout import PROGRAM_WIDTH, STATE_WIDTH


class SlotTable:
    """Rows for `num_slots` sequences.

    block_tables  int32 [num_slots, max_blocks]   physical KV blocks, in order
    temperature, top_p, min_p float32; top_k, seeds int64; all [num_slots]
    programs      int32 [num_slots, PROGRAM_WIDTH]   thinking program, where has_machine
    states        int32 [num_slots, STATE_WIDTH]     its state
    """

    def __init__(self, num_slots: int, max_blocks: int) -> None:
        self.num_slots = num_slots
        self.block_tables = np.zeros((num_slots, max_blocks), np.int32)
        self.temperature = np.zeros(num_slots, np.float32)
        self.top_p = np.ones(num_slots, np.float32)
        self.min_p = np.zeros(num_slots, np.float32)
        self.top_k = np.zeros(num_slots, np.int64)
        self.seeds = np.zeros(num_slots, np.int64)
        self.has_machine = np.zeros(num_slots, bool)
        self.programs = np.zeros((num_slots, PROGRAM_WIDTH), np.int32)
        self.states = np.zeros((num_slots, STATE_WIDTH), np.int32)
        self._num_uploaded = [0] * num_slots
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def assign(self, seq: Sequence) -> None:
        """Give a sequence a slot and fill its row."""
        slot = seq.slot = self._free.pop()
        params = seq.request.params
        self.temperature[slot] = params.temperature
        self.top_p[slot] = params.top_p
        self.min_p[slot] = params.min_p
        self.top_k[slot] = max(params.top_k, 0)
        self.seeds[slot] = seq.seed
        self._num_uploaded[slot] = 0
        self.has_machine[slot] = seq.thinking is not None
        if seq.thinking is not None:
            self.programs[slot] = seq.thinking.program
            self.states[slot] = seq.thinking.state

    def release(self, seq: Sequence) -> None:
        """Take a sequence's slot; the thinking state goes back to the sequence, which may be resumed elsewhere."""
        if seq.thinking is not None:
            seq.thinking.state = self.states[seq.slot].copy()
        self._free.append(seq.slot)
        seq.slot = -1

    def invalidate_blocks(self, seq: Sequence, num_valid: int) -> None:
        """Entries of the block table from `num_valid` on have changed."""
        self._num_uploaded[seq.slot] = min(self._num_uploaded[seq.slot], num_valid)

    def sync_blocks(self, seq: Sequence) -> None:
        """Upload the block ids that the row lacks."""
        assert seq.table is not None
        done, blocks = self._num_uploaded[seq.slot], seq.table.blocks
        if done != len(blocks):
            self.block_tables[seq.slot, done : len(blocks)] = blocks[done:]
            self._num_uploaded[seq.slot] = len(blocks)

    def sampling_batch(self, rows: np.ndarray, positions: np.ndarray) -> SamplingBatch:
        """The sampler's view of slots `rows` [R], each sampling at `positions` [R] of its whole sequence."""
        temperature, top_k = self.temperature[rows], self.top_k[rows]
        top_p, min_p = self.top_p[rows], self.min_p[rows]
        return SamplingBatch(
            temperature=torch.from_numpy(temperature),
            top_k=torch.from_numpy(top_k),
            top_p=torch.from_numpy(top_p),
            min_p=torch.from_numpy(min_p),
            seeds=torch.from_numpy(self.seeds[rows]),
            positions=torch.from_numpy(positions),
            all_greedy=not temperature.any(),
            any_top_k=bool(top_k.any()),
            any_top_p=bool((top_p < 1).any()),
            any_min_p=bool(min_p.any()),
        )
