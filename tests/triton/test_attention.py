"""Paged attention of decoding rows and of prompt chunks against the reference, and each other bit for bit."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s1engine.kernels.attention import paged_attention_reference
from s1engine.kernels.attention_prefill_triton import (
    FAST_ROWS,
    fast_rows,
    paged_attention_prefill,
    plan_prefill_tiles,
    query_tokens_per_tile,
)
from s1engine.kernels.attention_triton import DECODE_ROWS, SPLIT_KEYS, decode_workspace, paged_attention_decode

NO_BLOCK = 1 << 30  # entries of the block tables that must not be followed
REAL_HEADS = [(14, 2, 64), (40, 8, 128), (16, 8, 128), (32, 8, 128)]


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Uninitialised memory, the results among it, holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@dataclass
class Cache:
    """Keys and values of some sequences, in slots and blocks in random order; large values wherever no key lies."""

    k: torch.Tensor
    v: torch.Tensor
    tables: torch.Tensor  # int32 [slots, max_blocks]
    rows: torch.Tensor  # int32 [S]: the slot of each sequence

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        kv_heads: int,
        head_dim: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Cache:
        blocks = [-(-length // block_size) for length in lengths]
        shape = (sum(blocks) + 3, block_size, kv_heads, head_dim)
        k, v = torch.full((2, *shape), 3e4).unbind(0)
        tables = torch.full((len(lengths) + 2, max(blocks) + 2), NO_BLOCK, dtype=torch.int32)
        rows = torch.randperm(len(tables))[: len(lengths)].int()
        free = torch.randperm(len(k)).int()
        for row, length, count in zip(rows, lengths, blocks, strict=True):
            tables[row, :count], free = free[:count], free[count:]
            places = (tables[row, :count, None].long() * block_size + torch.arange(block_size)).flatten()[:length]
            k.view(-1, kv_heads, head_dim)[places] = torch.randn(length, kv_heads, head_dim)
            v.view(-1, kv_heads, head_dim)[places] = torch.randn(length, kv_heads, head_dim)
        return cls(k.to(device, dtype), v.to(device, dtype), tables.to(device), rows.to(device))

    def expected(self, q: torch.Tensor, query_start: torch.Tensor, context_lens: torch.Tensor) -> torch.Tensor:
        """In float32 from the rounded operands."""
        tables = self.tables.masked_fill(self.tables == NO_BLOCK, 0)[self.rows.clamp(min=0)]
        wide = (q.float(), self.k.float(), self.v.float())
        return paged_attention_reference(*wide, tables, query_start, context_lens, q.size(2) ** -0.5)


def queries(tokens: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Large enough that some keys get most of the weight."""
    return (3 * torch.randn(tokens, heads, head_dim)).to(device, dtype)


