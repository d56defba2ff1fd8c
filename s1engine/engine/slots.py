"""The slot table: one row a running sequence, at addresses that never move.

A step refers to sequences by their slots, and a slot holds all that the step must know of its sequence: so a step can
follow another without the host in between. The host writes a row when a sequence enters it, and only differences after;
what a step changes (lengths, tokens, thinking states) it reads back only where it has to.
"""

from __future__ import annotations

import numpy as np

from s1engine.engine.request import Sequence
from s1engine.kernels.sampler import SamplingBatch
from s1engine.kernels.slot_layout import FIELD_WIDTH, MAX_STOP_IDS, Field
from s1engine.kernels.slot_step import sampling_batch
from s1engine.thinking.layout import PROGRAM_WIDTH, STATE_WIDTH, State


class SlotTable:
    """Rows for `num_slots` sequences of up to `max_len` tokens, in host memory.

    block_tables  int32 [num_slots, max_blocks]    physical KV blocks, in order
    tokens        int32 [num_slots, max_len]       prompt and output
    fields        int32 [num_slots, FIELD_WIDTH]   columns of slot_layout.Field
    programs      int32 [num_slots, PROGRAM_WIDTH] thinking program, where HAS_MACHINE
    states        int32 [num_slots, STATE_WIDTH]   its state
    """

    def __init__(self, num_slots: int, max_blocks: int, max_len: int, eos_token_ids: frozenset[int]) -> None:
        self.num_slots = num_slots
        self.eos_token_ids = eos_token_ids
        self.block_tables = np.zeros((num_slots, max_blocks), np.int32)
        self.tokens = np.zeros((num_slots, max_len), np.int32)
        self.fields = np.zeros((num_slots, FIELD_WIDTH), np.int32)
        self.programs = np.zeros((num_slots, PROGRAM_WIDTH), np.int32)
        self.states = np.zeros((num_slots, STATE_WIDTH), np.int32)
        self.num_assigned = 0  # slots given out so far: rows are the same ones while it is
        self._num_uploaded = [0] * num_slots
        self._changed: dict[int, Sequence] = {}  # by slot: their block tables lack blocks
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def assign(self, seq: Sequence) -> None:
        """Give a sequence a slot and fill its row."""
        slot = seq.slot = self._free.pop()
        self.num_assigned += 1
        self._num_uploaded[slot] = 0
        self._changed[slot] = seq
        self.tokens[slot, : seq.known] = seq.tokens
        self.fields[slot] = self._fields(seq)
        if seq.thinking is not None:
            self.programs[slot] = seq.thinking.program
            self.states[slot] = seq.thinking.state

    def _fields(self, seq: Sequence) -> np.ndarray:
        params = seq.request.params
        row = np.zeros(FIELD_WIDTH, np.int32)
        real = row.view(np.float32)
        row[Field.LENGTH], row[Field.LIMIT], row[Field.ACTIVE] = seq.known, seq.limit, 1
        row[Field.SEED_LOW : Field.SEED_HIGH + 1].view(np.int64)[:] = seq.seed
        real[Field.TEMPERATURE], real[Field.TOP_P], real[Field.MIN_P] = params.temperature, params.top_p, params.min_p
        row[Field.TOP_K] = max(params.top_k, 0)
        if seq.thinking is not None:
            row[Field.HAS_MACHINE], row[Field.RESERVE] = 1, seq.thinking.reserve
            row[Field.USER_CAP] = -1 if seq.thinking.user_cap is None else seq.thinking.user_cap
        # A sequence with more of them than fit is ended by the host, a step later.
        stops = sorted(seq.end_ids)[:MAX_STOP_IDS]
        row[Field.NUM_STOPS] = len(stops)
        row[Field.STOPS : Field.STOPS + len(stops)] = stops
        real[Field.REPETITION] = 1.0
        return row

    def release(self, seq: Sequence) -> None:
        """Take a sequence's slot. What the slot knows of it is lost: `read_state` comes before where it will resume."""
        self._changed.pop(seq.slot, None)
        self._free.append(seq.slot)
        seq.slot = -1

    def read_state(self, slot: int) -> np.ndarray:
        """The thinking state of a slot as the last step left it."""
        return self.states[slot].copy()

    def close_thinking(self, slot: int) -> None:
        """Let a slot's thinking budget be used up from the next step on."""
        self.states[slot, State.MAX_TOKENS] = 0
        self.fields[slot, Field.USER_CAP] = 0

    def blocks_changed(self, seq: Sequence, first: int) -> None:
        """The sequence has new blocks, or others, from entry `first` of its table on."""
        self._num_uploaded[seq.slot] = min(self._num_uploaded[seq.slot], first)
        self._changed[seq.slot] = seq

    def sync_blocks(self) -> list[tuple[int, int, int]]:
        """Write the block ids that rows lack. Returns (slot, start, end) of the entries written."""
        written = []
        for slot, seq in self._changed.items():
            assert seq.table is not None
            start, blocks = self._num_uploaded[slot], seq.table.blocks
            if start != len(blocks):
                self._write_blocks(slot, start, blocks[start:])
                self._num_uploaded[slot] = len(blocks)
                written.append((slot, start, len(blocks)))
        self._changed.clear()
        return written

    def _write_blocks(self, slot: int, start: int, blocks: list[int]) -> None:
        self.block_tables[slot, start : start + len(blocks)] = blocks

    def lay_out(
        self, slots: np.ndarray, starts: np.ndarray, lengths: np.ndarray, block_size: int
    ) -> tuple[list[int], np.ndarray, np.ndarray, np.ndarray]:
        """Chunks end to end: tokens [starts, starts + lengths) of each of `slots`, all three [S].

        Returns where each chunk begins, [S + 1], and of all T tokens, int64 [T]: positions, places of their keys and
        values in the cache, and ids.
        """
        query_start = [0, *np.cumsum(lengths).tolist()]
        owner = np.repeat(slots, lengths)
        positions = np.arange(query_start[-1]) - np.repeat(np.array(query_start[:-1]) - starts, lengths)
        blocks = self.block_tables[owner, positions // block_size].astype(np.int64)
        token_ids = self.tokens[owner, positions].astype(np.int64)
        return query_start, positions, blocks * block_size + positions % block_size, token_ids

    def sampling_batch(self, rows: np.ndarray) -> SamplingBatch:
        """The sampler's view of slots `rows` [R], each sampling at its next position."""
        return sampling_batch(self.fields[rows])
