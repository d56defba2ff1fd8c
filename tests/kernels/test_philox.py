"""Counter-based noise: published vectors, Triton's words, exact values, independence of the batch, distribution."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch

from s1engine.kernels.philox import (
    MAX_GUMBEL,
    gumbel,
    gumbel_approximate,
    gumbel_at,
    gumbel_noise,
    hash_seed,
    philox4x32_reference,
    philox_words,
    uniform,
)

# Random123's known answers for philox4x32-10 (its file kat_vectors): counter, key, words.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> np.ndarray:
    return np.array([int(word, 16) for word in text.split()], dtype=np.uint64)


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS)
def test_reference_gives_the_published_words(counter: str, key: str, expected: str) -> None:
    assert philox4x32_reference(words(counter), words(key)).tolist() == words(expected).tolist()


def random_int64(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randint(-(2**63), 2**63 - 1, shape, generator=torch.Generator().manual_seed(seed))


def reference_words(seeds: torch.Tensor, positions: torch.Tensor, quads: torch.Tensor) -> np.ndarray:
    seed, position, quad = (np.array(t, dtype=np.uint64) for t in np.broadcast_arrays(seeds, positions, quads))
    low = np.uint64(2**32 - 1)
    counter = np.stack([quad & low, position & low, np.zeros_like(quad), np.zeros_like(quad)], axis=-1)
    return philox4x32_reference(counter, np.stack([seed & low, seed >> np.uint64(32)], axis=-1))


def test_words_agree_with_the_reference() -> None:
    seeds, positions = random_int64((7, 1), 0), torch.tensor([0, 1, 5, 1000, 2**20, 2**31 - 1, 2**32 - 1])[:, None]
    quads = torch.arange(300)
    assert np.array_equal(philox_words(seeds, positions, quads).numpy(), reference_words(seeds, positions, quads))
    flat = torch.tensor([3, 2**30, 2**32 - 1])
    assert np.array_equal(
        philox_words(seeds[:3, 0], positions[:3, 0], flat).numpy(),
        reference_words(seeds[:3, 0], positions[:3, 0], flat),
    )


TRITON_PROGRAM = """
import torch, triton, triton.language as tl

@triton.jit
def kernel(seeds, positions, out, QUADS: tl.constexpr):
    row = tl.program_id(0)
    quad = tl.arange(0, QUADS)
    zero = quad * 0
    words = tl.philox(tl.load(seeds + row), quad, zero + tl.load(positions + row), zero, zero)
    for i in tl.static_range(4):
        tl.store(out + (row * QUADS + quad) * 4 + i, words[i].to(tl.int64))

seeds = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 81985529216486895])
positions = torch.tensor([0, 1, 77, 4095, 2**20, 2**31 - 1], dtype=torch.int32)
out = torch.empty(6, 64, 4, dtype=torch.int64)
kernel[(6,)](seeds, positions, out, 64)
print((out & 0xFFFFFFFF).flatten().tolist())
"""


def test_words_are_those_of_triton() -> None:
    pytest.importorskip("triton")
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 81985529216486895])
    positions = torch.tensor([0, 1, 77, 4095, 2**20, 2**31 - 1])
    ours = philox_words(seeds[:, None], positions[:, None], torch.arange(64))
    assert ours.flatten().tolist() == run_interpreted(TRITON_PROGRAM)


def run_interpreted(source: str) -> list[int]:
    """Triton reads the source of a kernel from its file, and the interpreter's switch when it is imported."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "program.py")
        with open(path, "w") as file:
            file.write(source)
        env = {**os.environ, "TRITON_INTERPRET": "1"}
        result = subprocess.run([sys.executable, path], env=env, capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


def test_gumbel_is_the_float64_value_rounded() -> None:
    edges = [0, 1, 2, 127, 2**23, 2**24 - 1, 2**24, 2**24 + 1, 2**31, 2**32 - 2**9, 2**32 - 2**7, 2**32 - 1]
    chosen = torch.cat([torch.tensor(edges), random_int64((5000,), 1) & 0xFFFFFFFF])
    u = ((chosen.numpy().astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)).astype(np.float32)
    u = np.minimum(u, np.float32(1 - 2.0**-24))
    assert np.array_equal(uniform(chosen).numpy(), u)
    expected = [-math.log(-math.log1p(-float(x))) for x in u]
    assert np.array_equal(gumbel(chosen).numpy(), np.array(expected, dtype=np.float32))
    assert (gumbel_approximate(chosen) - gumbel(chosen)).abs().max() < 1e-5


def test_gumbel_range() -> None:
    largest, smallest = gumbel(torch.tensor([0, 2**32 - 1])).tolist()
    assert largest == pytest.approx(33 * math.log(2), abs=1e-6) and largest < MAX_GUMBEL < largest + 0.01
    assert smallest == pytest.approx(-math.log(24 * math.log(2)), abs=1e-6)


@pytest.mark.parametrize("vocab", [1, 2, 3, 4, 5, 63, 64, 65, 129, 1000, 5003])
def test_noise_does_not_depend_on_other_rows(vocab: int) -> None:
    seeds, positions = random_int64((13,), 2), torch.arange(13) * 17
    together = gumbel_noise(seeds, positions, vocab)
    assert together.shape == (13, vocab) and together.dtype == torch.float32
    for row in range(13):
        alone = gumbel_noise(seeds[row : row + 1], positions[row : row + 1], vocab)[0]
        assert torch.equal(together[row], alone)
    # Nor on the vocabulary's size, nor on being asked for alone.
    assert torch.equal(gumbel_noise(seeds, positions, vocab + 3)[:, :vocab], together)
    token = vocab * 2 // 3
    assert torch.equal(gumbel_at(seeds, positions, torch.full((13,), token)), together[:, token])


def test_noise_does_not_depend_on_the_number_of_threads() -> None:
    threads = torch.get_num_threads()
    seeds, positions = random_int64((5,), 3), torch.arange(5)
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(gumbel_noise(seeds, positions, 40_001))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("varied", ["tokens", "positions", "seeds"])
def test_noise_is_gumbel_distributed_along_every_axis(varied: str) -> None:
    """Kolmogorov-Smirnov at 200000 samples, and no correlation of neighbours; inputs are fixed, so it never wavers."""
    count = 200_000
    run, fixed = torch.arange(count), torch.full((count,), 12345)
    inputs = {"seeds": fixed, "positions": fixed, "tokens": fixed} | {varied: run}
    noise = gumbel_at(inputs["seeds"], inputs["positions"], inputs["tokens"]).double()
    cdf = (-(-noise.sort().values).exp()).exp()
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    distance = max((steps[1:] - cdf).abs().max().item(), (cdf - steps[:-1]).abs().max().item())
    assert distance * math.sqrt(count) < 1.95  # exceeded once in a thousand
    centred = noise - noise.mean()
    for lag in (1, 2, 3, 4):
        correlation = (centred[lag:] * centred[:-lag]).mean() / centred.square().mean()
        assert abs(correlation.item()) * math.sqrt(count) < 3.5


def test_hash_seed() -> None:
    # The published first outputs of SplitMix64 from 1234567.
    stream = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [hash_seed(1234567, i) % 2**64 for i in range(1, 6)] == stream
    for seed in (0, 1, -1, 2**63 - 1, -(2**63)):
        assert hash_seed(seed, 0) == seed
        many = [hash_seed(seed, i) for i in range(2000)]
        assert len(set(many)) == 2000
        assert torch.tensor(many).dtype == torch.int64
