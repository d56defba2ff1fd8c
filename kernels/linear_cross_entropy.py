"""The language model's loss without its logits: head, softmax and cross-entropy over a few rows at a time.

The logits of a row of 32,768 tokens over 152,064 ids would be 20 GB. Here a piece of rows at most has its logits in
memory. A loss is a sum with known weights, so a piece's gradients are finished as soon as its logits are there: three
products with the head instead of the four of recomputing them in the backward pass (as Liger Kernel does, Hsu et al.,
2024, section 3.2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Float32 logits of one piece: it is made of as many rows as fit.
PIECE_BYTES = 256 << 20


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Sum over rows of weights[t] * -log softmax(hidden[t] @ weight^T)[targets[t]]; float32 (float64 of such inputs).

    hidden   [T, H], differentiable
    weight   [V, H] in the dtype of `hidden`, differentiable
    targets  int64 [T]
    weights  float32 [T]; rows of weight 0 cost nothing. Not differentiable.
    """
    kept = weights.nonzero().flatten()
    if len(kept) != len(weights):
        hidden, targets, weights = hidden.index_select(0, kept), targets[kept], weights[kept]
    return _LinearCrossEntropy.apply(hidden, weight, targets, weights)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight: Tensor | None = None
        loss = hidden.new_zeros((), dtype=wide)
        rows = max(1, PIECE_BYTES // (weight.size(0) * 4))
        for start in range(0, len(hidden), rows):
            piece = slice(start, start + rows)
            x, scale = hidden[piece], weights[piece].to(wide)
            chosen = targets[piece].unsqueeze(1)
            logprobs = (x @ weight.T).to(wide).log_softmax(1)
            loss -= torch.dot(scale, logprobs.gather(1, chosen).squeeze(1))
            if not needs_hidden and not needs_weight:
                continue
            grad = logprobs.exp_().scatter_add_(1, chosen, -torch.ones_like(chosen, dtype=wide))
            grad = grad.mul_(scale.unsqueeze(1)).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[piece])
            if not needs_weight:
                continue
            # Pieces are summed in float32: in bfloat16 the sum would lose those that come late.
            if grad_weight is None:
                grad_weight = (grad.T @ x).to(wide)
            elif grad.dtype == wide:
                grad_weight.addmm_(grad.T, x)
            else:
                grad_weight += grad.T @ x
        if needs_weight:
            grad_weight = torch.zeros_like(weight) if grad_weight is None else grad_weight.to(weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if float(grad) != 1.0:  # the head's gradient may be gigabytes: no copy of it where none is needed
            grad_hidden, grad_weight = (None if part is None else part * grad for part in (grad_hidden, grad_weight))
        return grad_hidden, grad_weight, None, None
