"""Rotary frequencies and their scalings, and the table of cosines and sines.

Sources: linear, Chen et al., 2023 (position interpolation); YaRN, Peng et al., 2023, sections 3.2 to 3.4; llama3, the
frequency smoothing published with Llama 3.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ROPE_TYPES = ("default", "linear", "yarn", "llama3")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """How positions become angles. Fields that a rope type does not use keep their defaults.

    rope_type          one of ROPE_TYPES
    theta              base of the frequencies
    factor             how far the context is stretched
    original_context   positions that the model was first trained for (yarn, llama3)
    attention_factor   multiplies cosines and sines (yarn)
    beta_fast, beta_slow, truncate     turns over the original context between which yarn blends
    low_freq_factor, high_freq_factor  the same for llama3, as fractions of the original context
    """

    rope_type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_context: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


def yarn_attention_factor(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """The factor on cosines and sines where the config does not give it (YaRN, section 3.4, and its mscale variant)."""

    def scaled(weight: float) -> float:
        return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0

    return scaled(mscale) / scaled(mscale_all_dim) if mscale and mscale_all_dim else scaled(1.0)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position of each pair of elements, float32 [head_dim / 2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / (rope.theta**exponents)
    if rope.rope_type == "default":
        return plain
    if rope.rope_type == "linear":
        return plain / rope.factor
    if rope.rope_type == "yarn":
        return _yarn(rope, head_dim, plain)
    if rope.rope_type == "llama3":
        return _llama3(rope, plain)
    raise ValueError(f"rope_type={rope.rope_type!r}: must be one of {', '.join(ROPE_TYPES)}")


def _yarn(rope: RopeConfig, head_dim: int, plain: Tensor) -> Tensor:
    def pair_that_turns(times: float) -> float:
        return head_dim * math.log(rope.original_context / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp
    interpolated = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return plain / rope.factor * interpolated + plain * (1 - interpolated)


def _llama3(rope: RopeConfig, plain: Tensor) -> Tensor:
    turns = rope.original_context * plain / (2 * math.pi)
    kept = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return (1 - kept) * plain / rope.factor + kept * plain


def rotary_table(rope: RopeConfig, head_dim: int, positions: int) -> Tensor:
    """Cosines and sines of every position, float32 [positions, 2, head_dim / 2].

    The angle is rounded to float32 as in the models' own training code; the functions of it are computed in float64, so
    an entry does not depend on where in the table a vector instruction happened to start.
    """
    frequencies = inverse_frequencies(rope, head_dim)
    table = torch.empty(positions, 2, head_dim // 2)
    step = 4096
    for start in range(0, positions, step):
        part = table[start : start + step]
        angles = torch.arange(start, start + part.size(0), dtype=torch.float32).unsqueeze(1) * frequencies
        part[:, 0] = angles.double().cos() * rope.attention_factor
        part[:, 1] = angles.double().sin() * rope.attention_factor
    return table
