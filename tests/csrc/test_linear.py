"""Products with packed weights against float64; bits of a row alone, in company, on any number of threads."""

from __future__ import annotations

import pytest
import torch
from conditions import needs_csrc
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from s1engine.kernels.packed import PackedWeight, packed_linear, packed_shape

pytestmark = needs_csrc

DTYPES = [torch.float32, torch.bfloat16]


def packed(weight: Tensor, gated: bool = False) -> PackedWeight:
    outputs, inputs = weight.shape
    storage = torch.zeros(packed_shape(outputs, inputs, weight.dtype, gated), dtype=weight.dtype)
    result = PackedWeight(storage, outputs, inputs, gated)
    sizes = [outputs // 2] * 2 if gated else [outputs]
    for start, part in zip((0, outputs // 2), weight.split(sizes), strict=False):
        result.rows(start, len(part)).copy_(part)
    return result


def product(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, float_out: bool = True) -> Tensor:
    return packed_linear(x, weight.storage, bias, weight.outputs, weight.gated, float_out)


def draw(seed: int, rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((rows, inputs), (outputs, inputs), (outputs,))
    x, weight, bias = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    return x, weight, bias


def check(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool) -> None:
    """Every product is exact in float64; n float32 additions of values up to m are off by n * m * 2^-24 at most."""
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    largest = (x.double().abs() @ weight.double().abs().T).amax() + 1 if len(x) else 0
    error = (x.size(1) + 3) * largest * 2.0**-23
    if gated:
        gate, up = expected.chunk(2, dim=1)
        expected = functional.silu(gate) * up
        # silu's slope is below 1.1; its own error is a few units in the last place.
        error = error * (up.abs() * 1.1 + gate.abs() + error) + expected.abs() * 2.0**-21
    step = torch.finfo(out.dtype).eps * expected.abs() if out.dtype == torch.bfloat16 else 0
    assert ((out.double() - expected).abs() <= error + step).all()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.one_of(st.integers(0, 3), st.integers(1, 70)),
    outputs=st.integers(1, 150),
    inputs=st.integers(1, 140),
    biased=st.booleans(),
    gated=st.booleans(),
    float_out=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(seed, rows, outputs, inputs, biased, gated, float_out, dtype):
    outputs *= 1 + gated
    x, weight, bias = draw(seed, rows, outputs, inputs, dtype)
    out = product(x, packed(weight, gated), bias if biased else None, float_out)
    assert out.dtype == (torch.float32 if float_out else dtype)
    assert out.shape == (rows, outputs // 2 if gated else outputs)
    check(out, x, weight, bias if biased else None, gated)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs"), [(1152, 896), (896, 4864), (514, 1537), (64, 64)])
def test_bits_do_not_depend_on_company_or_threads(outputs, inputs, dtype, gated):
    x, weight, bias = draw(3, 130, outputs, inputs, dtype)
    weight = packed(weight, gated)
    together = product(x, weight, bias)
    for start, count in ((0, 1), (7, 1), (0, 2), (5, 3), (1, 4), (3, 5), (11, 8), (0, 9), (20, 33), (2, 128)):
        alone = product(x[start : start + count].clone(), weight, bias)
        assert torch.equal(alone, together[start : start + count]), (start, count)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            assert torch.equal(product(x, weight, bias), together), number
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [63, 64])
def test_rows_of_any_alignment(inputs, dtype):
    """Views that begin at an odd element, and rows that lie apart."""
    x, weight, _ = draw(1, 6, 40, inputs, dtype)
    weight = packed(weight)
    expected = product(x, weight)
    shifted = torch.cat((torch.zeros(1, dtype=dtype), x.flatten()))[1:].view(6, inputs)
    for gap in (1, 2, 5):
        wide = torch.full((6, inputs + gap), torch.nan, dtype=dtype)
        wide[:, :inputs] = x
        assert torch.equal(product(wide[:, :inputs], weight), expected)
    assert torch.equal(product(shifted, weight), expected)


def test_numbers_that_are_not_finite_stay_in_their_row():
    x, weight, _ = draw(2, 9, 70, 33, torch.float32)
    expected = product(x, packed(weight))
    x[4, 7], x[5, 0] = torch.nan, torch.inf
    out = product(x, packed(weight))
    kept = torch.tensor([0, 1, 2, 3, 6, 7, 8])
    assert out[4].isnan().all() and torch.equal(out[kept], expected[kept])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 63)}, "packed one of 63 inputs"),
        ({"x": torch.zeros(2, 64).bfloat16()}, "weight: must have the dtype of x"),
        ({"bias": torch.zeros(41)}, "bias: has 41 elements, expected 40"),
        ({"outputs": 65}, "outputs: the packed weight has fewer"),
        ({"outputs": 39, "bias": None, "gated": True}, "outputs: must be even"),
        ({"x": torch.zeros(64, 2).T}, "x: its rows must be contiguous"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    weight = packed(torch.zeros(40, 64))
    arguments = {"x": torch.zeros(2, 64), "bias": torch.zeros(40), "outputs": 40, "gated": False} | change
    with pytest.raises(RuntimeError, match=message):
        packed_linear(arguments["x"], weight.storage, arguments["bias"], arguments["outputs"], arguments["gated"], True)


def test_operator_is_well_formed():
    x, weight, bias = draw(0, 3, 40, 64, torch.float32)
    for gated in (False, True):
        arguments = (x, packed(weight, gated).storage, bias, 40, gated, False)
        torch.library.opcheck(packed_linear, arguments, test_utils=("test_schema", "test_faketensor"))
