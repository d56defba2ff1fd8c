"""Memory for weights in huge pages, where the system gives any.

There are fewer translations to look up, so a read of everything, which is what a decode step is, comes nearer to the
memory's bandwidth.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
ALIGNMENT = 64  # of each tensor: a line of the cache, and the widest vector


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def num_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """What a tensor takes of an arena."""
    return _padded(math.prod(shape) * dtype.itemsize)


class Arena:
    """One private mapping that tensors are cut from, one behind the other. It lives as long as any of them."""

    def __init__(self, size: int) -> None:
        size = max(size, 1) + HUGE_PAGE
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_HUGEPAGE)
            self._bytes = torch.frombuffer(memory, dtype=torch.uint8)
        else:
            self._bytes = torch.zeros(size, dtype=torch.uint8)
        self._next = -self._bytes.data_ptr() % HUGE_PAGE

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The next tensor; memory that was never written to costs nothing. Raises ValueError where none is left."""
        end = self._next + math.prod(shape) * dtype.itemsize
        if end > self._bytes.numel():
            raise ValueError(f"shape={list(shape)}: the arena has {self._bytes.numel() - self._next} bytes left")
        tensor = self._bytes[self._next : end].view(dtype).view(*shape)
        self._next += _padded(end - self._next)
        return tensor
