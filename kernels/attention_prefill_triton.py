"""Causal attention of chunks of prompts over a paged key-value cache (FlashAttention-2; Dao, 2023).

A tile of query rows holds some tokens of one sequence times the query heads that share a key-value head. Tiles of
DECODE_ROWS rows attend split by split and merge the splits in order, as decoding does, and so give the bits of
decoding however the prompt is cut into chunks. Larger tiles, whose bits differ, walk over all keys at once.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from s1engine.kernels.attention_softmax_triton import LOG2_E, attend, merge, normalise
from s1engine.kernels.attention_triton import (
    DECODE_OPTIONS,
    DECODE_ROWS,
    DECODE_TILE,
    SPLIT_KEYS,
    head_block,
    tile_rows,
)
from s1engine.kernels.triton_build import Build, ModelShape

# Query rows of a tile where speed counts and bits do not.
FAST_ROWS = 128
FAST_TILE = 64


@triton.jit(do_not_specialize=["table_stride"])
def prefill_kernel(
    q,
    k_cache,
    v_cache,
    out,
    block_tables,
    rows,
    query_start,
    context_lens,
    tiles,
    table_stride,
    block_stride,
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BY_SPLITS: tl.constexpr,
):
    """Attend tile program_id(0) of key-value head program_id(1); row r is of token r // group, head r % group."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = tl.load(tiles + 2 * tile)
    first_token = tl.load(tiles + 2 * tile + 1)
    start = tl.load(query_start + sequence)
    num_tokens = tl.load(query_start + sequence + 1) - start
    cached = tl.load(context_lens + sequence) - num_tokens
    table = block_tables + tl.load(rows + sequence).to(tl.int64) * table_stride

    lanes = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    tokens = first_token + lanes // GROUP
    used = (lanes < TOKENS * GROUP) & (tokens < num_tokens)
    mask = used[:, None] & (columns < HEAD_DIM)[None, :]
    offsets = ((start + tokens) * HEADS + kv_head * GROUP + lanes % GROUP)[:, None] * HEAD_DIM + columns[None, :]
    queries = tl.load(q + offsets, mask=mask, other=0.0)
    # Rows without a token see one key too, so that nothing in the tile is infinite or not a number.
    visible = tl.where(used, cached + tokens + 1, 1)
    last = cached + tl.minimum(first_token + TOKENS, num_tokens)

    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    accumulator = tl.zeros([ROWS, BLOCK_D], tl.float32)
    if BY_SPLITS:
        first = 0
        while first < last:
            split_maximum, split_total, split_accumulator = attend(
                queries,
                visible,
                first,
                tl.minimum(first + SPLIT, last),
                tl.full([ROWS], float("-inf"), tl.float32),
                tl.zeros([ROWS], tl.float32),
                tl.zeros([ROWS, BLOCK_D], tl.float32),
                table,
                k_cache,
                v_cache,
                block_stride,
                kv_head,
                scale,
                KV_HEADS,
                HEAD_DIM,
                BLOCK_SIZE,
                TILE,
                True,
            )
            maximum, total, accumulator = merge(
                maximum, total, accumulator, split_maximum, split_total, split_accumulator
            )
            first += SPLIT
    else:
        # The tiles of keys that all rows see need no mask; the first row sees the fewest.
        common = (cached + first_token + 1) // TILE * TILE
        maximum, total, accumulator = attend(
            queries,
            visible,
            0,
            common,
            maximum,
            total,
            accumulator,
            table,
            k_cache,
            v_cache,
            block_stride,
            kv_head,
            scale,
            KV_HEADS,
            HEAD_DIM,
            BLOCK_SIZE,
            TILE,
            False,
        )
        maximum, total, accumulator = attend(
            queries,
            visible,
            common,
            last,
            maximum,
            total,
            accumulator,
            table,
            k_cache,
            v_cache,
            block_stride,
            kv_head,
            scale,
            KV_HEADS,
            HEAD_DIM,
            BLOCK_SIZE,
            TILE,
            True,
        )
    tl.store(out + offsets, normalise(total, accumulator).to(out.dtype.element_ty), mask=mask)


def fast_rows(dtype: torch.dtype) -> int:
    """Query rows of a tile where speed counts and bits do not. With wider values than these, registers spill."""
    return FAST_ROWS if dtype.itemsize == 2 else DECODE_ROWS


