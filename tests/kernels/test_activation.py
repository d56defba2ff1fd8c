"""silu(gate) * up against float64, and the bits of its row-invariant form."""

from __future__ import annotations

import pytest
import torch

from s1engine.kernels.activation import silu_mul, silu_mul_reference


@pytest.mark.parametrize("row_invariant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (1, 4864), (3, 7), (130, 332), (70, 5000)])
def test_silu_mul(rows, size, dtype, row_invariant):
    gate_up = (torch.randn(rows, 2 * size, generator=torch.Generator().manual_seed(0)) * 4).to(dtype)
    before = gate_up.clone()
    out = silu_mul(gate_up, row_invariant)
    assert torch.equal(gate_up, before)
    gate, up = gate_up.double().chunk(2, dim=-1)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), gate / (1 + (-gate).exp()) * up, rtol=tolerance, atol=1e-6)
    assert out.dtype == dtype
    torch.testing.assert_close(silu_mul_reference(gate_up), out)


@pytest.fixture(params=[1, 3])
def threads(request):
    """Some numbers of threads end their shares within a row."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 7, 332, 4867])
def test_rows_have_the_same_bits_in_every_batch(size, dtype, threads):
    gate_up = (torch.randn(200, 2 * size, generator=torch.Generator().manual_seed(0)) * 4).to(dtype)
    together = silu_mul(gate_up, True)
    for rows in (slice(0, 1), slice(7, 10), slice(63, 64), slice(101, 200)):
        assert torch.equal(silu_mul(gate_up[rows].clone(), True), together[rows])


def test_operator_is_well_formed():
    for row_invariant in (False, True):
        torch.library.opcheck(
            silu_mul, (torch.randn(3, 8), row_invariant), test_utils=("test_schema", "test_faketensor")
        )
