"""Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

There is no generator state. The noise of a token is a function of the sample's seed, the position in the sequence and
the token's id, so it is the same in every batch, after preemption, and on every device: `triton.language.philox` gives
the same words. Key: the seed's low and high 32 bits. Counter: (token // 4, position, 0, 0). Word: token % 4.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

# The largest float32 below 1.
_LARGEST_UNIFORM = 1.0 - 2.0**-24

# Largest noise there is, -log(2**-33), rounded up. The smallest is -log(24 log 2), about -2.8.
MAX_GUMBEL = 22.875


def philox4x32_reference(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """The specification. counter uint64 [..., 4] and key uint64 [..., 2], 32 bits used; returns uint64 [..., 4]."""
    c0, c1, c2, c3 = np.moveaxis(counter, -1, 0)
    for index in range(_ROUNDS):
        k0, k1 = (key[..., i] + np.uint64(index * _KEY_INCREMENTS[i]) & np.uint64(_MASK32) for i in range(2))
        p0, p1 = c0 * np.uint64(_MULTIPLIERS[0]), c2 * np.uint64(_MULTIPLIERS[1])
        (h0, l0), (h1, l1) = ((p >> np.uint64(32), p & np.uint64(_MASK32)) for p in (p0, p1))
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
    return np.stack([c0, c1, c2, c3], axis=-1)


def philox_words(seeds: Tensor, positions: Tensor, quads: Tensor) -> Tensor:
    """Random words of tokens 4 * quad ... 4 * quad + 3, int64 [..., 4] in [0, 2**32).

    seeds, positions, quads   int64, of shapes that broadcast to [...]
    """
    k0, k1 = seeds & _MASK32, (seeds >> 32) & _MASK32
    c0, c1, _ = torch.broadcast_tensors(quads, positions & _MASK32, seeds)
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(_ROUNDS):
        # Wraps around at 64 bits, as the product of two 32-bit words needs; the upper halves of words are garbage (the
        # shift is arithmetic) until the next mask.
        p0 = (c0 & _MASK32).mul_(_MULTIPLIERS[0])
        p1 = (c2 & _MASK32).mul_(_MULTIPLIERS[1])
        c0 = (p1 >> 32).bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = (p0 >> 32).bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = p1, p0
        k0, k1 = k0 + _KEY_INCREMENTS[0] & _MASK32, k1 + _KEY_INCREMENTS[1] & _MASK32
    return torch.stack([c0, c1, c2, c3], dim=-1).bitwise_and_(_MASK32)


def uniform(words: Tensor) -> Tensor:
    """float32 in (0, 1) of random words: (word + 0.5) * 2**-32 in float32 arithmetic, at most 1 - 2**-24."""
    return words.float().add_(0.5).mul_(2.0**-32).clamp_(max=_LARGEST_UNIFORM)


def gumbel(words: Tensor) -> Tensor:
    """Standard Gumbel noise of random words, float32: -log(-log(1 - u)), whose upper tail is the fine-grained one.

    Computed in float64 and rounded. torch's logarithm gives an element the same bits wherever in a tensor it lies.
    """
    return uniform(words).double().neg_().log1p_().neg_().log_().neg_().float()


def gumbel_approximate(words: Tensor) -> Tensor:
    """`gumbel` in float32 arithmetic: several times faster, and off by less than 1e-5."""
    return uniform(words).neg_().log1p_().neg_().log_().neg_()


def gumbel_at(seeds: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """Noise of single tokens: seeds, positions, tokens int64 [N]; returns float32 [N]."""
    words = philox_words(seeds, positions, tokens >> 2)
    return gumbel(words.gather(-1, (tokens & 3).unsqueeze(-1)).squeeze(-1))


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab: int) -> Tensor:
    """Noise of a whole vocabulary: seeds, positions int64 [R]; returns float32 [R, vocab]."""
    quads = torch.arange(-(-vocab // 4), device=seeds.device)
    words = philox_words(seeds.unsqueeze(1), positions.unsqueeze(1), quads)
    return gumbel(words.flatten(1)[:, :vocab])


def hash_seed(seed: int, index: int) -> int:
    """Seed of sample `index` of a request: `seed` itself for 0, else SplitMix64 (Steele et al., OOPSLA 2014) of both.

    Takes and returns 64-bit integers; the result is signed, as int64 tensors hold it.
    """
    z = seed & _MASK64
    if index:
        z = (z + index * 0x9E3779B97F4A7C15) & _MASK64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
        z ^= z >> 31
    return z - (1 << 64) if z >> 63 else z
