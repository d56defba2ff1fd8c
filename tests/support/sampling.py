"""Parameters of the sampler's rows, for its tests."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from s1engine.kernels.sampler import SamplingBatch


def batch_of(
    rows: int,
    temperature: Tensor | float = 1.0,
    top_k: Tensor | int = 0,
    top_p: Tensor | float = 1.0,
    min_p: Tensor | float = 0.0,
    seeds: Tensor | int = 0,
    positions: Tensor | int = 0,
) -> SamplingBatch:
    """One value for all rows, or one a row."""

    def column(value: Tensor | float, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(value, dtype=dtype).expand(rows).clone()

    t, p, m = (column(value, torch.float32) for value in (temperature, top_p, min_p))
    k, s, n = (column(value, torch.int64) for value in (top_k, seeds, positions))
    return SamplingBatch(t, k, p, m, s, n, not t.any(), bool(k.any()), bool((p < 1).any()), bool(m.any()))


def select(batch: SamplingBatch, rows: slice | Tensor) -> SamplingBatch:
    """Those rows of a batch, with what the whole of it said of its tensors."""
    names = ("temperature", "top_k", "top_p", "min_p", "seeds", "positions")
    return replace(batch, **{name: getattr(batch, name)[rows] for name in names})
