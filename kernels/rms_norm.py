"""Root mean square layer normalisation (Zhang and Sennrich, 2019, equation 4), alone and with a residual sum before it.

The sum of squares, the scaling and the product with the weight are float32 with one rounding at the end, whatever the
dtype of the input; so a float32 residual stream loses nothing between the layers of a bfloat16 model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from s1engine.kernels.registry import register, widen


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The specification, in float32.

    x       [..., H], any floating dtype
    weight  [H]
    Returns x / sqrt(mean(x^2) + eps) * weight over the last dimension, [..., H], in the dtype of `weight`.
    """
    wide = widen(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * widen(weight)).to(weight.dtype)


def add_rms_norm_reference(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The specification of `add_rms_norm`, without its update in place: (the normalised rows, the new residual)."""
    total = residual + x.float()
    return rms_norm_reference(total, weight, eps), total


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = widen(x)
    scale = torch.linalg.vecdot(wide, wide).mul_(1.0 / x.size(-1)).add_(eps).rsqrt_().unsqueeze_(-1)
    return (wide * scale).mul_(weight).to(weight.dtype)


def _add_rms_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _rms_norm(residual.add_(x), weight, eps)


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of `x` and `weight` from that of the result, in their dtypes; sums in float32.

    x, grad  [..., H]
    weight   [H], or a weight of its own for each of the last dimensions of x, [N, H] (heads)
    """
    wide, grad = widen(x), widen(grad)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = wide * scale
    grad_weight = (grad * normed).flatten(0, -1 - weight.dim()).sum(0)
    grad = grad * weight
    along = (grad * normed).mean(-1, keepdim=True)
    return (grad - normed * along).mul_(scale).to(x.dtype), grad_weight.to(weight.dtype)


def save_for_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def backward_of_rms_norm(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight = ctx.saved_tensors
    return *rms_norm_backward(grad, x, weight, ctx.eps), None


def _fake_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape, dtype=weight.dtype)


def _fake_add_rms_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return residual.new_empty(residual.shape, dtype=weight.dtype)


rms_norm = register(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    _rms_norm,
    _fake_rms_norm,
    triton="s1engine.kernels.rms_norm_triton:rms_norm",
    gradient=(save_for_rms_norm, backward_of_rms_norm),
)

# Without gradients: training adds first and normalises then.
# residual [..., H] float32, updated in place to residual + x; x [..., H]; returns rms_norm of the sum.
add_rms_norm = register(
    "add_rms_norm(Tensor(a!) residual, Tensor x, Tensor weight, float eps) -> Tensor",
    _add_rms_norm,
    _fake_add_rms_norm,
    triton="s1engine.kernels.rms_norm_triton:add_rms_norm",
)
