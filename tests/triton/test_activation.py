"""silu(gate) * up in Triton against float64 and against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s1engine.kernels import activation_triton
from s1engine.kernels.activation import silu_mul_reference
from s1engine.kernels.registry import INTERPRETED

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module", autouse=True)
def poisoned():
    """New memory holds NaN, so an element that a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def drawn(rows, size, seed, device, dtype):
    gate_up = torch.randn(rows, 2 * size, generator=torch.Generator().manual_seed(seed)) * 4
    return gate_up.to(device, dtype)


def check(gate_up, row_invariant):
    before = gate_up.clone()
    out = torch.ops.s1engine.silu_mul(gate_up, row_invariant)
    assert torch.equal(gate_up, before) and out.dtype == gate_up.dtype
    gate, up = gate_up.double().chunk(2, dim=-1)
    # One rounding, to the nearest but in the interpreter, and the float32 exponential and quotient.
    unit = torch.finfo(out.dtype).eps * (1.0 if INTERPRETED and out.dtype == torch.bfloat16 else 0.5)
    tolerance = unit + 2e-6
    smallest = torch.finfo(out.dtype).smallest_normal
    torch.testing.assert_close(out.double(), gate / (1 + (-gate).exp()) * up, rtol=tolerance, atol=smallest)
    torch.testing.assert_close(out, silu_mul_reference(gate_up))


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    rows=st.integers(0, 4),
    size=st.integers(1, 200) | st.integers(1000, 2100),
    row_invariant=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=25, deadline=None)
def test_silu_mul(device, dtype, rows, size, row_invariant, seed):
    check(drawn(rows, size, seed, device, dtype), row_invariant)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_large_gates(device):
    """The exponential overflows to infinity on the way to a gate of zero."""
    gate = torch.tensor([[-1e4, -200.0, -89.0, 0.0, 89.0, 200.0, 1e4]], device=device)
    out = activation_triton.silu_mul(torch.cat((gate, torch.ones_like(gate)), dim=1), False)
    torch.testing.assert_close(out, gate.clamp(min=0.0), rtol=0, atol=1e-30)


def test_strided_rows(device):
    wide = drawn(3, 40, 0, device, torch.float32)
    part = wide[:, 10:40]
    assert torch.equal(activation_triton.silu_mul(part, False), activation_triton.silu_mul(part.clone(), False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [7, 332, 4867])
def test_a_row_has_the_same_bits_in_every_batch(device, size, dtype):
    gate_up = drawn(9, size, 0, device, dtype)
    together = torch.ops.s1engine.silu_mul(gate_up, True)
    for rows in (slice(0, 1), slice(3, 6), slice(8, 9)):
        assert torch.equal(torch.ops.s1engine.silu_mul(gate_up[rows].clone(), True), together[rows])
    assert torch.equal(torch.ops.s1engine.silu_mul(gate_up, False), together)


@pytest.mark.parametrize("rows", [1, 37, 4096])
@pytest.mark.parametrize("size", [3072, 4864, 14336, 27648])
def test_real_sizes(device, real_sizes, rows, size):
    if not real_sizes:
        pytest.skip("sizes of real models, too slow in the interpreter: on a GPU only")
    check(drawn(rows, size, 0, device, torch.bfloat16), False)


def test_the_operator_comes_here(device, monkeypatch):
    grids = []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    monkeypatch.setattr(activation_triton, "_silu_mul_kernel", Recorder())
    torch.ops.s1engine.silu_mul(torch.ones(3, 4864, device=device), False)
    assert grids == [(3, 3)]
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has_kernel("s1engine::silu_mul", "CPU") == INTERPRETED and has_kernel("s1engine::silu_mul", "CUDA")