def integers(values: Sequence[object], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def starts(counts: Sequence[int]) -> list[int]:
    return [sum(counts[:i]) for i in range(len(counts) + 1)]


def decode(q: torch.Tensor, cache: Cache, contexts: Sequence[int], split_keys: int = SPLIT_KEYS) -> torch.Tensor:
    """With a workspace and a work list that are larger than needed and hold what must not be used."""
    splits = [-(-context // split_keys) for context in contexts]
    work = [(row, split) for row, count in enumerate(splits) for split in range(count)]
    workspace = decode_workspace(len(work) + 3, q.size(1), q.size(2), q.device)
    assert all(part.isnan().all() for part in workspace)
    return paged_attention_decode(
        q,
        cache.k,
        cache.v,
        cache.tables,
        cache.rows,
        integers(contexts, q.device),
        integers(starts(splits), q.device),
        integers([*work, (NO_BLOCK, NO_BLOCK)], q.device),
        workspace,
        q.size(2) ** -0.5,
        split_keys,
    )


def prefill(
    q: torch.Tensor,
    cache: Cache,
    counts: Sequence[int],
    contexts: Sequence[int],
    rows_per_tile: int,
    split_keys: int = SPLIT_KEYS,
) -> torch.Tensor:
    """counts: tokens of each sequence."""
    tokens = query_tokens_per_tile(q.size(1), cache.k.size(2), rows_per_tile)
    return paged_attention_prefill(
        q,
        cache.k,
        cache.v,
        cache.tables,
        cache.rows,
        integers(starts(counts), q.device),
        integers(contexts, q.device),
        integers(plan_prefill_tiles(starts(counts), tokens), q.device),
        q.size(2) ** -0.5,
        rows_per_tile,
        split_keys,
    )


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = 2e-5 if actual.dtype == torch.float32 else 1.5e-2
    torch.testing.assert_close(actual.float(), expected, atol=tolerance, rtol=tolerance)


def check_decode(
    heads: int, kv_heads: int, head_dim: int, block_size: int, contexts: list[int], split_keys: int, dtype, device
) -> None:
    cache = Cache.of(contexts, kv_heads, head_dim, block_size, dtype, device)
    q = queries(len(contexts), heads, head_dim, dtype, device)
    actual = decode(q, cache, contexts, split_keys)
    every = integers(range(len(contexts) + 1), device)
    assert_close(actual, cache.expected(q, every, integers(contexts, device)))


def check_prefill(
    heads: int, kv_heads: int, head_dim: int, block_size: int, counts: list[int], cached: list[int], rows: int, **kind
) -> None:
    contexts = [count + keys for count, keys in zip(counts, cached, strict=True)]
    cache = Cache.of(contexts, kv_heads, head_dim, block_size, **kind)
    q = queries(sum(counts), heads, head_dim, **kind)
    actual = prefill(q, cache, counts, contexts, rows, 32)
    device = kind["device"]
    assert_close(actual, cache.expected(q, integers(starts(counts), device), integers(contexts, device)))


# Heads, key-value heads, head dimension, block size.
SHAPES = [(2, 2, 16, 4), (4, 2, 24, 16), (4, 1, 64, 32), (5, 1, 16, 24), (7, 1, 24, 16), (8, 1, 32, 16), (3, 1, 8, 16)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode(shape, dtype, device):
    torch.manual_seed(sum(shape))
    check_decode(*shape, [1, 33, 64, 65, 130, 31], 64, dtype, device)


@pytest.mark.parametrize("contexts, split_keys", [([600, 5, 256, 257], SPLIT_KEYS), ([20, 300, 288], 32)], ids=str)
def test_decode_of_many_keys_and_splits(contexts, split_keys, dtype, device):
    """Splits as the engine has them; more splits than are merged at once."""
    torch.manual_seed(1)
    check_decode(2, 1, 16, 16, contexts, split_keys, dtype, device)


@settings(max_examples=6, deadline=None)
@given(st.lists(st.integers(0, 120), min_size=1, max_size=5), st.integers(0, 1000))
def test_decode_of_any_lengths(device, contexts, seed):
    torch.manual_seed(seed)
    check_decode(4, 2, 16, 16, contexts, 32, torch.float32, device)


@pytest.mark.parametrize("rows_per_tile", [DECODE_ROWS, 64, FAST_ROWS])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefill(shape, rows_per_tile, dtype, device):
    torch.manual_seed(sum(shape))
    check_prefill(*shape, [1, 20, 40], [0, 50, 0], rows_per_tile, dtype=dtype, device=device)


@settings(max_examples=6, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 100)), min_size=1, max_size=3),
    st.sampled_from([DECODE_ROWS, 64]),
    st.integers(0, 1000),
)
def test_prefill_of_any_lengths(device, sequences, rows_per_tile, seed):
    torch.manual_seed(seed)
    counts, cached = map(list, zip(*sequences, strict=True))
    check_prefill(4, 2, 16, 4, counts, cached, rows_per_tile, dtype=torch.float32, device=device)


def test_rows_without_keys_yield_zeros(dtype, device):
    """Padding has no slot; an ended row keeps its slot, whose keys must not be looked at."""
    torch.manual_seed(2)
    cache = Cache.of([40, 70, 50], 2, 16, 16, dtype, device)
    rows = [cache.rows[0].item(), -1, cache.rows[1].item(), cache.rows[2].item(), -1]
    cache.rows = integers(rows, device)
    contexts = [40, 0, 70, 0, 0]
    q = queries(5, 4, 16, dtype, device)
    actual = decode(q, cache, contexts)
    assert torch.equal(actual[[1, 3, 4]], torch.zeros_like(actual[[1, 3, 4]]))
    assert_close(actual, cache.expected(q, integers(range(6), device), integers(contexts, device)))


def real_or_small(real_sizes: bool) -> list[tuple[int, int, int]]:
    return REAL_HEADS if real_sizes else [(5, 1, 16), (4, 2, 24)]


def test_decode_of_a_row_does_not_depend_on_the_others(dtype, device, real_sizes):
    for heads, kv_heads, head_dim in real_or_small(real_sizes):
        torch.manual_seed(heads)
        contexts = [1, 40, 700, 3000, 257, 2048, 31, 900] if real_sizes else [1, 40, 100, 64]
        split_keys = SPLIT_KEYS if real_sizes else 64
        cache = Cache.of(contexts, kv_heads, head_dim, 16, dtype, device)
        q = queries(len(contexts), heads, head_dim, dtype, device)
        together = decode(q, cache, contexts, split_keys)
        for order in ([i] for i in range(len(contexts))), [random.Random(3).sample(range(len(contexts)), 3)]:
            for members in order:
                some = Cache(cache.k, cache.v, cache.tables, cache.rows[members])
                alone = decode(q[members], some, [contexts[i] for i in members], split_keys)
                assert torch.equal(alone, together[members])


def test_prompts_in_pieces_have_the_bits_of_decoding(dtype, device, real_sizes):
    """Whole, in pieces, and token by token."""
    for heads, kv_heads, head_dim in real_or_small(real_sizes):
        torch.manual_seed(heads)
        length, split_keys, scale = (910, SPLIT_KEYS, 13) if real_sizes else (70, 32, 1)
        cache = Cache.of([length], kv_heads, head_dim, 16, dtype, device)
        q = queries(length, heads, head_dim, dtype, device)
        whole = prefill(q, cache, [length], [length], DECODE_ROWS, split_keys)
        for ends in ([1, 32, 70], [17, 47, 63, 70]):
            for first, end in pairwise([0, *(scale * end for end in ends)]):
                part = prefill(q[first:end], cache, [end - first], [end], DECODE_ROWS, split_keys)
                assert torch.equal(part, whole[first:end])
        chosen = list(range(length)) if real_sizes else [0, 1, 15, 31, 32, 33, 63, 64, 68, 69]
        steps = Cache(cache.k, cache.v, cache.tables, cache.rows.repeat(len(chosen)))
        assert torch.equal(decode(q[chosen], steps, [position + 1 for position in chosen], split_keys), whole[chosen])


def test_a_tile_has_the_tokens_that_fit():
    assert [query_tokens_per_tile(heads, kv_heads, 16) for heads, kv_heads, _ in REAL_HEADS] == [2, 3, 8, 4]
    assert query_tokens_per_tile(71, 1, 16) == 1


@given(st.lists(st.integers(0, 50), min_size=1, max_size=5), st.integers(1, 20))
def test_tiles_hold_every_token_once(counts, tokens_per_tile):
    tiles = plan_prefill_tiles(starts(counts), tokens_per_tile)
    held = [(s, t) for s, first in tiles for t in range(first, min(first + tokens_per_tile, counts[s]))]
    assert sorted(held) == [(s, t) for s, count in enumerate(counts) for t in range(count)]


def test_more_heads_of_a_key_than_rows(dtype, device):
    torch.manual_seed(4)
    check_decode(20, 1, 16, 16, [40, 3], 32, dtype, device)
    check_prefill(20, 1, 16, 16, [5], [30], DECODE_ROWS, dtype=dtype, device=device)


@pytest.mark.parametrize("heads, kv_heads, head_dim", REAL_HEADS)
def test_real_sizes(heads, kv_heads, head_dim, dtype, device, real_sizes):
    if not real_sizes:
        pytest.skip("shapes of real models are too large for the interpreter")
    torch.manual_seed(5)
    lengths = [*random.Random(6).sample(range(1, 5000), 60), SPLIT_KEYS, SPLIT_KEYS + 1, 4096, 1]
    check_decode(heads, kv_heads, head_dim, 16, lengths, SPLIT_KEYS, dtype, device)
    for rows_per_tile in (DECODE_ROWS, fast_rows(dtype)):
        check_prefill(
            heads, kv_heads, head_dim, 16, [1000, 1, 130], [0, 2500, 70], rows_per_tile, dtype=dtype, device=device
        )


def test_cache_of_more_elements_than_int32_counts(device, real_sizes):
    if not real_sizes:
        pytest.skip("a cache of 2**31 elements: on a GPU only")
    torch.manual_seed(7)
    heads, kv_heads, head_dim, block_size, length = 32, 8, 128, 16, 600
    blocks = (1 << 31) // (block_size * kv_heads * head_dim) + 100
    store = torch.zeros(blocks, block_size, kv_heads, head_dim, dtype=torch.bfloat16, device=device)
    table = torch.arange(blocks - 50, blocks, dtype=torch.int32, device=device)[None]
    store[-50:] = torch.randn(50, block_size, kv_heads, head_dim, device=device)
    cache = Cache(store, store, table, integers([0], device))
    small = Cache(store[-50:], store[-50:], table - (blocks - 50), cache.rows)
    q = queries(length, heads, head_dim, torch.bfloat16, device)
    for rows_per_tile in (DECODE_ROWS, FAST_ROWS):
        results = [prefill(q, where, [length], [length], rows_per_tile) for where in (cache, small)]
        assert torch.equal(*results)
    assert torch.equal(decode(q[:1], cache, [length]), decode(q[:1], small, [length]))


def test_a_graph_takes_the_lengths_of_each_replay(dtype, device, real_sizes):
    if not real_sizes:
        pytest.skip("captures CUDA graphs: on a GPU only")
    torch.manual_seed(8)
    contexts = [300, 20, 1000]
    cache = Cache.of(contexts, 8, 128, 16, dtype, device)
    q = queries(3, 32, 128, dtype, device)
    lengths, split_start = integers([1] * 3, device), integers(range(4), device)
    work = integers([(row, 0) for row in range(12)], device)
    workspace = decode_workspace(12, 32, 128, device)
    tensors = (q, cache.k, cache.v, cache.tables, cache.rows, lengths, split_start, work, workspace, 128**-0.5)
    paged_attention_decode(*tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_attention_decode(*tensors)
    for now in (contexts, [1, 0, 999], [256, 20, 257]):
        splits = [-(-context // SPLIT_KEYS) for context in now]
        items = [(row, split) for row, count in enumerate(splits) for split in range(count)]
        lengths.copy_(integers(now, device))
        split_start.copy_(integers(starts(splits), device))
        work[: len(items)] = integers(items, device)
        graph.replay()
        assert torch.equal(out, decode(q, cache, now))
