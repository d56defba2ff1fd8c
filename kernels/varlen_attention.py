"""Causal attention of packed samples among themselves: what training needs, with gradients and without a cache.

GPUs run PyTorch's variable-length flash attention over all samples at once; elsewhere each sample is one
scaled-dot-product call, which is a flash kernel on CPUs too. No sample sees another.
"""

from __future__ import annotations

from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, sequence_start: Tensor, sequence_start_list: list[int], scale: float
) -> Tensor:
    """Differentiable in q, k and v.

    q                    [T, heads, D]
    k, v                 [T, kv_heads, D]; heads is a multiple of kv_heads, neighbouring query heads share one
    sequence_start       int32 [S + 1], 0 ... T: rows sequence_start[s] to sequence_start[s + 1] are sample s
    sequence_start_list  the same on the host
    Returns [T, heads, D].
    """
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        return _flash(q, k, v, sequence_start, max(end - start for start, end in pairwise(sequence_start_list)), scale)
    lengths = [end - start for start, end in pairwise(sequence_start_list)]
    samples = zip(*(x.transpose(0, 1).unsqueeze(0).split(lengths, dim=2) for x in (q, k, v)), strict=True)
    attended = [
        functional.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale, enable_gqa=True)
        for queries, keys, values in samples
    ]
    return torch.cat([x.squeeze(0).transpose(0, 1) for x in attended])


def _flash(q: Tensor, k: Tensor, v: Tensor, sequence_start: Tensor, longest: int, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    grouped: dict[str, Any] = {}
    if "enable_gqa" in signature(varlen_attn).parameters:
        grouped["enable_gqa"] = q.size(1) != k.size(1)
    else:  # before torch 2.12
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1) for x in (k, v))
    out = varlen_attn(
        q, k, v, sequence_start, sequence_start, longest, longest, scale=scale, window_size=(-1, 0), **grouped
    )
    assert isinstance(out, Tensor)
    return out


def varlen_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, sequence_start: Tensor, sequence_start_list: list[int], scale: float
) -> Tensor:
    """The specification: each sample's causal softmax written out, in the dtype of q."""
    group = q.size(1) // k.size(1)
    out = []
    for start, end in pairwise(sequence_start_list):
        scores = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end].repeat_interleave(group, 1)) * scale
        hidden = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu(1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, v[start:end].repeat_interleave(group, 1)))
    return torch.cat(out)
