"""The C++ kernels over rows against float64: norms, rotation with the cache's writes, the gate.

A bound is half a unit in the last place of the result's dtype, for the one rounding, and a few of float32's for the
arithmetic before it. Without the C++ library the same tests run on what serves instead of it, but for those of bits.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conditions import needs_csrc
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from s1engine.kernels.activation import silu_mul
from s1engine.kernels.rms_norm import add_rms_norm, rms_norm
from s1engine.kernels.rope import rope_store_kv

EPS = 1e-6
FLOAT_EPS = torch.finfo(torch.float32).eps

dtypes = st.sampled_from([torch.float32, torch.bfloat16])
few_or_many = st.one_of(st.integers(1, 3), st.integers(1, 70))
offsets = st.integers(0, 1)  # of a tensor in its storage: 1 leaves it aligned to its elements only
examples = settings(max_examples=80, deadline=None)


def place(values: Tensor, offset: int) -> Tensor:
    """The same values, contiguous, so many elements behind the start of a storage."""
    storage = torch.empty(values.numel() + offset, dtype=values.dtype)
    return storage[offset:].view(values.shape).copy_(values)


def draw(shape: tuple[int, ...], dtype: torch.dtype, offset: int = 0, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return place((torch.randn(shape, generator=generator) * scale).to(dtype), offset)


def assert_within(out: Tensor, exact: Tensor, float_ulps: float, size: Tensor | None = None) -> None:
    """out: exact, rounded once, after `float_ulps` roundings of float32 in sums of terms as large as `size`."""
    size = exact.abs() if size is None else size
    bound = torch.finfo(out.dtype).eps / 2 * exact.abs() * (1 + float_ulps * FLOAT_EPS) + float_ulps * FLOAT_EPS * size
    assert ((out.double() - exact).abs() <= bound + 1e-36).all()  # the last: float32 has denser numbers only


def exact_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


@examples
@given(few_or_many, st.integers(1, 400), dtypes, offsets, st.sampled_from([1e-4, 1.0, 1e3]))
def test_rms_norm(rows, size, dtype, offset, scale):
    x = draw((rows, size), torch.float32, offset, scale=scale)
    weight = draw((size,), dtype, offset, seed=1)
    out = rms_norm(x, weight, EPS)
    assert out.dtype == dtype
    assert_within(out, exact_norm(x, weight), 16)  # the sum's chains have at most 400 / 4 links


@examples
@given(few_or_many, st.integers(1, 400), dtypes, offsets)
def test_add_rms_norm(rows, size, dtype, offset):
    residual = draw((rows, size), torch.float32, offset, scale=10)
    x, weight = draw((rows, size), dtype, offset, seed=1), draw((size,), dtype, offset, seed=2)
    total = residual + x.float()
    out = add_rms_norm(residual, x, weight, EPS)
    assert torch.equal(residual, total)
    assert_within(out, exact_norm(total, weight), 16)


@examples
@given(few_or_many, st.integers(1, 200), dtypes, offsets)
def test_silu_mul(rows, size, dtype, offset):
    gate_up = draw((rows, 2 * size), dtype, offset, scale=8)
    gate, up = gate_up.double().chunk(2, -1)
    assert_within(silu_mul(gate_up, True), gate * torch.sigmoid(gate) * up, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_silu_mul_at_the_ends_of_numbers(dtype):
    gate = torch.tensor([0.0, -0.0, 87.0, -87.0, 89.0, -89.0, 1e30, -1e30, 3e38, -3e38, torch.inf, torch.nan])
    out = silu_mul(torch.cat((gate, torch.ones_like(gate))).to(dtype).unsqueeze(0), True)[0].double()
    rounded = gate.to(dtype).double()
    torch.testing.assert_close(out, rounded * torch.sigmoid(rounded), rtol=1e-6, atol=1e-34, equal_nan=True)


def rope_inputs(
    rows: int, heads: int, kv_heads: int, half: int, dtype: torch.dtype, normed: bool, offset: int
) -> tuple:
    """Arguments of rope_store_kv, with caches of sevens; every third row has no place."""
    head_dim = 2 * half
    generator = torch.Generator().manual_seed(rows)
    angles = torch.rand(50, half, generator=generator, dtype=torch.float64) * 1000
    rotary = place(torch.stack((angles.cos(), angles.sin()), 1).float(), offset)
    places = torch.randperm(3 * (rows // 2 + 1), generator=generator)[:rows]
    places[::3] = -1
    norms = [draw((head_dim,), dtype, offset, seed=i) if normed else None for i in (1, 2)]
    caches = [place(torch.full((rows // 2 + 1, 3, kv_heads, head_dim), 7.0, dtype=dtype), offset) for _ in "kv"]
    qkv = draw((rows, heads + 2 * kv_heads, head_dim), dtype, offset, seed=3)
    positions = place(torch.randint(50, (rows,), generator=generator), offset)
    return qkv, rotary, positions, *norms, EPS, *caches, place(places, offset)


@examples
@given(few_or_many, st.integers(1, 5), st.integers(1, 3), st.integers(1, 70), dtypes, st.booleans(), offsets)
def test_rope_store_kv(rows, heads, kv_heads, half, dtype, normed, offset):
    arguments = rope_inputs(rows, heads, kv_heads, half, dtype, normed, offset)
    qkv, rotary, positions, q_norm, k_norm, _, k_cache, v_cache, places = arguments
    q = rope_store_kv(*arguments)
    assert q.shape == (rows, heads, 2 * half)

    wide = qkv[:, : heads + kv_heads].double()
    if normed:
        wide = exact_norm(wide, torch.cat((q_norm.expand(heads, -1), k_norm.expand(kv_heads, -1))))
    cos, sin = rotary[positions].double().unbind(1)
    turned = torch.view_as_complex(torch.stack(wide.chunk(2, -1), -1)) * torch.complex(cos, sin).unsqueeze(1)
    exact = torch.cat((turned.real, turned.imag), -1)
    size = sum(part.abs() for part in wide.chunk(2, -1)).repeat(1, 1, 2)
    assert_within(q, exact[:, :heads], 16, size[:, :heads])

    written = places >= 0
    k_rows, v_rows = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
    assert_within(k_rows[places[written]], exact[written, heads:], 16, size[written, heads:])
    assert torch.equal(v_rows[places[written]], qkv[written, heads + kv_heads :])
    others = torch.ones(len(k_rows), dtype=torch.bool)
    others[places[written]] = False
    assert (k_rows[others] == 7).all() and (v_rows[others] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_rows(dtype):
    weight = torch.ones(40, dtype=dtype)
    assert rms_norm(torch.empty(0, 40), weight, EPS).shape == (0, 40)
    assert add_rms_norm(torch.empty(0, 40), torch.empty(0, 40, dtype=dtype), weight, EPS).shape == (0, 40)
    assert silu_mul(torch.empty(0, 40, dtype=dtype), True).shape == (0, 20)
    assert rope_store_kv(*rope_inputs(0, 2, 1, 8, dtype, False, 0)).shape == (0, 2, 16)


def calls(dtype: torch.dtype, rows: int) -> dict[str, Callable[[slice], tuple[Tensor, ...]]]:
    """For each operator a function from a range of rows to all that it computes for them. Enough work for threads."""
    size = 333
    residual, x = draw((rows, size), torch.float32), draw((rows, size), dtype, seed=1)
    weight, gate_up = draw((size,), dtype, seed=2), draw((rows, 2 * size), dtype, seed=3, scale=5)
    qkv, rotary, positions, q_norm, k_norm, _, k_cache, v_cache, _ = rope_inputs(rows, 5, 2, 33, dtype, True, 0)

    def add(part: slice) -> tuple[Tensor, ...]:
        total = residual[part].clone()
        return add_rms_norm(total, x[part].contiguous(), weight, EPS), total

    def rope(part: slice) -> tuple[Tensor, ...]:
        caches = [cache.new_zeros(rows, 1, *cache.shape[2:]) for cache in (k_cache, v_cache)]
        places = torch.arange(len(qkv))[part].contiguous()
        q = rope_store_kv(qkv[part], rotary, positions[part], q_norm, k_norm, EPS, *caches, places)
        return q, *(cache[part] for cache in caches)

    return {
        "rms_norm": lambda part: (rms_norm(residual[part], weight, EPS),),
        "add_rms_norm": add,
        "silu_mul": lambda part: (silu_mul(gate_up[part], True),),
        "rope_store_kv": rope,
    }


@needs_csrc
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operator", ["rms_norm", "add_rms_norm", "silu_mul", "rope_store_kv"])
def test_bits_of_a_row_depend_on_the_row_only(operator, dtype):
    rows = 70
    call = calls(dtype, rows)[operator]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = call(slice(0, rows))
        for count in (2, 3):
            torch.set_num_threads(count)
            for whole, again in zip(expected, call(slice(0, rows)), strict=True):
                assert torch.equal(whole, again)
            for part in (slice(0, 1), slice(1, 4), slice(17, 70), slice(69, 70)):
                for whole, piece in zip(expected, call(part), strict=True):
                    assert torch.equal(whole[part], piece)
    finally:
        torch.set_num_threads(threads)
