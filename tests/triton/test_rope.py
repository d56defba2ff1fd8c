"""Norm, rotation and cache writes of one launch against complex multiplication in float64 and against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s1engine.kernels.registry import INTERPRETED
from s1engine.kernels.rope import rope_reference
from s1engine.kernels.rope_triton import rope_store_kv

EPS = 1e-6
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
POSITIONS = 40
POISON = 77.0


@pytest.fixture(scope="module", autouse=True)
def poisoned():
    """New memory holds NaN, so an element that a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


class Case:
    """Random arguments of one call; each row has a place of its own in the cache, or none."""

    def __init__(self, rows, heads, kv_heads, head_dim, normed, dtype, device, seed, block_size=4, unwritten=0.3):
        generator = torch.Generator().manual_seed(seed)

        def normal(*size):
            return torch.randn(*size, generator=generator).to(device, dtype)

        self.heads, self.kv_heads = heads, kv_heads
        self.qkv = normal(rows, heads + 2 * kv_heads, head_dim)
        angles = torch.rand(POSITIONS, head_dim // 2, generator=generator, dtype=torch.float64) * 1000
        self.rotary = torch.stack((angles.cos(), angles.sin()), dim=1).float().to(device)
        self.positions = torch.randint(POSITIONS, (rows,), generator=generator).to(device)
        self.q_norm, self.k_norm = (normal(head_dim), normal(head_dim)) if normed else (None, None)
        blocks = rows // block_size + 2
        slots = torch.randperm(blocks * block_size, generator=generator)[:rows]
        slots[torch.rand(rows, generator=generator) < unwritten] = -1
        self.slot_mapping = slots.to(device)
        self.k_cache = torch.full((blocks, block_size, kv_heads, head_dim), POISON, dtype=dtype, device=device)
        self.v_cache = self.k_cache.clone()

    def run(self, rows=slice(None)):
        """(q, k_cache, v_cache) of a call with some of the rows, on copies of the caches."""
        k_cache, v_cache = self.k_cache.clone(), self.v_cache.clone()
        q = rope_store_kv(
            self.qkv[rows].clone(),
            self.rotary,
            self.positions[rows].clone(),
            self.q_norm,
            self.k_norm,
            EPS,
            k_cache,
            v_cache,
            self.slot_mapping[rows].clone(),
        )
        return q, k_cache, v_cache

    def rotated_heads(self):
        return self.qkv[:, : self.heads + self.kv_heads]

    def head_norms(self):
        if self.q_norm is None:
            return None
        return torch.cat((self.q_norm.expand(self.heads, -1), self.k_norm.expand(self.kv_heads, -1)))

    def exact(self):
        wide, norms = self.rotated_heads().double(), self.head_norms()
        if norms is not None:
            wide = wide / (wide.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * norms.double()
        first, second = wide.chunk(2, dim=-1)
        factor = torch.complex(*self.rotary[self.positions].double().unbind(1)).unsqueeze(1)
        turned = torch.complex(first, second) * factor
        return torch.cat((turned.real, turned.imag), dim=-1)

    def reference(self):
        cos, sin = self.rotary[self.positions].unbind(1)
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        return rope_reference(self.rotated_heads(), cos, sin, self.head_norms(), EPS)

    def check(self):
        before = self.qkv.clone()
        q, k_cache, v_cache = self.run()
        assert torch.equal(self.qkv, before)
        assert q.dtype == self.qkv.dtype and q.shape == (len(before), self.heads, before.size(-1))
        written = self.slot_mapping >= 0
        places = self.slot_mapping[written]
        k_rows, v_rows = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
        # One rounding, to the nearest but in the interpreter, and the float32 arithmetic.
        unit = torch.finfo(q.dtype).eps * (1.0 if INTERPRETED and q.dtype == torch.bfloat16 else 0.5)
        tolerance = {"rtol": unit + 1e-6, "atol": 4e-6}  # a sum of two products may cancel
        expected_q, expected_k = self.exact().split((self.heads, self.kv_heads), dim=1)
        torch.testing.assert_close(q.double(), expected_q, **tolerance)
        torch.testing.assert_close(k_rows[places].double(), expected_k[written], **tolerance)
        reference_q, reference_k = self.reference().split((self.heads, self.kv_heads), dim=1)
        torch.testing.assert_close(q, reference_q)
        torch.testing.assert_close(k_rows[places], reference_k[written])
        assert torch.equal(v_rows[places], self.qkv[written, -self.kv_heads :])
        others = torch.ones(len(k_rows), dtype=torch.bool, device=q.device)
        others[places] = False
        assert (k_rows[others] == POISON).all() and (v_rows[others] == POISON).all()


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    rows=st.integers(0, 6),
    kv_heads=st.integers(1, 5),
    group=st.integers(1, 5),
    head_dim=st.sampled_from([2, 24, 64, 80, 96, 128]),
    normed=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=30, deadline=None)
def test_rope_store_kv(device, dtype, rows, kv_heads, group, head_dim, normed, seed):
    Case(rows, kv_heads * group, kv_heads, head_dim, normed, dtype, device, seed).check()


@pytest.mark.parametrize("normed", [False, True])
def test_heads_of_several_programs(device, normed):
    """Blocks of heads end among the query heads and among the value heads."""
    Case(3, 40, 8, 128, normed, torch.bfloat16, device, seed=0).check()
    Case(2, 14, 2, 256, normed, torch.float32, device, seed=1).check()


def test_a_row_has_the_same_bits_in_every_batch(device):
    case = Case(9, 6, 2, 80, True, torch.bfloat16, device, seed=0, unwritten=0.0)
    q, k_cache, v_cache = case.run()
    for rows in (slice(0, 1), slice(3, 6), slice(8, 9)):
        alone_q, alone_k, alone_v = case.run(rows)
        places = case.slot_mapping[rows]
        assert torch.equal(alone_q, q[rows])
        assert torch.equal(alone_k.flatten(0, 1)[places], k_cache.flatten(0, 1)[places])
        assert torch.equal(alone_v.flatten(0, 1)[places], v_cache.flatten(0, 1)[places])


def test_places_beyond_32_bits(device, real_sizes):
    if not real_sizes or torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs a GPU with 40 GB")
    case = Case(2, 4, 2, 128, False, torch.bfloat16, device, seed=0, unwritten=0.0)
    rows = 2**31 // 256 + 8
    case.k_cache = torch.full((rows // 8, 8, 2, 128), POISON, dtype=torch.bfloat16, device=device)
    case.v_cache = case.k_cache.clone()
    case.slot_mapping = torch.tensor([rows - 1, 0], device=device)
    case.check()


@pytest.mark.parametrize("rows", [1, 256, 8192])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "normed"), [(14, 2, 64, False), (40, 8, 128, False), (16, 8, 128, True)]
)
def test_real_sizes(device, real_sizes, heads, kv_heads, head_dim, normed, rows):
    if not real_sizes:
        pytest.skip("sizes of real models, too slow in the interpreter: on a GPU only")
    Case(rows, heads, kv_heads, head_dim, normed, torch.bfloat16, device, seed=0, block_size=16).check()


def test_strided_caches_are_refused(device):
    case = Case(2, 4, 2, 24, False, torch.float32, device, seed=0)
    case.k_cache = torch.zeros(4, 2, 4, 24, device=device).transpose(1, 2)
    with pytest.raises(ValueError, match="contiguous"):
        rope_store_kv(
            case.qkv, case.rotary, case.positions, None, None, EPS, case.k_cache, case.v_cache, case.slot_mapping
        )
