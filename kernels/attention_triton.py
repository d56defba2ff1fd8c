"""Attention of decoding rows over a paged key-value cache (flash decoding; Dao et al., 2023).

The keys of a row are cut into splits of a fixed number of keys, whatever the batch: one program attends one split for
the query heads that share a key-value head, and a second kernel merges the splits of a row in order. So the bits of a
row do not depend on the other rows, and lengths are read on the device only, so both kernels can lie in a CUDA graph.

Fusing of multiplications and additions is off, so that prompts, which `attention_prefill_triton` attends with the same
two functions, can have the bits of decoding.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from s1engine.kernels.attention_softmax_triton import LOG2_E, attend, merge, normalise
from s1engine.kernels.slot_attention import SPLIT_KEYS
from s1engine.kernels.triton_build import Build, ModelShape

# Rows of the smallest tile that the matrix units take. Decoding has no more rows than heads that share a key.
DECODE_ROWS = 16
# Keys of one step of the loop, the same in decoding and in a prompt's attention where bits matter.
DECODE_TILE = 32
# Three stages for the keys and two more for the blocks that they are looked up in: keys are loaded two tiles ahead.
DECODE_OPTIONS = {"num_warps": 4, "num_stages": 5}
PROGRAMS_PER_MULTIPROCESSOR = 4
COMBINE_OPTIONS = {"num_warps": 1, "num_stages": 1}
# Splits whose partial results the combining kernel loads at once, since each load takes long and little is computed.
COMBINE_SPLITS = 8


@triton.jit(do_not_specialize=["num_rows", "table_stride"])
def decode_split_kernel(
    q,
    k_cache,
    v_cache,
    block_tables,
    rows,
    context_lens,
    split_start,
    work,
    accumulators,
    maxima,
    totals,
    num_rows,
    table_stride,
    block_stride,
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Attend the work items times the key-value heads, of which a program takes every num_programs-th."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    units = tl.load(split_start + num_rows) * KV_HEADS
    lanes = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    mask = (lanes < GROUP)[:, None] & (columns < HEAD_DIM)[None, :]
    unit = tl.program_id(0)
    while unit < units:
        item = unit // KV_HEADS
        kv_head = unit % KV_HEADS
        row = tl.load(work + 2 * item)
        first = tl.load(work + 2 * item + 1) * SPLIT
        context = tl.load(context_lens + row)
        table = block_tables + tl.load(rows + row).to(tl.int64) * table_stride
        heads = kv_head * GROUP + lanes
        queries = tl.load(q + (row * HEADS + heads)[:, None] * HEAD_DIM + columns[None, :], mask=mask, other=0.0)
        maximum, total, accumulator = attend(
            queries,
            tl.zeros([ROWS], tl.int32) + context,
            first,
            tl.minimum(first + SPLIT, context),
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
        partial = item.to(tl.int64) * HEADS + heads
        tl.store(maxima + partial, maximum, mask=lanes < GROUP)
        tl.store(totals + partial, total, mask=lanes < GROUP)
        tl.store(accumulators + partial[:, None] * HEAD_DIM + columns[None, :], accumulator, mask=mask)
        unit += tl.num_programs(0)


@triton.jit
def decode_combine_kernel(
    split_start,
    accumulators,
    maxima,
    totals,
    out,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Merge the splits of row program_id(0), head program_id(1), in order, SPLITS of them loaded at once."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    columns = tl.arange(0, BLOCK_D)
    item = tl.load(split_start + row)
    last = tl.load(split_start + row + 1)
    maximum = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    accumulator = tl.zeros([1, BLOCK_D], tl.float32)
    while item < last:
        for i in tl.static_range(SPLITS):
            items = item + i + tl.arange(0, 1)
            present = items < last
            partial = items.to(tl.int64) * HEADS + head
            split_maximum = tl.load(maxima + partial, mask=present, other=float("-inf"))
            split_total = tl.load(totals + partial, mask=present, other=0.0)
            offsets = partial[:, None] * HEAD_DIM + columns[None, :]
            mask = present[:, None] & (columns < HEAD_DIM)[None, :]
            split = tl.load(accumulators + offsets, mask=mask, other=0.0)
            maximum, total, accumulator = merge(maximum, total, accumulator, split_maximum, split_total, split)
        item += SPLITS
    result = normalise(total, accumulator).to(out.dtype.element_ty)
    offsets = (row * HEADS + head) * HEAD_DIM + columns[None, :]
    tl.store(out + offsets, result, mask=(columns < HEAD_DIM)[None, :])


class DecodeWorkspace(NamedTuple):
    """Partial results by work item and head, float32."""

    accumulators: Tensor  # [items, heads, D]
    maxima: Tensor  # [items, heads], of the scores times log2(e)
    totals: Tensor  # [items, heads], of the weights


def decode_workspace(max_items: int, heads: int, head_dim: int, device: torch.device) -> DecodeWorkspace:
    """Room for the partial results of `max_items` work items; its contents before a step do not matter."""
    accumulators = torch.empty(max_items, heads, head_dim, dtype=torch.float32, device=device)
    maxima, totals = torch.empty(2, max_items, heads, dtype=torch.float32, device=device)
    return DecodeWorkspace(accumulators, maxima, totals)


@cache
def _programs(device: torch.device) -> int:
    """Of the persistent kernel. In the interpreter few enough that a program takes more than one unit."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count * PROGRAMS_PER_MULTIPROCESSOR


