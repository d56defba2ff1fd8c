"""The packed form of a weight: writing rows, reading them back, and looking up those of an embedding, bit for bit."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from conditions import needs_csrc
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from s1engine.kernels.packed import pack_rows_, packed_embedding, packed_shape, unpack_rows_

sources = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
targets = st.sampled_from([torch.float32, torch.bfloat16])
counts = st.one_of(st.integers(1, 3), st.integers(1, 70))
examples = settings(max_examples=80, deadline=None)


def numbers(count: int, inputs: int, dtype: torch.dtype, offset: int = 0, seed: int = 0) -> Tensor:
    """Rows over all exponents, some of them zero, infinite or too small for a normal number."""
    generator = torch.Generator().manual_seed(seed)
    size = count * inputs + offset
    values = torch.randn(size, generator=generator) * torch.exp2(torch.randint(-30, 12, (size,), generator=generator))
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-40, -6e-8, 5.9e-6])
    chosen = torch.rand(size, generator=generator) < 0.1
    values[chosen] = special[torch.randint(len(special), (int(chosen.sum()),), generator=generator)]
    return values.to(dtype)[offset:].view(count, inputs)


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def write_by_hand(weight: Tensor, rows: Tensor, first: int, half: int) -> None:
    """The definition: a loop over outputs. What is behind the last input of a step is zero."""
    width = 32 if half < 0 else 16
    filled = torch.zeros(rows.size(0), weight.size(1) * weight.size(3), dtype=weight.dtype)
    filled[:, : rows.size(1)] = rows.to(weight.dtype)
    for output, row in enumerate(filled, first):
        column = output % width + (16 if half == 1 else 0)
        weight[output // width, :, column] = row.view(weight.size(1), weight.size(3))


@examples
@given(counts, st.integers(1, 100), sources, targets, st.integers(0, 40), st.integers(-1, 1), st.integers(0, 1))
def test_rows_written_and_read_back(count, inputs, source, target, first, half, offset):
    rows = numbers(count, inputs, source, offset)
    outputs = first + count
    shape = packed_shape(outputs if half < 0 else 2 * outputs, inputs, target, gated=half >= 0)
    size = torch.Size(shape).numel()
    weight = torch.full((size + offset,), 7.0, dtype=target)[offset:].view(shape)  # sevens: what is not written stays
    expected = weight.clone()
    write_by_hand(expected, rows, first, half)
    pack_rows_(weight, rows, first, half)
    assert torch.equal(bits(weight), bits(expected))

    for dtype in {torch.float32, target}:
        storage = torch.full((count * inputs + 1 + offset,), 7.0, dtype=dtype)
        back = storage[offset:-1].view(count, inputs)
        unpack_rows_(back, weight, first, half)
        assert torch.equal(bits(back), bits(rows.to(target).to(dtype)))
        assert storage[-1] == 7 and (offset == 0 or storage[0] == 7)


@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16])
def test_every_number_of_sixteen_bits(source, target):
    rows = torch.arange(1 << 16).to(torch.uint16).view(source).view(256, 256)
    weight = torch.zeros(packed_shape(256, 256, target), dtype=target)
    pack_rows_(weight, rows, 0, -1)
    back = torch.empty_like(rows, dtype=target)
    unpack_rows_(back, weight, 0, -1)
    expected = rows.to(target)
    number = ~rows.isnan()
    assert torch.equal(bits(back)[number], bits(expected)[number])
    assert back[~number].isnan().all()


def test_rounding_to_bfloat16_is_to_nearest_even():
    """All float32 numbers between two of bfloat16 that differ in the last bit, and some that overflow."""
    low = torch.arange(1 << 16, dtype=torch.int32)
    upper = torch.tensor([0x3F80, 0x3F81, 0x0000, 0x7F7F, 0x0080 - 1], dtype=torch.int32) << 16
    rows = (upper.unsqueeze(1) + low).view(torch.float32)
    weight = torch.zeros(packed_shape(5, 1 << 16, torch.bfloat16), dtype=torch.bfloat16)
    pack_rows_(weight, rows, 0, -1)
    back = torch.empty_like(rows, dtype=torch.bfloat16)
    unpack_rows_(back, weight, 0, -1)
    assert torch.equal(bits(back), bits(rows.to(torch.bfloat16)))


@pytest.mark.parametrize("half", [-1, 0, 1])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16])
def test_pieces_and_threads_give_the_same_weight(target, half):
    count, inputs = 203, 333
    rows = numbers(count, inputs, torch.float32)
    shape = packed_shape(count if half < 0 else 2 * count, inputs, target, gated=half >= 0)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            for cuts in ([0, count], [0, 1, 17, 64, 100, count]):
                weight = torch.zeros(shape, dtype=target)
                for start, end in pairwise(cuts):
                    pack_rows_(weight, rows[start:end], start, half)
                results.append(weight)
    finally:
        torch.set_num_threads(threads)
    expected = torch.zeros(shape, dtype=target)
    write_by_hand(expected, rows, 0, half)
    for weight in results:
        assert torch.equal(bits(weight), bits(expected))


@examples
@given(st.integers(0, 70), st.integers(1, 100), st.integers(1, 300), targets, st.integers(0, 1))
def test_embedding(count, outputs, inputs, target, offset):
    rows = numbers(outputs, inputs, target)
    shape = packed_shape(outputs, inputs, target)
    weight = torch.zeros(torch.Size(shape).numel() + offset, dtype=target)[offset:].view(shape)
    pack_rows_(weight, rows, 0, -1)
    ids = torch.randint(outputs, (count + offset,), generator=torch.Generator().manual_seed(count))[offset:]
    found = packed_embedding(ids, weight, inputs)
    assert found.dtype == torch.float32
    assert torch.equal(bits(found), bits(rows[ids].float()))


def test_nothing_to_write():
    weight = torch.full(packed_shape(40, 7, torch.bfloat16), 7.0, dtype=torch.bfloat16)
    pack_rows_(weight, torch.empty(0, 7), 3, -1)
    unpack_rows_(torch.empty(0, 7), weight, 3, -1)
    assert (weight == 7).all()


@needs_csrc
@pytest.mark.parametrize(
    ("first", "count", "half", "message"),
    [(17, 16, 0, "beyond"), (0, 65, -1, "beyond"), (-1, 2, -1, "beyond"), (30, 3, 1, "beyond"), (0, 1, 2, "half")],
)
def test_rows_beyond_the_end_are_refused(first, count, half, message):
    storage = torch.zeros(packed_shape(64, 8, torch.float32))
    with pytest.raises(RuntimeError, match=message):
        pack_rows_(storage, torch.ones(count, 8), first, half)
    assert not storage.any()