def query_tokens_per_tile(heads: int, kv_heads: int, rows_per_tile: int) -> int:
    """Tokens of a query tile: as many as fit with all heads that share a key-value head, at least one."""
    return max(1, rows_per_tile // (heads // kv_heads))


def plan_prefill_tiles(query_start: Sequence[int], tokens_per_tile: int) -> list[tuple[int, int]]:
    """(sequence, first query token relative to its sequence) of every tile of `query_start` [S + 1].

    The later tokens of a sequence see more keys, so their tiles come first: the last programs to start are short.
    """
    return [
        (sequence, first)
        for sequence, (start, end) in enumerate(pairwise(query_start))
        for first in reversed(range(0, end - start, tokens_per_tile))
    ]


def _tuning(
    heads: int, kv_heads: int, head_dim: int, rows_per_tile: int, wide: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(constants, launch options) for the rows of a tile; `wide`: values of four bytes, which fill memory sooner."""
    by_splits = rows_per_tile == DECODE_ROWS
    constants = {
        "TILE": DECODE_TILE if by_splits or wide else FAST_TILE,
        "TOKENS": query_tokens_per_tile(heads, kv_heads, rows_per_tile),
        "ROWS": tile_rows(heads // kv_heads, rows_per_tile),
        "BLOCK_D": head_block(head_dim),
        "BY_SPLITS": by_splits,
    }
    if by_splits:
        # The bits depend on how a tile lies in the warps.
        return constants, DECODE_OPTIONS
    return constants, {"num_warps": 8 if rows_per_tile >= 128 else 4, "num_stages": 3 if wide else 5}


def paged_attention_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    rows: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    tiles: Tensor,
    scale: float,
    rows_per_tile: int,
    split_keys: int = SPLIT_KEYS,
) -> Tensor:
    """`paged_attention_reference` with the block tables of `rows`.

    q                 [T, heads, D], contiguous
    k_cache, v_cache  [num_blocks, block_size, kv_heads, D], contiguous in all but the first dimension
    block_tables      int32 [slots, max_blocks], contiguous
    rows              int32 [S]: the slot of each sequence
    query_start       int32 [S + 1]
    context_lens      int32 [S]: keys visible to the last token of each sequence, at least its tokens
    tiles             int32 [num_tiles, 2], of plan_prefill_tiles(query_start, query_tokens_per_tile(...))
    rows_per_tile     a power of two: DECODE_ROWS for the bits of `paged_attention_decode`, else `fast_rows`
    split_keys        where rows_per_tile is DECODE_ROWS: as in decoding
    Returns [T, heads, D] in the dtype of `q`.
    """
    heads, head_dim = q.shape[1:]
    block_size, kv_heads = k_cache.shape[1:3]
    constants, options = _tuning(heads, kv_heads, head_dim, rows_per_tile, q.element_size() > 2)
    out = torch.empty_like(q)
    prefill_kernel[(tiles.size(0), kv_heads)](
        q,
        k_cache,
        v_cache,
        out,
        block_tables,
        rows,
        query_start,
        context_lens,
        tiles,
        block_tables.stride(0),
        k_cache.stride(0),
        scale * LOG2_E,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        SPLIT=split_keys,
        **constants,
        **options,
        enable_fp_fusion=not constants["BY_SPLITS"],
    )
    return out


def builds(shape: ModelShape, block_size: int = 16) -> list[Build]:
    """The kernels of this module as they are compiled for one model."""
    values = dict.fromkeys(("q", "k_cache", "v_cache", "out"), f"*{shape.dtype}")
    tables = dict.fromkeys(("block_tables", "rows", "query_start", "context_lens", "tiles"), "*i32")
    result = []
    wide = shape.dtype == "fp32"
    for name, rows_per_tile in (("fast", FAST_ROWS), ("by splits", DECODE_ROWS)):
        constants, options = _tuning(shape.heads, shape.kv_heads, shape.head_dim, rows_per_tile, wide)
        constants |= {"HEADS": shape.heads, "KV_HEADS": shape.kv_heads, "HEAD_DIM": shape.head_dim}
        constants |= {"BLOCK_SIZE": block_size, "SPLIT": SPLIT_KEYS}
        result.append(
            Build(
                name=f"attention prefill {name}",
                kernel=prefill_kernel,
                signature=values | tables | {"table_stride": "i32", "block_stride": "i32", "scale": "fp32"},
                constexprs=constants,
                aligned=frozenset({*values, *tables, "block_stride"}),
                decode=False,
                options={"enable_fp_fusion": not constants["BY_SPLITS"]},
                **options,
            )
        )
    return result
