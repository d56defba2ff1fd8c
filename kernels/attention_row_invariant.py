"""Paged attention in which the bits of a row depend on its own query, keys and values only.

Not on the other rows of the batch, nor on how a prompt was cut into chunks: every row, decoding or in a prompt, goes
through the same arithmetic. Its keys are cut at fixed multiples of `split_keys`; each split is one product of a fixed
shape and one softmax over a fixed width; splits are combined in index order. All of it is float32.

The only transcendental function is the one inside softmax over a whole row: torch computes that row by row, while an
elementwise exponential has different code for the remainder of a thread's share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from s1engine.kernels.attention import group_by_length, max_group_keys
from s1engine.kernels.linear import TILE_ROWS
from s1engine.kernels.registry import register

SPLIT_KEYS = 128
# Query rows of one pass over a prompt's chunk: bounds the float32 scores.
QUERY_ROWS = 128
# Elements of float32 that fill the widest vector. Head dimensions are padded to a multiple of it, so that every row of
# every operand starts at the same alignment, and so is the number of splits, so that softmax reduces whole vectors.
_ALIGNED = 16


def split_keys(block_size: int) -> int:
    """Keys of one split: whole blocks and whole vectors, at least SPLIT_KEYS of them."""
    return _rounded_up(SPLIT_KEYS, math.lcm(block_size, _ALIGNED))


def plan_attention_row_invariant(
    block_tables: Tensor,
    query_start: Sequence[int],
    context_lens: Sequence[int],
    num_decodes: int,
    cache: Tensor,
) -> list[Tensor]:
    """What one step's calls of `paged_attention_row_invariant` have in common; arguments as in `plan_attention`.

    Returns triples, flattened: (query rows int64 [n], blocks int64 [n or 1, splits * blocks of a split], visible keys
    int64 [n]), rows in descending order of visible keys. One row of blocks means that all n rows are of one sequence.
    """
    plan: list[Tensor] = []
    block_size = cache.size(1)
    blocks_per_split = split_keys(block_size) // block_size

    def padded_blocks(sequences: list[int], keys: int) -> Tensor:
        blocks = -(-keys // block_size)
        table = torch.zeros(len(sequences), -(-blocks // blocks_per_split) * blocks_per_split, dtype=torch.int64)
        table[:, :blocks] = block_tables[sequences, :blocks]
        return table

    for group in group_by_length(context_lens[:num_decodes], max_group_keys(cache)):
        members = sorted(group, key=lambda i: -context_lens[i])
        visible = torch.tensor([context_lens[i] for i in members])
        plan += (torch.tensor(members), padded_blocks(members, context_lens[members[0]]), visible)
    for sequence in range(num_decodes, len(context_lens)):
        start, end, context = query_start[sequence], query_start[sequence + 1], context_lens[sequence]
        for first in range(start, end, QUERY_ROWS):
            last = min(first + QUERY_ROWS, end)
            keys = context - (end - last)
            rows = torch.arange(last - 1, first - 1, -1)
            plan += (rows, padded_blocks([sequence], keys), torch.arange(keys, keys - (last - first), -1))
    return plan


def _tiled_bmm(a: Tensor, b: Tensor) -> Tensor:
    """a [n, i, j] times b [n or 1, j, k], [n, i, k], n a multiple of TILE_ROWS.

    A library divides few products among its threads otherwise than many, so they always come TILE_ROWS at a time.
    """
    out = a.new_empty(a.size(0), a.size(1), b.size(2))
    b = b.expand(a.size(0), -1, -1)
    for x, y, target in zip(a.split(TILE_ROWS), b.split(TILE_ROWS), out.split(TILE_ROWS), strict=True):
        torch.bmm(x, y, out=target)
    return out


def _rounded_up(count: int, step: int) -> int:
    return -(-count // step) * step


def _gather(cache: Tensor, table: Tensor, width: int) -> Tensor:
    """Splits of `width` keys or values, float32 [n, width, kv_heads, D padded with zeros]; table [n * blocks]."""
    rows = cache.index_select(0, table).view(-1, width, *cache.shape[2:]).float()
    return functional.pad(rows, (0, _rounded_up(cache.size(3), _ALIGNED) - cache.size(3)))


def _attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, blocks: Tensor, visible: Tensor, scale: float) -> Tensor:
    """q [n, heads, D], blocks [n or 1, ...], visible [n] descending; returns [n, heads, D] float32."""
    count, heads, head_dim = q.shape
    block_size, kv_heads = k_cache.shape[1:3]
    group = heads // kv_heads
    width = split_keys(block_size)
    splits = -(-int(visible[0]) // width)
    padded_dim = _rounded_up(head_dim, _ALIGNED)
    queries = q.new_zeros(kv_heads, _rounded_up(count, TILE_ROWS), group, padded_dim, dtype=torch.float32)
    queries[:, :count, :, :head_dim] = (q.float() * scale).view(count, kv_heads, group, head_dim).transpose(0, 1)
    # Of each row and split: the largest score, the sum of exponentials relative to it, and the values' weighted mean.
    peaks = queries.new_full((kv_heads, count, group, _rounded_up(splits, _ALIGNED)), -math.inf)
    masses: list[Tensor] = []
    means: list[Tensor] = []
    offsets = torch.arange(width)
    for split in range(splits):
        seeing = int((visible > split * width).sum())
        rows = torch.arange(_rounded_up(seeing, TILE_ROWS)).clamp_(max=seeing - 1)
        sources = rows if blocks.size(0) > 1 else rows[:1]
        columns = slice(split * width // block_size, (split + 1) * width // block_size)
        table = blocks[sources, columns].flatten()
        keys, values = _gather(k_cache, table, width), _gather(v_cache, table, width)
        hidden = split * width + offsets >= visible[rows].view(-1, 1, 1)
        masses.append(queries.new_empty(kv_heads, seeing, group, 1))
        means.append(queries.new_empty(kv_heads, seeing, group, padded_dim))
        for head in range(kv_heads):
            scores = _tiled_bmm(queries[head, : rows.size(0)], keys[:, :, head].transpose(1, 2))
            weights = scores.masked_fill_(hidden, -math.inf).softmax(dim=-1)
            peaks[head, :seeing, :, split] = scores[:seeing].amax(dim=-1)
            # The largest weight is exp(0) over the sum of exponentials.
            masses[split][head] = weights[:seeing].amax(dim=-1, keepdim=True).reciprocal_()
            means[split][head] = _tiled_bmm(weights, values[:, :, head])[:seeing]
    shares = peaks.softmax(dim=-1)
    numerator = queries.new_zeros(kv_heads, count, group, padded_dim)
    denominator = queries.new_zeros(kv_heads, count, group, 1)
    for split, (mass, mean) in enumerate(zip(masses, means, strict=True)):
        share = shares[:, : mass.size(1), :, split : split + 1] * mass
        numerator[:, : mass.size(1)] += mean * share
        denominator[:, : mass.size(1)] += share
    return (numerator / denominator)[..., :head_dim].transpose(0, 1).reshape(count, heads, head_dim)


def attention_rows_are_independent(group: int, head_dim: int) -> bool:
    """Whether, on this machine, the products of a split give a row the same bits at every place of a tile.

    group     query heads that share a key-value head
    head_dim  elements of a head
    A probe, not a proof.
    """
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(TILE_ROWS, group, _rounded_up(head_dim, _ALIGNED), generator=generator)
    keys = torch.randn(TILE_ROWS, SPLIT_KEYS, queries.size(2), generator=generator)
    weights = torch.rand(TILE_ROWS, group, SPLIT_KEYS, generator=generator)
    scores, sums = torch.bmm(queries, keys.transpose(1, 2)), torch.bmm(weights, keys)
    for row in range(TILE_ROWS):
        moved = keys.roll(row, 0)
        # In a prompt all rows of a tile read the same keys, which then have stride 0.
        shared = keys[row : row + 1].expand_as(keys)
        if not (
            torch.equal(torch.bmm(queries.roll(row, 0), moved.transpose(1, 2)).roll(-row, 0), scores)
            and torch.equal(torch.bmm(weights.roll(row, 0), moved).roll(-row, 0), sums)
            and torch.equal(torch.bmm(queries, shared.transpose(1, 2))[row], scores[row])
            and torch.equal(torch.bmm(weights, shared)[row], sums[row])
        ):
            return False
    return True


def _paged_attention_row_invariant(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    plan: list[Tensor],
    scale: float,
) -> Tensor:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for rows, blocks, visible in zip(plan[0::3], plan[1::3], plan[2::3], strict=True):
        result = _attend(q.index_select(0, rows), k_cache, v_cache, blocks, visible, scale)
        out.index_copy_(0, rows, result.to(q.dtype))
    return out


def _fake_paged_attention_row_invariant(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    plan: list[Tensor],
    scale: float,
) -> Tensor:
    return q.new_empty(q.shape)


# The contract of `paged_attention` (its reference is this operator's too), and the promise of this module.
paged_attention_row_invariant = register(
    "paged_attention_row_invariant(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor query_start, "
    "Tensor context_lens, Tensor[] plan, float scale) -> Tensor",
    _paged_attention_row_invariant,
    _fake_paged_attention_row_invariant,
)
