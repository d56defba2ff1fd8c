"""Paged attention, plain and row-invariant, against dense float64 attention on the same keys and values."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s1engine.kernels import attention
from s1engine.kernels.attention import (
    SHORT_KEYS,
    group_by_length,
    paged_attention,
    paged_attention_reference,
    plan_attention,
    workspace_rows,
)
from s1engine.kernels.attention_row_invariant import (
    attention_rows_are_independent,
    paged_attention_row_invariant,
    plan_attention_row_invariant,
    split_keys,
)


def workspace(plan: list[torch.Tensor], cache: torch.Tensor) -> torch.Tensor:
    """Larger than needed, as after a longer step, and full of what that step left."""
    return cache.new_full((2, workspace_rows(plan, cache.size(1)) + 5, *cache.shape[2:]), 30.0)


@dataclass
class Case:
    """One step: queries and what is in the cache, which holds large values wherever no sequence looks."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_tables: torch.Tensor
    starts: list[int]
    contexts: list[int]
    num_decodes: int

    def run(self, row_invariant: bool) -> torch.Tensor:
        where = (self.block_tables, self.starts, self.contexts, self.num_decodes, self.k_cache)
        tensors = (self.q, self.k_cache, self.v_cache, self.block_tables)
        lengths = (torch.tensor(self.starts, dtype=torch.int32), torch.tensor(self.contexts, dtype=torch.int32))
        scale = self.q.size(-1) ** -0.5
        if row_invariant:
            return paged_attention_row_invariant(*tensors, *lengths, plan_attention_row_invariant(*where), scale)
        plan = plan_attention(*where)
        return paged_attention(*tensors, *lengths, plan, workspace(plan, self.k_cache), scale)

    def reference(self) -> torch.Tensor:
        lengths = (torch.tensor(self.starts, dtype=torch.int32), torch.tensor(self.contexts, dtype=torch.int32))
        scale = self.q.size(-1) ** -0.5
        return paged_attention_reference(self.q, self.k_cache, self.v_cache, self.block_tables, *lengths, scale)

    def exact(self) -> torch.Tensor:
        """Row by row, one key at a time visible to it, in float64."""
        heads, head_dim = self.q.shape[1:]
        group = heads // self.k_cache.size(2)
        out = torch.empty(self.q.shape, dtype=torch.float64)
        for sequence, context in enumerate(self.contexts):
            count = self.starts[sequence + 1] - self.starts[sequence]
            table = self.block_tables[sequence].tolist()
            size = self.k_cache.size(1)
            keys = torch.stack([self.k_cache[table[j // size], j % size] for j in range(context)]).double()
            values = torch.stack([self.v_cache[table[j // size], j % size] for j in range(context)]).double()
            for i in range(count):
                row, seen = self.starts[sequence] + i, context - count + i + 1
                for head in range(heads):
                    scores = keys[:seen, head // group] @ self.q[row, head].double() * head_dim**-0.5
                    out[row, head] = scores.softmax(0) @ values[:seen, head // group]
        return out


def make_case(
    chunks: list[tuple[int, int]],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 24,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """chunks: (query rows, cached keys before them) of each sequence."""
    chunks = sorted(chunks, key=lambda chunk: chunk[0] > 1)
    generator = torch.Generator().manual_seed(seed)
    contexts = [rows + cached for rows, cached in chunks]
    needed = [-(-context // block_size) for context in contexts]
    order = random.Random(seed).sample(range(sum(needed) + 3), sum(needed))
    tables = torch.zeros(len(chunks), max(needed), dtype=torch.int32)
    shape = (sum(needed) + 3, block_size, kv_heads, head_dim)
    k_cache, v_cache = torch.full(shape, 100.0, dtype=dtype), torch.full(shape, -100.0, dtype=dtype)
    starts = [0]
    for row, (context, blocks) in enumerate(zip(contexts, needed, strict=True)):
        mine, order = order[:blocks], order[blocks:]
        tables[row, :blocks] = torch.tensor(mine)
        for cache in (k_cache, v_cache):
            content = cache[mine].flatten(0, 1)
            content[:context] = torch.randn(context, kv_heads, head_dim, generator=generator).to(dtype)
            cache[mine] = content.view(blocks, block_size, kv_heads, head_dim)
        starts.append(starts[-1] + chunks[row][0])
    q = torch.randn(starts[-1], heads, head_dim, generator=generator).to(dtype) * 2
    return Case(q, k_cache, v_cache, tables, starts, contexts, sum(rows == 1 for rows, _ in chunks))


MIXED = [(1, 0), (1, 15), (1, 16), (1, 300), (1, 40), (7, 0), (33, 0), (5, 12), (16, 16), (1, 7)]


@pytest.mark.parametrize("row_invariant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(3, 1, 40), (14, 2, 64), (4, 4, 66), (1, 1, 2)])
@pytest.mark.parametrize("block_size", [1, 8, 16, 24])
def test_mixed_batch(block_size, heads, kv_heads, head_dim, dtype, row_invariant):
    case = make_case(MIXED, heads=heads, kv_heads=kv_heads, head_dim=head_dim, block_size=block_size, dtype=dtype)
    out = case.run(row_invariant)
    assert out.dtype == dtype
    # In bfloat16 the weights of the values are rounded too, before they are summed.
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), case.exact(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(case.reference(), out, rtol=tolerance, atol=tolerance)


@settings(max_examples=40, deadline=None)
@given(
    chunks=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 200)), min_size=1, max_size=6),
    decodes=st.lists(st.integers(0, 400), max_size=6),
    block_size=st.sampled_from([4, 8, 16]),
    row_invariant=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_batch(chunks, decodes, block_size, row_invariant, seed):
    batch = chunks + [(1, cached) for cached in decodes]
    case = make_case(batch, head_dim=8, block_size=block_size, seed=seed)
    torch.testing.assert_close(case.run(row_invariant), case.reference(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("row_invariant", [False, True])
def test_long_chunks_are_cut(row_invariant, monkeypatch):
    monkeypatch.setattr(attention, "MASKED_QUERY_ROWS", 8)
    monkeypatch.setattr("s1engine.kernels.attention_row_invariant.QUERY_ROWS", 24)
    case = make_case([(61, 30), (8, 8), (50, 0), (3, 1)], block_size=8)
    torch.testing.assert_close(case.run(row_invariant), case.reference(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(3, 1, 40), (14, 2, 64), (8, 2, 66)])
def test_row_invariant_rows_have_the_same_bits_in_every_batch(heads, kv_heads, head_dim, dtype):
    assert attention_rows_are_independent(heads // kv_heads, head_dim)
    case = make_case(
        [(1, 5), (1, 400), (1, 127), (1, 128)], heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype
    )
    together = case.run(True)
    for sequence in range(4):
        context = case.contexts[sequence]
        # Alone, and as the last row of a chunk of every size.
        for rows in (1, 2, 17, min(context, 200)):
            q = torch.randn(rows, heads, head_dim).to(dtype)
            q[-1] = case.q[sequence]
            table = case.block_tables[sequence : sequence + 1]
            alone = Case(q, case.k_cache, case.v_cache, table, [0, rows], [max(context, rows)], int(rows == 1))
            if context >= rows:
                assert torch.equal(alone.run(True)[-1], together[sequence])


@given(contexts=st.lists(st.integers(1, 30000), max_size=60), max_keys=st.integers(1, 100000))
def test_groups_hold_every_sequence_once_and_waste_little(contexts, max_keys):
    groups = group_by_length(contexts, max_keys)
    assert sorted(index for group in groups for index in group) == list(range(len(contexts)))
    for group in groups:
        longest = max(contexts[index] for index in group)
        assert len(groups) == 1 or longest == contexts[group[0]]
        assert len(group) == 1 or len(group) * longest <= max_keys
        assert longest <= SHORT_KEYS or len(group) * longest <= 2 * sum(contexts[index] for index in group)


def test_splits_are_whole_blocks_and_vectors():
    assert [split_keys(size) for size in (1, 8, 16, 64, 128)] == [128] * 5
    for size in (3, 24, 100, 256):
        assert split_keys(size) % size == 0 and split_keys(size) % 16 == 0 and split_keys(size) >= 128


def test_operators_are_well_formed():
    case = make_case(MIXED, head_dim=8)
    where = (case.block_tables, case.starts, case.contexts, case.num_decodes, case.k_cache)
    lengths = (torch.tensor(case.starts, dtype=torch.int32), torch.tensor(case.contexts, dtype=torch.int32))
    tensors = (case.q, case.k_cache, case.v_cache, case.block_tables, *lengths)
    plan = plan_attention(*where)
    torch.library.opcheck(
        paged_attention,
        (*tensors, plan, workspace(plan, case.k_cache), 0.3),
        test_utils=("test_schema", "test_faketensor"),
    )
    torch.library.opcheck(
        paged_attention_row_invariant,
        (*tensors, plan_attention_row_invariant(*where), 0.3),
        test_utils=("test_schema", "test_faketensor"),
    )
