"""RMS norm in Triton against float64 and against the references."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s1engine.kernels import rms_norm_triton
from s1engine.kernels.registry import INTERPRETED
from s1engine.kernels.rms_norm import add_rms_norm_reference, rms_norm_reference

EPS = 1e-6
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module", autouse=True)
def poisoned():
    """New memory holds NaN, so an element that a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def drawn(*shape, seed, device, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def exact(x, weight):
    wide = x.double()
    return wide / (wide.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def assert_rounded_once(out, expected):
    """Half a unit in the last place, and what the float32 arithmetic before may lose; the interpreter truncates."""
    unit = torch.finfo(out.dtype).eps * (1.0 if INTERPRETED and out.dtype == torch.bfloat16 else 0.5)
    torch.testing.assert_close(out.double(), expected, rtol=unit + 1e-6, atol=1e-7)


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 300)) | st.tuples(st.just(2), st.just(3), st.integers(1, 40)),
    magnitude=st.sampled_from([1e-3, 1.0, 30.0]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=15, deadline=None)
def test_rms_norm(device, dtype, weight_dtype, shape, magnitude, seed):
    x = (drawn(*shape, seed=seed, device=device) * magnitude).to(dtype)
    weight = drawn(shape[-1], seed=seed + 1, device=device, dtype=weight_dtype)
    before = x.clone()
    out = torch.ops.s1engine.rms_norm(x, weight, EPS)
    assert out.dtype == weight_dtype
    assert_rounded_once(out, exact(x, weight))
    torch.testing.assert_close(out, rms_norm_reference(x, weight, EPS))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=st.integers(0, 5), size=st.integers(1, 300), seed=st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_add_rms_norm(device, dtype, rows, size, seed):
    residual = drawn(rows, size, seed=seed, device=device) * 100
    x = drawn(rows, size, seed=seed + 1, device=device, dtype=dtype)
    weight = drawn(size, seed=seed + 2, device=device, dtype=dtype)
    expected, total = add_rms_norm_reference(residual, x, weight, EPS)
    x_before = x.clone()
    out = torch.ops.s1engine.add_rms_norm(residual, x, weight, EPS)
    assert torch.equal(residual, total) and torch.equal(x, x_before)
    assert out.dtype == dtype
    assert_rounded_once(out, exact(total, weight))
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("size", [896, 5120, 8192])
def test_a_row_has_the_same_bits_in_every_batch(device, size):
    x, weight = drawn(9, size, seed=0, device=device), drawn(size, seed=1, device=device, dtype=torch.bfloat16)
    together = rms_norm_triton.rms_norm(x, weight, EPS)
    for rows in (slice(0, 1), slice(3, 6), slice(8, 9)):
        assert torch.equal(rms_norm_triton.rms_norm(x[rows].clone(), weight, EPS), together[rows])
    both = rms_norm_triton.add_rms_norm(x.clone(), torch.zeros_like(x, dtype=torch.bfloat16), weight, EPS)
    assert torch.equal(both, together)


def test_strided_rows(device):
    x, weight = drawn(4, 48, seed=0, device=device), drawn(24, seed=1, device=device)
    part = x[:, 24:]
    expected = exact(part, weight)
    assert_rounded_once(rms_norm_triton.rms_norm(part, weight, EPS), expected)
    with pytest.raises(ValueError, match="contiguous"):
        rms_norm_triton.add_rms_norm(part, part, weight, EPS)


@pytest.mark.parametrize("size", [896, 1024, 4096, 5120, 8192])
@pytest.mark.parametrize("rows", [1, 37, 8192])
def test_real_sizes(device, real_sizes, rows, size):
    if not real_sizes:
        pytest.skip("sizes of real models, too slow in the interpreter: on a GPU only")
    residual = drawn(rows, size, seed=0, device=device) * 10
    x = drawn(rows, size, seed=1, device=device, dtype=torch.bfloat16)
    weight = drawn(size, seed=2, device=device, dtype=torch.bfloat16)
    assert_rounded_once(torch.ops.s1engine.rms_norm(residual, weight, EPS), exact(residual, weight))
    _, total = add_rms_norm_reference(residual, x, weight, EPS)
    out = torch.ops.s1engine.add_rms_norm(residual, x, weight, EPS)
    assert torch.equal(residual, total)
    assert_rounded_once(out, exact(total, weight))


def test_operators_come_here(device, monkeypatch):
    grids = []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    monkeypatch.setattr(rms_norm_triton, "_rms_norm_kernel", Recorder())
    x, weight = torch.ones(3, 8, device=device), torch.ones(8, device=device)
    torch.ops.s1engine.rms_norm(x, weight, EPS)
    torch.ops.s1engine.add_rms_norm(x, x.clone(), weight, EPS)
    assert grids == [(3,), (3,)]


def test_the_cpu_keeps_its_own_without_the_interpreter():
    program = (
        "import sys, torch\n"
        "from s1engine.kernels.rms_norm import add_rms_norm, rms_norm\n"
        "x = torch.randn(3, 8)\n"
        "rms_norm(x, torch.ones(8), 1e-6), add_rms_norm(x, x.clone(), torch.ones(8), 1e-6)\n"
        "assert 's1engine.kernels.rms_norm_triton' not in sys.modules\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has_kernel("s1engine::rms_norm", "CPU") == INTERPRETED and has_kernel("s1engine::rms_norm", "CUDA")
