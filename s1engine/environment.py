"""What this machine can run."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform

import torch

import s1engine
from s1engine.kernels import native
from s1engine.thinking.stepper import implementation


def environment() -> dict[str, str]:
    """Versions, devices and which implementations are in use, in words."""
    packages = ("transformers", "safetensors", "numpy", "triton", "flash-attn")
    on_gpu = torch.cuda.is_available()
    on_cpu = "C++" if native.AVAILABLE else "torch"
    return {
        "s1engine": s1engine.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in packages},
        "cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "gpu": _gpu() if on_gpu else "none",
        "device": "cuda" if on_gpu else "cpu",
        "attention": "triton; flash-attn for prompts where block_size allows" if on_gpu else on_cpu,
        "C++ operators": native.PROBLEM or native.ISA or "",
        "thinking machine": "triton" if on_gpu else implementation(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpu() -> str:
    properties = torch.cuda.get_device_properties(0)
    capability = f"{properties.major}.{properties.minor}"
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability {capability}"
