"""int8 weights: the packed form byte by byte, what rounding may lose, and products to the rounding of float32."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from s1engine.kernels.packed import pack_rows_, packed_embedding, packed_linear, unpack_rows_
from s1engine.kernels.packed_int8 import (
    BLOCK,
    HALF,
    PANEL,
    dequantise,
    int8_product,
    packed_int8_shape,
    quantise_rows,
    quantise_weight,
)

sources = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
counts = st.one_of(st.integers(1, 3), st.integers(1, 70))
examples = settings(max_examples=80, deadline=None)


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers, some blocks a thousand times larger than others, some zero."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * scale
    sizes = torch.tensor([0.0, 1e-3, 1.0, 1.0, 1.0])[torch.randint(5, (*shape[:-1], 8), generator=generator)]
    return values * sizes.repeat_interleave(29, -1).repeat(1, -(-shape[-1] // 232))[..., : shape[-1]]


def storage(outputs: int, inputs: int, gated: bool = False, fill: int = 0) -> Tensor:
    return torch.full(packed_int8_shape(outputs, inputs, gated), fill, dtype=torch.int8)


def packed(weight: Tensor, gated: bool = False) -> Tensor:
    count = weight.size(0) // 2 if gated else weight.size(0)
    out = storage(*weight.shape, gated)
    for half in (0, 1) if gated else (-1,):
        start = max(half, 0) * count
        pack_rows_(out, weight[start : start + count].contiguous(), 0, half)
    return out


def write_by_hand(weight: Tensor, rows: Tensor, first: int, half: int) -> None:
    """The definition in NumPy: a loop over outputs and inputs, bytes and 16-bit scales."""
    panels = weight.numpy().view(np.uint8)
    width = PANEL if half < 0 else HALF
    for output, row in enumerate(rows.float().numpy(), first):
        column = output % width + (HALF if half == 1 else 0)
        start = 0
        for i in range(0, len(row), BLOCK):
            block = row[i : i + BLOCK]
            largest = np.abs(block).max()
            scale = np.array([largest / np.float32(127)], dtype=np.float32)
            if scale.view(np.uint32)[0] & 0xFFFF:
                scale = ((scale.view(np.uint32) | 0xFFFF) + 1).view(np.float32)
            inverse = np.float32(1) / scale[0] if largest else np.float32(0)
            steps = -(-len(block) // 4)
            codes = np.full(steps * 4, 128)
            codes[: len(block)] = 128 + np.rint(block * inverse)
            for step in range(steps):
                at = start + step * 128 + column * 4
                panels[output // width, at : at + 4] = codes[4 * step : 4 * step + 4]
            start += steps * 128
            panels[output // width, start + 2 * column : start + 2 * column + 2] = scale.view(np.uint8)[2:]
            start += 64


@examples
@given(counts, st.integers(1, 300), sources, st.integers(0, 40), st.integers(-1, 1), st.booleans())
def test_packed_bytes(count, inputs, source, first, half, aligned):
    rows = draw(count, inputs).to(source)
    outputs = first + count
    weight = storage(outputs if half < 0 else 2 * outputs, inputs, half >= 0, fill=7)  # what is not written stays
    if not aligned:
        weight = torch.cat([weight.flatten(), weight.new_zeros(2)])[2:].view_as(weight).fill_(7)
    expected = weight.clone()
    write_by_hand(expected, rows, first, half)
    pack_rows_(weight, rows, first, half)
    assert torch.equal(weight, expected)

    back = torch.empty(count, inputs)
    unpack_rows_(back, weight, first, half)
    assert torch.equal(back, dequantise(*quantise_weight(rows), inputs))


@examples
@given(counts, st.integers(1, 300), st.sampled_from([1e-20, 1.0, 1e20]))
def test_what_rounding_loses(count, inputs, scale):
    """A weight is at most half a step away; a step is 1/127 of its block's largest, and the scale up to 2^-7 larger."""
    rows = draw(count, inputs, scale=scale)
    back = torch.empty_like(rows)
    unpack_rows_(back, packed(rows), 0, -1)
    blocks = torch.nn.functional.pad(rows, (0, -inputs % BLOCK)).unflatten(1, (-1, BLOCK))
    largest = blocks.abs().amax(-1).repeat_interleave(BLOCK, 1)[:, :inputs]
    assert ((back - rows).abs() <= largest / 254 * (1 + 2**-7) * 1.0001).all()


