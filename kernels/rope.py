"""Rotary position embedding (Su et al., 2021, section 3.4) in the rotate-half layout, with the optional norm before it.

Query and key heads go through one call: they lie side by side in the fused projection. Angles come in as cosine and
sine, so every way of scaling frequencies is the caller's business.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from s1engine.kernels.kv_cache import store_kv
from s1engine.kernels.registry import register, widen
from s1engine.kernels.rms_norm import rms_norm_backward


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor, norm_weight: Tensor | None, eps: float) -> Tensor:
    """The specification, in float32.

    x            [T, N, D], T rows of N heads; D even
    cos, sin     [T, D] float32: element i and element i + D/2 are a pair, turned by one angle; so both halves of `cos`
                 are the same, and the first half of `sin` is the second negated
    norm_weight  [N, D] or None: where given, each head is RMS-normalised with it first (Qwen3)
    Returns x * cos + (x with its halves exchanged) * sin, [T, N, D], in the dtype of `x`.
    """
    wide = widen(x)
    if norm_weight is not None:
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * widen(norm_weight)
    first, second = wide.chunk(2, dim=-1)
    exchanged = torch.cat((second, first), dim=-1)
    return (wide * cos.unsqueeze(1) + exchanged * sin.unsqueeze(1)).to(x.dtype)


def _rope(x: Tensor, cos: Tensor, sin: Tensor, norm_weight: Tensor | None, eps: float) -> Tensor:
    wide = widen(x)
    if norm_weight is not None:
        scale = torch.linalg.vecdot(wide, wide).mul_(1.0 / x.size(-1)).add_(eps).rsqrt_().unsqueeze_(-1)
        wide = (wide * scale).mul_(norm_weight)
    exchanged = wide.roll(x.size(-1) // 2, -1)
    return (wide * cos.unsqueeze(1)).add_(exchanged.mul_(sin.unsqueeze(1))).to(x.dtype)


def save_for_rope(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, cos, sin, norm_weight, ctx.eps = inputs
    ctx.save_for_backward(cos, sin, *(() if norm_weight is None else (x, norm_weight)))


def backward_of_rope(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """A rotation's gradient is turned back by the same angle."""
    cos, sin, *normed = ctx.saved_tensors
    grad = _rope(grad, cos, -sin, None, ctx.eps)
    if not normed:
        return grad, None, None, None, None
    x, norm_weight = normed
    grad_x, grad_weight = rms_norm_backward(grad, x, norm_weight, ctx.eps)
    return grad_x, None, None, grad_weight, None


def _fake_rope(x: Tensor, cos: Tensor, sin: Tensor, norm_weight: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape)


rope = register(
    "rope(Tensor x, Tensor cos, Tensor sin, Tensor? norm_weight, float eps) -> Tensor",
    _rope,
    _fake_rope,
    gradient=(save_for_rope, backward_of_rope),
)


def _rope_store_kv(
    qkv: Tensor,
    rotary: Tensor,
    positions: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    kv_heads = k_cache.size(2)
    heads = qkv.size(1) - 2 * kv_heads
    cos, sin = rotary.index_select(0, positions).unbind(1)
    norms = None
    if q_norm is not None and k_norm is not None:
        norms = torch.cat((q_norm.expand(heads, -1), k_norm.expand(kv_heads, -1)))
    rotated = rope_reference(
        qkv[:, : heads + kv_heads], torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1), norms, eps
    )
    kept = slot_mapping >= 0
    store_kv(rotated[kept, heads:], qkv[kept, heads + kv_heads :], k_cache, v_cache, slot_mapping[kept])
    return rotated[:, :heads].contiguous()


def _fake_rope_store_kv(qkv: Tensor, *arguments: Tensor) -> Tensor:
    k_cache = arguments[5]
    return qkv.new_empty(qkv.size(0), qkv.size(1) - 2 * k_cache.size(2), qkv.size(2))


# All between the fused projection and attention, for devices: qkv [T, heads + 2 * kv_heads, D]; rotary float32
# [P, 2, D / 2], cosines and sines; positions int64 [T]; q_norm, k_norm [D] or None; caches and slot_mapping as in
# `store_kv`, where slot -1 is not written. Returns the rotated queries, [T, heads, D].
rope_store_kv = register(
    "rope_store_kv(Tensor qkv, Tensor rotary, Tensor positions, Tensor? q_norm, Tensor? k_norm, float eps, "
    "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping) -> Tensor",
    _rope_store_kv,
    _fake_rope_store_kv,
    triton="s1engine.kernels.rope_triton:rope_store_kv",
)
