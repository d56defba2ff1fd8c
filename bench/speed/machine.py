"""What the machine can do at most, measured in the same run as what it is compared with."""

from __future__ import annotations

import os
import platform
import resource
import time
from typing import Any

import torch


def read_bandwidth(num_bytes: int = 2**29, repeats: int = 5) -> float:
    """Bytes per second at which all threads together read memory: the best of `repeats` sums over `num_bytes`."""
    data = torch.zeros(num_bytes // 8, dtype=torch.float64)
    data.fill_(1.0)
    return max(num_bytes / _seconds(data.sum) for _ in range(repeats))


def matmul_rate(dtype: torch.dtype, rows: int = 512, width: int = 4096, repeats: int = 5) -> float:
    """Operations per second of a large matrix product: the best of `repeats`."""
    x, w = torch.randn(rows, width).to(dtype), torch.randn(width, width).to(dtype)
    torch.nn.functional.linear(x, w)
    return max(2 * rows * width * width / _seconds(lambda: torch.nn.functional.linear(x, w)) for _ in range(repeats))


def describe() -> dict[str, Any]:
    """Machine and versions, in words that a reader can compare by."""
    import transformers

    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def resident_memory() -> int:
    """Bytes of this process that are in memory now."""
    with open("/proc/self/statm") as line:
        return int(line.read().split()[1]) * resource.getpagesize()


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            found = dict(line.split(":", 1) for line in lines if ":" in line)
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, value in found.items()}
    features = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in fields.get("flags", "").split()]
    return f"{fields.get('model name', platform.machine())} ({', '.join(features)})"


def _seconds(call: Any) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
