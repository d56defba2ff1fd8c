"""Rotary position embedding (Su et al., 2021, section 3.4) in the rotate-half layout, with the optional norm before it.

Query and key heads go through one call: they lie side by side in the fused projection. Angles come in as cosine and
sine, so every way of scaling frequencies is the caller's business.
"""

from __future__ import annotations

import torch
from torch import Tensor

from s1engine.kernels.registry import register


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor, norm_weight: Tensor | None, eps: float) -> Tensor:
    """The specification, in float32.

    x            [T, N, D], T rows of N heads; D even
    cos, sin     [T, D] float32: element i and element i + D/2 are a pair, turned by one angle; so both halves of `cos`
                 are the same, and the first half of `sin` is the second negated
    norm_weight  [N, D] or None: where given, each head is RMS-normalised with it first (Qwen3)
    Returns x * cos + (x with its halves exchanged) * sin, [T, N, D], in the dtype of `x`.
    """
    wide = x.float()
    if norm_weight is not None:
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * norm_weight.float()
    first, second = wide.chunk(2, dim=-1)
    exchanged = torch.cat((second, first), dim=-1)
    return (wide * cos.unsqueeze(1) + exchanged * sin.unsqueeze(1)).to(x.dtype)


def _rope(x: Tensor, cos: Tensor, sin: Tensor, norm_weight: Tensor | None, eps: float) -> Tensor:
    wide = x.float()
    if norm_weight is not None:
        scale = torch.linalg.vecdot(wide, wide).mul_(1.0 / x.size(-1)).add_(eps).rsqrt_().unsqueeze_(-1)
        wide = (wide * scale).mul_(norm_weight)
    exchanged = wide.roll(x.size(-1) // 2, -1)
    return (wide * cos.unsqueeze(1)).add_(exchanged.mul_(sin.unsqueeze(1))).to(x.dtype)


def _fake_rope(x: Tensor, cos: Tensor, sin: Tensor, norm_weight: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape)


rope = register(
    "rope(Tensor x, Tensor cos, Tensor sin, Tensor? norm_weight, float eps) -> Tensor",
    _rope,
    _fake_rope,
)
