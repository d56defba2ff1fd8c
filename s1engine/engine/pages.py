"""Zeros that take no memory before they are written, and give it back: whole pages of a tensor on a CPU (Linux)."""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor


def clear_pages(tensor: Tensor) -> bool:
    """Make a contiguous tensor zeros, and give its memory back. False, and nothing is done, where that cannot be."""
    if tensor.device.type != "cpu" or not sys.platform.startswith("linux"):
        return False
    data = tensor.view(-1)
    start = data.data_ptr()
    end = start + data.numel() * data.element_size()
    first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if first >= last:
        return False
    # Private pages are dropped, and read as zeros from then on; other systems may leave their values.
    madvise = ctypes.CDLL(None).madvise
    if madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED) != 0:
        return False
    ctypes.memset(start, 0, first - start)
    ctypes.memset(last, 0, end - last)
    return True
