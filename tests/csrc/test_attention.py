"""The C++ paged attention against float64, and the bits of a row alone, in company, in other chunks, on other threads.

Wherever no row looks, the cache holds NaN.
"""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conditions import needs_csrc
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from s1engine.kernels.attention_cpu import paged_attention_cpu

pytestmark = needs_csrc

DTYPES = [torch.float32, torch.bfloat16]
SPLIT_KEYS = 512  # kSplitKeys: lengths around its multiples are cases of their own


@dataclass
class Sequences:
    """Keys, values and a query for each position of some sequences, and their place in a paged cache."""

    q: list[Tensor]  # [length, heads, D] of each
    k: list[Tensor]  # [length, kv_heads, D] of each
    v: list[Tensor]
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor

    @staticmethod
    def draw(
        lengths: Sequence[int],
        *,
        heads: int = 4,
        kv_heads: int = 2,
        head_dim: int = 32,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> Sequences:
        generator = torch.Generator().manual_seed(seed)

        def normal(length: int, num: int) -> Tensor:
            return torch.randn(length, num, head_dim, generator=generator).to(dtype)

        needed = [-(-length // block_size) for length in lengths]
        order = random.Random(seed).sample(range(sum(needed) + 3), sum(needed))
        block_tables = torch.zeros(len(lengths), max(needed, default=0) + 1, dtype=torch.int32)
        # From their second element on: no vector is aligned to more than that.
        shape = (sum(needed) + 3, block_size, kv_heads, head_dim)
        storage = torch.full((2, math.prod(shape) + 1), torch.nan, dtype=dtype)
        k_cache, v_cache = (part[1:].view(shape) for part in storage)
        q, k, v = [], [], []
        for row, (length, blocks) in enumerate(zip(lengths, needed, strict=True)):
            mine, order = order[:blocks], order[blocks:]
            block_tables[row, :blocks] = torch.tensor(mine, dtype=torch.int32)
            q.append(normal(length, heads) * 2)
            k.append(normal(length, kv_heads))
            v.append(normal(length, kv_heads))
            for cache, content in ((k_cache, k[-1]), (v_cache, v[-1])):
                padded = torch.full((blocks * block_size, kv_heads, head_dim), torch.nan, dtype=dtype)
                padded[:length] = content
                cache[mine] = padded.view(blocks, block_size, kv_heads, head_dim)
        return Sequences(q, k, v, k_cache, v_cache, block_tables)

    def attend(self, chunks: Sequence[tuple[int, int, int]]) -> list[Tensor]:
        """One call; chunks: (sequence, first position, positions). A result [positions, heads, D] for each."""
        rows = [self.q[sequence][first : first + count] for sequence, first, count in chunks]
        starts = torch.tensor([0] + [count for _, _, count in chunks]).cumsum(0).int()
        contexts = torch.tensor([first + count for _, first, count in chunks], dtype=torch.int32)
        tables = self.block_tables[[sequence for sequence, _, _ in chunks]]
        q = torch.cat([self.q[0][:0], *rows])
        out = paged_attention_cpu(q, self.k_cache, self.v_cache, tables, starts, contexts, q.size(-1) ** -0.5)
        assert out.dtype == q.dtype and out.shape == q.shape
        return list(out.split([count for _, _, count in chunks]))

    def check(self, out: Tensor, sequence: int, first: int) -> None:
        """Rows from `first` on, against float64.

        A score is a sum of D products and a few roundings more, so a weight is off by at most the exponential of twice
        that. Weights and results are rounded to the dtype once, and sums over keys are chains of up to a split.
        """
        (count, heads, head_dim), end = out.shape, first + out.size(0)
        if count == 0:
            return

        def by_kv_head(x: Tensor) -> Tensor:
            """[rows, heads or kv_heads, D] to [kv_heads, rows * heads of one, D]."""
            return x.double().view(x.size(0), self.k_cache.size(2), -1, head_dim).transpose(0, 1).flatten(1, 2)

        q, k, v, result = map(
            by_kv_head, (self.q[sequence][first:end], self.k[sequence][:end], self.v[sequence][:end], out)
        )
        scale = head_dim**-0.5
        hidden = torch.ones(count, end, dtype=torch.bool).triu(first + 1).repeat_interleave(heads // len(q), dim=0)
        weights = (q @ k.mT * scale).masked_fill(hidden, -math.inf).softmax(dim=-1)
        exact, size = weights @ v, weights @ v.abs()
        largest = (q.abs() @ k.abs().mT).amax().item() * scale
        relative = 2 * largest * (head_dim + 8) * 2.0**-24 + (min(end, SPLIT_KEYS) + end // SPLIT_KEYS + 16) * 2.0**-24
        rounding = torch.finfo(out.dtype).eps / 2 if out.dtype == torch.bfloat16 else 0.0
        bound = (relative + rounding) * size + rounding * exact.abs() + 1e-30
        assert ((result - exact).abs() <= bound).all(), (sequence, first)

    def check_all(self, chunks: Sequence[tuple[int, int, int]]) -> None:
        for (sequence, first, _), out in zip(chunks, self.attend(chunks), strict=True):
            self.check(out, sequence, first)


def chunks_of(batch: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """batch: (rows, cached keys before them) of each sequence."""
    return [(sequence, cached, rows) for sequence, (rows, cached) in enumerate(batch)]


def draw_batch(batch: Sequence[tuple[int, int]], **options) -> Sequences:
    return Sequences.draw([rows + cached for rows, cached in batch], **options)


MIXED = [(1, 0), (1, 15), (1, 300), (7, 0), (33, 0), (0, 20), (5, 12), (1, 7), (1, 511), (1, 512), (3, 511), (150, 900)]
HEADS = [(14, 2, 64), (8, 2, 128), (4, 4, 66), (3, 1, 40), (20, 1, 34), (6, 3, 80), (5, 5, 96), (4, 1, 256), (2, 1, 2)]


@settings(max_examples=40, deadline=None)
@given(
    batch=st.lists(st.tuples(st.integers(0, 50), st.one_of(st.integers(0, 40), st.integers(0, 1100))), max_size=5),
    decodes=st.lists(st.integers(0, 600), max_size=5),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 18),
    half_dim=st.integers(1, 40),
    block_size=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_any_batch(batch, decodes, kv_heads, group, half_dim, block_size, dtype, seed):
    batch = [(1, cached) for cached in decodes] + batch
    options = {"heads": kv_heads * group, "kv_heads": kv_heads, "head_dim": 2 * half_dim}
    if batch:
        sequences = draw_batch(batch, block_size=block_size, dtype=dtype, seed=seed, **options)
        sequences.check_all(chunks_of(batch))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
@pytest.mark.parametrize("block_size", [1, 16, 24, 1024])
def test_mixed_batch(block_size, heads, kv_heads, head_dim, dtype):
    options = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "block_size": block_size, "dtype": dtype}
    draw_batch(MIXED, **options).check_all(chunks_of(MIXED))


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_contexts(dtype):
    batch = [(1, 32767), (2, 5000), (130, 4000)]
    draw_batch(batch, heads=7, kv_heads=1, head_dim=16, dtype=dtype).check_all(chunks_of(batch))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [*HEADS, (4, 2, 32), (130, 1, 4)])
def test_bits_of_a_row_are_its_own(heads, kv_heads, head_dim, dtype):
    length = 2 * SPLIT_KEYS + 70
    sequences = Sequences.draw([length, 300], heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    (whole,) = sequences.attend([(0, 0, length)])
    edges = [0, 1, 15, 16, 31, 32, 33, 100, SPLIT_KEYS - 1, SPLIT_KEYS, SPLIT_KEYS + 1, 2 * SPLIT_KEYS, length - 1]
    for position in edges:
        assert torch.equal(sequences.attend([(0, position, 1)])[0][0], whole[position]), position
    # In chunks of several sizes, with rows of another sequence around them.
    for size in (2, 3, 9, 64, 130, 700):
        for first in range(0, length, 3 * size + 50):
            count = min(size, length - first)
            out = sequences.attend([(1, 299, 1), (0, first, count), (1, 0, 11)])[1]
            assert torch.equal(out, whole[first : first + count]), (first, size)
    # All at once, as decoding sequences of one cache.
    together = sequences.attend([(0, position, 1) for position in edges] + [(1, 5, 1)])
    assert torch.equal(torch.cat(together[:-1]), whole[edges])


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_threads(dtype):
    sequences = draw_batch(MIXED, heads=14, kv_heads=2, head_dim=64, dtype=dtype)
    expected = torch.cat(sequences.attend(chunks_of(MIXED)))
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            for _ in range(3):
                assert torch.equal(torch.cat(sequences.attend(chunks_of(MIXED))), expected), number
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_are_not_finite_stay_in_their_row(dtype):
    sequences = draw_batch(MIXED, dtype=dtype)
    expected = sequences.attend(chunks_of(MIXED))
    sequences.q[4][20, 1, 3] = torch.nan
    sequences.q[9][512, 2, 0] = torch.inf
    sequences.v[6][0] = torch.nan
    sequences.v_cache[sequences.block_tables[6, 0], 0] = torch.nan
    out = sequences.attend(chunks_of(MIXED))
    assert out[4][20, 1].isnan().all() and out[9][0, 2].isnan().all() and out[6].isnan().all()
    expected[4][20, 1] = expected[9][0, 2] = expected[6][:] = 0.0
    out[4][20, 1] = out[9][0, 2] = out[6][:] = 0.0
    assert torch.equal(torch.cat(out), torch.cat(expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_far_apart(dtype):
    """Weights down to zero, and largest scores that come first, last, and in a later split."""
    for place in (0, 40, 700):
        sequences = Sequences.draw([800], head_dim=16, dtype=dtype)
        at = (sequences.block_tables[0, place // 16], place % 16)
        sequences.k[0][place] *= 60
        sequences.k_cache[at] *= 60
        sequences.check_all([(0, 799, 1)])
        sequences.check_all([(0, 600, 200)])


def test_nothing_to_do():
    sequences = draw_batch([(1, 3), (1, 5)])
    assert [out.numel() for out in sequences.attend([])] == []
    assert [out.numel() for out in sequences.attend([(0, 0, 0), (1, 6, 0)])] == [0, 0]


OTHER_ISA = """
import test_attention as tests
from s1engine.kernels import native
tests.test_any_batch()
for dtype in tests.DTYPES:
    tests.test_scores_far_apart(dtype)
    tests.test_bits_of_a_row_are_its_own(14, 2, 64, dtype)
print(native.ISA)
"""


@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_other_instruction_sets(isa):
    """In a process of its own, since the choice is made once; a processor without this one takes another."""
    here = Path(__file__).parent
    folders = os.pathsep.join(map(str, (here, here.parent / "support")))
    env = os.environ | {"S1ENGINE_CPU_ISA": isa, "PYTHONPATH": folders}
    done = subprocess.run([sys.executable, "-c", OTHER_ISA], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == isa or "no such kernels" in done.stderr


def test_operator_is_well_formed():
    sequences = draw_batch([(1, 20), (5, 3)])
    starts, contexts = torch.tensor([0, 1, 6], dtype=torch.int32), torch.tensor([21, 8], dtype=torch.int32)
    q = torch.cat((sequences.q[0][20:], sequences.q[1][3:]))
    arguments = (q, sequences.k_cache.clone(), sequences.v_cache.clone(), sequences.block_tables, starts, contexts, 0.2)
    torch.library.opcheck(paged_attention_cpu, arguments, test_utils=("test_schema", "test_faketensor"))