def exact_product(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """float64 products of the rounded rows with the rounded weight, and of their magnitudes."""
    values, scales = quantise_rows(x)
    rows = (values.double() * scales.double().unsqueeze(-1)).flatten(1)
    codes, weight_scales = quantise_weight(weight)
    wide = (codes.double() * weight_scales.double().unsqueeze(-1)).flatten(1)
    return rows @ wide.T, rows.abs() @ wide.abs().T


@examples
@given(counts, st.integers(1, 100), st.integers(1, 400), dtypes, st.booleans(), st.booleans(), st.integers(0, 3))
def test_product(rows, outputs, inputs, dtype, with_bias, float_out, padding):
    whole = draw(rows, inputs + padding, seed=1).to(dtype)
    x = whole[:, :inputs]  # (its rows lie apart)
    weight = draw(outputs, inputs)
    bias = draw(1, outputs, seed=2).to(dtype)[0] if with_bias else None
    out = packed_linear(x, packed(weight), bias, outputs, False, float_out)
    exact, size = exact_product(x, weight)
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    assert out.dtype == (torch.float32 if float_out else dtype)
    rounding = 2**-8 if out.dtype == torch.bfloat16 else 0.0
    assert ((out.double() - exact).abs() <= rounding * exact.abs() + 1e-6 * size + 1e-30).all()
    if float_out or dtype == torch.float32:
        expected = int8_product(x, *quantise_weight(weight)) + (0 if bias is None else bias.float())
        assert ((out - expected).abs() <= 1e-6 * size + 1e-30).all()


@examples
@given(counts, st.integers(1, 50), st.integers(1, 300), dtypes, st.booleans(), st.booleans())
def test_gated_product(rows, size, inputs, dtype, with_bias, float_out):
    x, weight = draw(rows, inputs, seed=1).to(dtype), draw(2 * size, inputs, scale=0.2)
    bias = draw(1, 2 * size, seed=2).to(dtype)[0] if with_bias else None
    out = packed_linear(x, packed(weight, gated=True), bias, 2 * size, True, float_out)
    exact, magnitude = exact_product(x, weight)
    if bias is not None:
        exact += bias.double()
    gate, up = exact.chunk(2, -1)
    bound = 3e-6 * (1 + magnitude.amax(-1, keepdim=True)) ** 2
    if out.dtype == torch.bfloat16:
        bound = bound + 2**-8 * (gate * up).abs()
    assert ((out.double() - torch.nn.functional.silu(gate) * up).abs() <= bound).all()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_depend_on_the_row_alone(dtype, gated):
    """Any number of rows, any number of threads, any place."""
    x, weight = draw(37, 333, seed=1).to(dtype), packed(draw(214, 333), gated)
    whole = packed_linear(x, weight, None, 214, gated, True)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            for count in range(1, 20):
                start = 37 - count
                assert torch.equal(packed_linear(x[start:], weight, None, 214, gated, True), whole[start:])
    finally:
        torch.set_num_threads(threads)


def test_large_products_in_pieces_and_by_threads():
    """Beyond what one thread does alone: rows that are rounded in parallel, groups of panels, tiles of rows."""
    x, rows = draw(70, 700, seed=1), draw(1000, 700)
    weight = storage(1000, 700)
    for start, end in pairwise([0, 1, 17, 64, 500, 1000]):
        pack_rows_(weight, rows[start:end], start, -1)
    assert torch.equal(weight, packed(rows))
    exact, size = exact_product(x, rows)
    out = packed_linear(x, weight, None, 1000, False, True)
    assert ((out - exact).abs() <= 1e-6 * size + 1e-30).all()
    for start in (0, 1, 33, 62):
        assert torch.equal(packed_linear(x[start : start + 8], weight, None, 1000, False, True), out[start : start + 8])


@examples
@given(st.integers(0, 70), st.integers(1, 100), st.integers(1, 300))
def test_embedding(count, outputs, inputs):
    rows = draw(outputs, inputs)
    ids = torch.randint(outputs, (count,), generator=torch.Generator().manual_seed(count))
    found = packed_embedding(ids, packed(rows), inputs)
    assert torch.equal(found, dequantise(*quantise_weight(rows), inputs)[ids])


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_so(bad):
    """In its own row or output, and nowhere else."""
    x, weight = torch.randn(3, 100), torch.randn(40, 100)
    clean = packed_linear(x, packed(weight), None, 40, False, True)
    x[1, 70] = bad
    out = packed_linear(x, packed(weight), None, 40, False, True)
    assert not out[1].isfinite().any()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])
    clean = packed_linear(x[:1], packed(weight), None, 40, False, True)
    weight[5, 3] = bad
    out = packed_linear(x[:1], packed(weight), None, 40, False, True)
    assert not out[0, 5].isfinite()
    others = [i for i in range(40) if i != 5]
    assert torch.equal(out[:, others], clean[:, others])


def test_numbers_too_small_for_a_scale_are_zero():
    tiny = torch.full((2, 64), 1e-40)
    back = torch.empty_like(tiny)
    unpack_rows_(back, packed(tiny), 0, -1)
    assert torch.equal(back, torch.zeros_like(tiny))
    weight = packed(torch.ones(40, 64))
    assert torch.equal(packed_linear(tiny, weight, None, 40, False, True), torch.zeros(2, 40))
    one = packed_linear(torch.ones(1, 64), weight, None, 40, False, True)
    assert torch.allclose(one, torch.full((1, 40), 64.0), rtol=2**-7)


def test_what_was_never_written_is_zero():
    weight = storage(40, 100)
    assert torch.equal(packed_linear(torch.randn(2, 100), weight, None, 40, False, True), torch.zeros(2, 40))
    pack_rows_(weight, torch.empty(0, 100), 3, -1)
    assert not weight.any()
    assert packed_linear(torch.empty(0, 100), weight, None, 40, False, True).shape == (0, 40)
