"""What `sampler` must compute, written to be read: truncation by sorting, in float64. One row at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from s1engine.kernels.philox import gumbel_noise


def reference_kept_set(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Which tokens truncation keeps: float32 logits [V], temperature > 0; returns bool [V]."""
    scaled = (logits / temperature).double()
    order = torch.argsort(logits, descending=True, stable=True)
    ordered = logits[order]
    # Where each token's group of equals starts: that many tokens are strictly above it.
    num_above = torch.searchsorted(-ordered, -ordered)
    mass = (scaled[order] - scaled.max()).exp()

    keep = mass >= min_p
    if top_k > 0:
        keep &= num_above < top_k
    mass = mass * keep
    mass_above = torch.cat([mass.new_zeros(1), mass.cumsum(0)])[num_above]
    if top_p < 1:
        keep &= mass_above < top_p * mass.sum()
    keep[num_above == 0] = True
    return torch.empty_like(keep).index_copy_(0, order, keep)


def reference_sample(
    logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, seed: int, position: int
) -> int:
    """The token drawn from float32 logits [V]: mask, add the noise, take the first maximum."""
    if temperature == 0:
        return int(logits.argmax())
    kept = reference_kept_set(logits, temperature, top_k, top_p, min_p)
    noise = gumbel_noise(torch.tensor([seed]), torch.tensor([position]), len(logits))[0]
    return int((logits / temperature + noise).masked_fill(~kept, -math.inf).argmax())
