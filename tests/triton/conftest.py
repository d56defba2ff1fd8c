"""Triton kernels against their references: in the interpreter on the CPU, or as they are on a GPU.

    TRITON_INTERPRET=1 pytest tests/triton     # small shapes, float32, without a GPU
    S1ENGINE_TEST_GPU=1 pytest tests/triton    # on a GPU: real shapes too, bfloat16 too

Triton decides at import which of the two it is, so these tests need a process of their own: elsewhere they are not
collected.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if not INTERPRETED and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(params=[torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """float32 in the interpreter: its tl.dot multiplies the bits of bfloat16 operands as integers."""
    return request.param


@pytest.fixture(scope="session")
def real_sizes() -> bool:
    """Whether shapes of real models are affordable."""
    return not INTERPRETED