def tile_rows(group: int, rows_per_tile: int) -> int:
    """Rows of a query tile, a power of two, that has room for the heads of at least one token."""
    return triton.next_power_of_2(max(rows_per_tile, group))


def head_block(head_dim: int) -> int:
    """Elements that a head is padded to: a power of two, and what the matrix units take at least."""
    return triton.next_power_of_2(max(head_dim, 16))


def paged_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    rows: Tensor,
    context_lens: Tensor,
    split_start: Tensor,
    work: Tensor,
    workspace: DecodeWorkspace,
    scale: float,
    split_keys: int = SPLIT_KEYS,
) -> Tensor:
    """`paged_attention_reference` of one query token a row, with all lengths on the device.

    q                 [B, heads, D], contiguous
    k_cache, v_cache  [num_blocks, block_size, kv_heads, D], contiguous in all but the first dimension
    block_tables      int32 [slots, max_blocks], contiguous
    rows              int32 [B]: the slot of each row; not looked at where the context is 0
    context_lens      int32 [B]: visible keys; 0 yields zeros
    split_start       int32 [B + 1]: exclusive cumulative count of the splits, ceil(context / split_keys), of each row
    work              int32 [items, 2]: (row, split) of every split in order; the first split_start[B] are used
    workspace         of at least split_start[B] items
    split_keys        a multiple of DECODE_TILE
    Returns [B, heads, D] in the dtype of `q`.
    """
    batch, heads, head_dim = q.shape
    block_size, kv_heads = k_cache.shape[1:3]
    block_d = head_block(head_dim)
    out = torch.empty_like(q)
    decode_split_kernel[(_programs(q.device),)](
        q,
        k_cache,
        v_cache,
        block_tables,
        rows,
        context_lens,
        split_start,
        work,
        *workspace,
        batch,
        block_tables.stride(0),
        k_cache.stride(0),
        scale * LOG2_E,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        SPLIT=split_keys,
        TILE=DECODE_TILE,
        ROWS=tile_rows(heads // kv_heads, DECODE_ROWS),
        BLOCK_D=block_d,
        **DECODE_OPTIONS,
        enable_fp_fusion=False,
    )
    decode_combine_kernel[(batch, heads)](
        split_start,
        *workspace,
        out,
        HEADS=heads,
        HEAD_DIM=head_dim,
        SPLITS=COMBINE_SPLITS,
        BLOCK_D=block_d,
        **COMBINE_OPTIONS,
        enable_fp_fusion=False,
    )
    return out


def builds(shape: ModelShape, block_size: int = 16) -> list[Build]:
    """The kernels of this module as they are compiled for one model."""
    values = f"*{shape.dtype}"
    partials = {"accumulators": "*fp32", "maxima": "*fp32", "totals": "*fp32"}
    caches = {"q": values, "k_cache": values, "v_cache": values}
    tables = dict.fromkeys(("block_tables", "rows", "context_lens", "split_start", "work"), "*i32")
    sizes = {"num_rows": "i32", "table_stride": "i32", "block_stride": "i32", "scale": "fp32"}
    constants = {"HEADS": shape.heads, "HEAD_DIM": shape.head_dim, "BLOCK_D": head_block(shape.head_dim)}
    return [
        Build(
            name="attention decode split",
            kernel=decode_split_kernel,
            signature=caches | tables | partials | sizes,
            constexprs=constants
            | {
                "KV_HEADS": shape.kv_heads,
                "BLOCK_SIZE": block_size,
                "SPLIT": SPLIT_KEYS,
                "TILE": DECODE_TILE,
                "ROWS": tile_rows(shape.heads // shape.kv_heads, DECODE_ROWS),
            },
            aligned=frozenset(caches | tables | partials | {"block_stride": ""}),
            options={"enable_fp_fusion": False},
            num_warps=DECODE_OPTIONS["num_warps"],
            num_stages=DECODE_OPTIONS["num_stages"],
        ),
        Build(
            name="attention decode combine",
            kernel=decode_combine_kernel,
            signature={"split_start": "*i32"} | partials | {"out": values},
            constexprs=constants | {"SPLITS": COMBINE_SPLITS},
            aligned=frozenset({"split_start", "out"} | set(partials)),
            options={"enable_fp_fusion": False},
            num_warps=COMBINE_OPTIONS["num_warps"],
            num_stages=COMBINE_OPTIONS["num_stages"],
        ),
    ]
