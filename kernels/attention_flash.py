"""Attention of prompt chunks by the flash-attn package (Dao, 2023), where it is installed; it is never required."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

# What its paged kernels demand of the cache.
PAGE_MULTIPLE = 256


def unusable_because(block_size: int, head_dim: int, dtype: torch.dtype) -> str | None:
    """Why prompts cannot be attended by flash-attn here; None where they can."""
    try:
        import_module("flash_attn")
    except Exception as error:  # one that was built for another torch raises anything
        return f"the package flash-attn cannot be imported ({error})"
    if head_dim % 8 or head_dim > 256:
        return f"it has no kernels for head_dim={head_dim}"
    if block_size % PAGE_MULTIPLE:
        return f"block_size={block_size} is not a multiple of {PAGE_MULTIPLE}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it has no kernels for {dtype}"
    return None


def flash_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    key_start: Tensor,
    max_queries: int,
    max_keys: int,
    scale: float,
) -> Tensor:
    """`paged_attention_reference` of chunks.

    q                 [T, heads, D], bfloat16 or float16
    block_tables      int32 [S, max_blocks], a row a sequence
    query_start       int32 [S + 1]
    key_start         int32 [S + 1], the same for the keys that the last row of each sequence sees
    max_queries, max_keys   the most of both of one sequence
    Returns [T, heads, D].
    """
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q,
        k_cache,
        v_cache,
        cu_seqlens_q=query_start,
        cu_seqlens_k=key_start,
        max_seqlen_q=max_queries,
        max_seqlen_k=max_keys,
        softmax_scale=scale,
        causal=True,
        block_table=block_tables,
    )
