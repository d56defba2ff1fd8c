"""The inputs of a decode step against a loop over its rows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s1engine.kernels.decode_inputs_triton import MAX_ROWS, allocate, build_decode_inputs
from s1engine.kernels.slot_layout import FIELD_WIDTH, Field

POISON = -123456


def reference(rows, fields, tokens, block_tables, block_size, split_keys):
    """(token_ids, positions, slot_mapping, context_lens, split_start, work), work without the unused rest."""
    columns, starts, work = [], [0], []
    for row, slot in enumerate(rows.tolist()):
        column = (0, 0, -1, 0)
        if slot >= 0 and fields[slot, Field.ACTIVE]:
            length = int(fields[slot, Field.LENGTH])
            block, offset = divmod(length - 1, block_size)
            column = (
                tokens[slot, length - 1],
                length - 1,
                int(block_tables[slot, block]) * block_size + offset,
                length,
            )
        columns.append(column)
        splits = -(-column[3] // split_keys)
        starts.append(starts[-1] + splits)
        work += [(row, split) for split in range(splits)]
    return (*np.array(columns, np.int64).T, np.array(starts), np.array(work, np.int64).reshape(-1, 2))


class Slots:
    """Random slots; whatever belongs to no known token, no used block and no active slot is garbage."""

    def __init__(self, seed, num_slots, max_len, block_size):
        self.generator = generator = np.random.default_rng(seed)
        self.block_size, self.max_len = block_size, max_len
        max_blocks = -(-max_len // block_size)
        self.fields, self.tokens, self.block_tables = (
            generator.integers(-(2**31), 2**31, (num_slots, width), dtype=np.int32)
            for width in (FIELD_WIDTH, max_len, max_blocks)
        )
        self.fields[:, Field.ACTIVE] = generator.random(num_slots) < 0.8
        for slot in np.flatnonzero(self.fields[:, Field.ACTIVE]):
            length = int(generator.integers(1, max_len + 1))
            self.fields[slot, Field.LENGTH] = length
            self.tokens[slot, :length] = generator.integers(0, 200_000, length)
            used = -(-length // block_size)
            # Blocks whose positions need 64 bits where there are 16 in a block.
            self.block_tables[slot, :used] = generator.integers(0, 2**31, used)

    def rows(self, count, padding):
        """Distinct slots, and -1 in the places of padding."""
        rows = self.generator.permutation(len(self.fields))[:count].astype(np.int32)
        rows[self.generator.random(count) < padding] = -1
        return rows

    def check(self, rows, split_keys, device, spare_rows=0):
        """A call on the first rows of a larger allocation, which must leave everything else as it is."""
        max_splits = -(-self.max_len // split_keys)
        whole = allocate(len(rows) + spare_rows, max_splits, device)
        for tensor in vars(whole).values():
            tensor.fill_(POISON)
        counter = torch.tensor([6], dtype=torch.int32, device=device)
        arguments = [
            torch.tensor(array, device=device) for array in (rows, self.fields, self.tokens, self.block_tables)
        ]
        build_decode_inputs(*arguments, self.block_size, whole.narrow(len(rows)), counter, split_keys)
        expected = reference(rows, self.fields, self.tokens, self.block_tables, self.block_size, split_keys)
        for tensor, values in zip(vars(whole).values(), expected, strict=True):
            assert torch.equal(tensor[: len(values)].cpu().long(), torch.from_numpy(values))
            assert (tensor[len(values) :] == POISON).all()
        assert counter.tolist() == [7]
        for given_tensor, array in zip(arguments, (rows, self.fields, self.tokens, self.block_tables), strict=True):
            assert np.array_equal(given_tensor.cpu().numpy(), array)


@given(
    count=st.integers(1, 40),
    padding=st.sampled_from([0.0, 0.3, 1.0]),
    max_len=st.integers(1, 200),
    block_size=st.sampled_from([1, 3, 16]),
    split_keys=st.sampled_from([1, 4, 256]),
    spare_rows=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_small(device, count, padding, max_len, block_size, split_keys, spare_rows, seed):
    slots = Slots(seed, count + 3, max_len, block_size)
    slots.check(slots.rows(count, padding), split_keys, device, spare_rows)


@pytest.mark.parametrize("count", [1, 63, 64, 65, 256, 1000, MAX_ROWS])
def test_many_rows(device, count):
    slots = Slots(count, count + 8, 1500, 16)
    slots.check(slots.rows(count, 0.1), 256, device, spare_rows=1 if count < MAX_ROWS else 0)


@pytest.mark.parametrize("length", [1, 255, 256, 257, 131072])
def test_lengths_around_a_split(device, length):
    """The longest has more splits than are written at a time."""
    slots = Slots(0, 2, length, 16)
    slots.fields[:, Field.ACTIVE] = 1
    slots.fields[:, Field.LENGTH] = length
    slots.tokens[:] = 5
    slots.block_tables[:] = 9
    slots.check(np.array([1, -1, 0], np.int32), 256, device)


def test_steps_are_counted_from_minus_one(device):
    slots = Slots(0, 1, 8, 4)
    arguments = [torch.tensor(a, device=device) for a in (np.zeros(1, np.int32), slots.fields, slots.tokens)]
    counter = torch.full((1,), -1, dtype=torch.int32, device=device)
    inputs = allocate(1, 1, device)
    for step in range(3):
        build_decode_inputs(*arguments, torch.zeros(1, 2, dtype=torch.int32, device=device), 4, inputs, counter, 256)
        assert counter.item() == step


def test_a_new_allocation_is_a_step_without_work(device):
    inputs = allocate(3, 5, device)
    assert inputs.slot_mapping.tolist() == [-1] * 3
    assert not inputs.context_lens.any() and not inputs.split_start.any()
    assert inputs.split_start.shape == (4,) and inputs.work.shape == (15, 2)
    part = inputs.narrow(2)
    assert [len(t) for t in vars(part).values()] == [2, 2, 2, 2, 3, 10]
    assert all(
        view.data_ptr() == t.data_ptr() for view, t in zip(vars(part).values(), vars(inputs).values(), strict=True)
    )
    assert [t.dtype for t in vars(inputs).values()] == [torch.int64] * 3 + [torch.int32] * 3


def test_too_many_rows(device):
    with pytest.raises(ValueError, match=f"at most {MAX_ROWS} rows"):
        allocate(MAX_ROWS + 1, 1, device)
    rows = torch.full((MAX_ROWS + 1,), -1, dtype=torch.int32, device=device)
    none = torch.zeros(1, FIELD_WIDTH, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=f"at most {MAX_ROWS} rows"):
        build_decode_inputs(rows, none, none, none, 16, allocate(1, 1, device), rows, 256)
