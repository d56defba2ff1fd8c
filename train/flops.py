"""Floating point operations of training, and what a machine could do of them at most."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from s1engine.models import ModelConfig

# Dense bfloat16 peaks in operations per second, from the makers' data sheets.
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


def matrix_parameters(config: ModelConfig) -> int:
    """Parameters that a token is multiplied with: the layers' matrices and the head, not the embedding's lookup."""
    heads = config.num_heads + 2 * config.num_kv_heads
    layer = config.hidden_size * config.head_dim * (heads + config.num_heads)
    layer += 3 * config.hidden_size * config.intermediate_size
    return config.num_layers * layer + config.vocab_size * config.hidden_size


def training_flops(config: ModelConfig, lengths: Sequence[int]) -> float:
    """Operations that training on samples of these lengths needs: forward and backward, nothing computed twice.

    6 per matrix parameter and token, and 6 * heads * head_dim per layer for each pair of a token and one that it
    attends to (12 / 2 for the causal half), as in PaLM (Chowdhery et al., 2022, appendix B).
    """
    tokens = sum(lengths)
    pairs = sum(length * length for length in lengths)
    attention = 6 * config.num_layers * config.num_heads * config.head_dim * pairs
    return 6 * matrix_parameters(config) * tokens + attention


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations per second of one device: of a known GPU its data sheet's, of a CPU the best of a few products.

    None for a GPU that is not in the table, and for float32 on GPUs.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak for key, peak in PEAKS.items() if key in name and dtype == torch.bfloat16), None)
    a, b = (torch.randn(1024, 1024, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best
