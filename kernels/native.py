"""Loads the C++ operators of csrc/cpu, where they were built.

The library gives CPU implementations to operators that Python defines (registry.py), so everything runs without it,
only slower. `S1ENGINE_DISABLE_CSRC=1` leaves it out, `S1ENGINE_OPS=FILE` takes another build of it.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from importlib.util import find_spec

import torch

# Triton's kernels serve CPU tensors then, see registry.py.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DISABLED = os.environ.get("S1ENGINE_DISABLE_CSRC") == "1"


def _load() -> tuple[str | None, str]:
    """(Instruction set, or None where nothing was loaded; what `s1engine env` says of it)."""
    if DISABLED:
        return None, "off (S1ENGINE_DISABLE_CSRC=1)"
    if INTERPRETED:
        return None, "off (TRITON_INTERPRET=1)"
    path = os.environ.get("S1ENGINE_OPS")
    if path is None:
        spec = find_spec("s1engine._ops")
        if spec is None or spec.origin is None:
            return None, "not built: a C++ compiler is needed, and torch before s1engine is installed"
        path = spec.origin
    try:
        torch.ops.load_library(path)
        library = ctypes.CDLL(path)
        library.s1_cpu_isa.restype = ctypes.c_char_p
        return library.s1_cpu_isa().decode(), ""
    except OSError as error:
        return None, f"cannot be loaded: {error}"


ISA, PROBLEM = _load()
AVAILABLE = ISA is not None

if PROBLEM and not DISABLED and not INTERPRETED:
    warnings.warn(
        f"s1engine's C++ operators for CPUs are {PROBLEM}. The PyTorch code serves, at a fraction of the speed.",
        RuntimeWarning,
        stacklevel=2,
    )
