"""What the machine can do at most, measured in the same run as what it is compared with."""

from __future__ import annotations

import os
import platform
import resource
import time
from collections.abc import Callable
from typing import Any

import torch

CPU = torch.device("cpu")


def read_bandwidth(device: torch.device = CPU, repeats: int = 5) -> float:
    """Bytes per second of memory, the best of `repeats`.

    On a CPU those that all threads together read, in a sum over 512 MiB; on a GPU those read and those written, in a
    copy of 2 GiB.
    """
    if device.type == "cpu":
        data = torch.zeros(2**26, dtype=torch.float64)
        data.fill_(1.0)
        return max(data.nbytes / _seconds(data.sum, device) for _ in range(repeats))
    source = torch.zeros(2**31, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return max(2 * source.nbytes / _seconds(lambda: target.copy_(source), device) for _ in range(repeats))


def matmul_rate(dtype: torch.dtype, device: torch.device = CPU, repeats: int = 5) -> float:
    """Operations per second of a large matrix product, [512, 4096] by 4096^2 on a CPU and 8192^3 on a GPU: the best."""
    rows, width = (512, 4096) if device.type == "cpu" else (8192, 8192)
    x, w = torch.randn(rows, width, device=device).to(dtype), torch.randn(width, width, device=device).to(dtype)

    def product() -> torch.Tensor:
        return torch.nn.functional.linear(x, w)

    product()
    return max(2 * rows * width * width / _seconds(product, device) for _ in range(repeats))


def describe() -> dict[str, Any]:
    """Machine and versions, in words that a reader can compare by."""
    import transformers

    return {
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
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


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun
