"""What the machine can do at most, measured in the same run as what it is compared with."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import s1engine
from s1engine.kernels import native
from s1engine.kernels.huge_pages import Arena

CPU = torch.device("cpu")
SAMPLE_SECONDS = 0.02  # between two looks at a process's memory


@dataclass(frozen=True)
class Memory:
    """Bytes of a process that are in memory: its own (anonymous), and pages of files, which other processes share."""

    anonymous: int
    file_mapped: int


def read_bandwidth(device: torch.device = CPU, repeats: int = 5) -> float:
    """Bytes per second of memory, the best of `repeats`.

    On a CPU those that all threads together read, in a sum over 512 MiB, in huge pages where there are any: an engine
    whose weights lie in such pages would come out above a floor of small ones. On a GPU those read and those written,
    in a copy of 2 GiB.
    """
    if device.type == "cpu":
        data = Arena(2**29).zeros((2**26,), torch.float64)
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
        "s1engine": s1engine.__version__,
        "C++ operators": native.ISA or native.PROBLEM,
    }


def in_words(description: dict[str, Any]) -> str:
    """What `describe` found, in a line."""
    return ", ".join(f"{name} {value}" for name, value in description.items() if value is not None)


def resident_memory() -> int:
    """Bytes of this process that are in memory now."""
    with open("/proc/self/statm") as line:
        return int(line.read().split()[1]) * resource.getpagesize()


def process_memory(pid: int | str = "self") -> Memory:
    """Of a process now. Raises OSError where there is none, or no /proc, and KeyError of one that has ended."""
    with open(f"/proc/{pid}/status") as lines:
        fields = dict(line.split(":", 1) for line in lines)
    anonymous, file_mapped = (1024 * int(fields[name].split()[0]) for name in ("RssAnon", "RssFile"))
    return Memory(anonymous, file_mapped)


class PeakMemory:
    """The most that a process holds while the `with` block runs; `peak` has it, so far and for good.

    A thread looks every SAMPLE_SECONDS, and the block's two ends count as well; what comes and goes in between is not
    seen. The peaks of anonymous and of file-mapped memory need not have been at the same moment. A process that ends
    in the block leaves what it had, one that had ended before nothing. Raises OSError where there is no such
    process, or no /proc.
    """

    def __init__(self, pid: int | str = "self") -> None:
        self._pid = pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak = Memory(0, 0)

    def __enter__(self) -> PeakMemory:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> bool:
        """Whether the process is still there."""
        try:
            now = process_memory(self._pid)
        except KeyError:  # it has ended, and nobody has waited for it
            return False
        self.peak = Memory(max(self.peak.anonymous, now.anonymous), max(self.peak.file_mapped, now.file_mapped))
        return True

    def _watch(self) -> None:
        with contextlib.suppress(OSError):  # it has ended
            while self._look() and not self._over.wait(SAMPLE_SECONDS):
                pass
            self._look()


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
