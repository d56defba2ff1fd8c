"""The gate of a SwiGLU feed-forward layer (Shazeer, 2020): silu(gate) * up on the fused projection's output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from s1engine.kernels.registry import register, widen

# Elements of one pass: its float32 intermediates stay in the second-level cache.
_PASS_ELEMENTS = 1 << 18

# Below torch's grain size (32768), so that one thread does the whole piece, and a multiple of every vector width.
_PIECE_ELEMENTS = 1 << 14
_VECTOR_ELEMENTS = 64


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """The specification, in float32.

    gate_up  [T, 2 * I]: the gate's columns, then the up projection's
    Returns silu(gate) * up, [T, I], in the dtype of `gate_up`.
    """
    gate, up = widen(gate_up).chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


def _silu_mul(gate_up: Tensor, row_invariant: bool) -> Tensor:
    if row_invariant:
        return _silu_mul_row_invariant(gate_up)
    size = gate_up.size(-1) // 2
    if gate_up.dtype in (torch.float32, torch.float64):
        return functional.silu(gate_up[:, :size]).mul_(gate_up[:, size:])
    out = gate_up.new_empty(gate_up.size(0), size)
    rows = max(1, _PASS_ELEMENTS // size)
    for piece, target in zip(gate_up.split(rows), out.split(rows), strict=True):
        target.copy_(functional.silu(piece[:, :size].float(), inplace=True).mul_(piece[:, size:]))
    return out


def _silu_mul_row_invariant(gate_up: Tensor) -> Tensor:
    """The same, with bits that do not depend on where in the batch a row lies.

    torch computes the last elements of a thread's share one by one, with another exponential than its vector code. In
    whole vectors on one thread there is no such remainder.
    """
    size = gate_up.size(-1) // 2
    count = gate_up.size(0) * size
    gate = gate_up.new_zeros(-(-count // _VECTOR_ELEMENTS) * _VECTOR_ELEMENTS, dtype=torch.float32)
    gate[:count].view(-1, size).copy_(gate_up[:, :size])
    for piece in gate.split(_PIECE_ELEMENTS):
        functional.silu(piece, inplace=True)
    return gate[:count].view(-1, size).mul_(gate_up[:, size:]).to(gate_up.dtype)


def silu_mul_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient of `gate_up` [T, 2 * I] from that of the result [T, I], in its dtype; computed in float32."""
    size = grad.size(-1)
    out = torch.empty_like(gate_up)
    rows = max(1, _PASS_ELEMENTS // size)
    for g, piece, target in zip(grad.split(rows), gate_up.split(rows), out.split(rows), strict=True):
        gate, up = widen(piece).chunk(2, dim=-1)
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        target[:, size:].copy_(silu * g)
        target[:, :size].copy_((sigmoid + silu * (1 - sigmoid)).mul_(up).mul_(g))
    return out


def save_for_silu_mul(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def backward_of_silu_mul(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return silu_mul_backward(grad, *ctx.saved_tensors), None


def _fake_silu_mul(gate_up: Tensor, row_invariant: bool) -> Tensor:
    return gate_up.new_empty(gate_up.size(0), gate_up.size(-1) // 2)


silu_mul = register(
    "silu_mul(Tensor gate_up, bool row_invariant) -> Tensor",
    _silu_mul,
    _fake_silu_mul,
    triton="s1engine.kernels.activation_triton:silu_mul",
    gradient=(save_for_silu_mul, backward_of_silu_mul),
)
