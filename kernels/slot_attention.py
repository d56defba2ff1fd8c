"""Paged attention of sequences that are named by their slots, for devices: all lengths are read where they lie.

On CUDA these are the kernels of `attention_triton.py` and `attention_prefill_triton.py`; elsewhere the reference, which
shows what they mean and lets the engine's device path run anywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from s1engine.kernels.attention import paged_attention_reference
from s1engine.kernels.registry import register

# Keys of one split of a row's attention, whatever the batch: so the order of its sums does not depend on others.
SPLIT_KEYS = 256


def _decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    rows: Tensor,
    context_lens: Tensor,
    split_start: Tensor,
    work: Tensor,
    workspace: list[Tensor],
    scale: float,
) -> Tensor:
    out = torch.zeros_like(q)
    used = torch.nonzero(context_lens).flatten()
    starts = torch.arange(len(used) + 1, dtype=torch.int32, device=q.device)
    tables = block_tables[rows[used].long()]
    out[used] = paged_attention_reference(q[used], k_cache, v_cache, tables, starts, context_lens[used], scale)
    return out


def _prefill(
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
) -> Tensor:
    tables = block_tables[rows.long()]
    return paged_attention_reference(q, k_cache, v_cache, tables, query_start, context_lens, scale)


def _fake(q: Tensor, *_: object) -> Tensor:
    return torch.empty_like(q)


# `paged_attention_reference` of one query token a row. q [B, heads, D]; caches as there; block_tables int32
# [slots, max_blocks]; rows int32 [B], the slot of each; context_lens int32 [B], 0 yields zeros; split_start and work as
# in decode_inputs_triton.DecodeInputs; workspace as in attention_triton.decode_workspace, overwritten.
paged_attention_decode = register(
    "paged_attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor rows, "
    "Tensor context_lens, Tensor split_start, Tensor work, Tensor(a!)[] workspace, float scale) -> Tensor",
    _decode,
    _fake,
    triton="s1engine.kernels.attention_triton:paged_attention_decode",
)

# The same for chunks of prompts: q [T, heads, D]; rows int32 [S]; query_start int32 [S + 1]; context_lens int32 [S];
# tiles and rows_per_tile as in attention_prefill_triton.
paged_attention_prefill = register(
    "paged_attention_prefill(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor rows, "
    "Tensor query_start, Tensor context_lens, Tensor tiles, float scale, int rows_per_tile) -> Tensor",
    _prefill,
    _fake,
    triton="s1engine.kernels.attention_prefill_triton:paged_attention_prefill",
)
