"""Draws of the sampler's kernels against sort-and-mask in float64 with the same noise, and against `sampler.sample`."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from sampler_slots import Slots
from torch import Tensor

from s1engine.kernels import sampler_scores_triton, sampler_truncation_triton
from s1engine.kernels.philox import gumbel as reference_gumbel
from s1engine.kernels.philox import gumbel_noise as reference_noise
from s1engine.kernels.sampler import SamplingBatch, sample
from s1engine.kernels.sampler_reference import reference_kept_set
from s1engine.kernels.sampler_scores_triton import gumbel, gumbel_noise
from s1engine.kernels.slot_layout import Result

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def many_tiles(real_sizes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter a small vocabulary has several tiles, and its groups take several rounds."""
    if not real_sizes:
        monkeypatch.setattr(sampler_scores_triton, "TILE", 512)
        monkeypatch.setattr(sampler_truncation_triton, "SEARCH_GROUPS", 8)
        monkeypatch.setattr(sampler_truncation_triton, "SWEEP_GROUPS", 4)


def batch_of(slots: Slots, rows: int) -> SamplingBatch:
    def column(name: str) -> Tensor:
        return torch.tensor([slots.get_float(i, name) for i in range(rows)])

    temperature, top_p, min_p = column("temperature"), column("top_p"), column("min_p")
    return SamplingBatch(
        temperature=temperature,
        top_k=torch.tensor([slots.get(i, "top_k") for i in range(rows)]),
        top_p=top_p,
        min_p=min_p,
        seeds=torch.tensor([slots.seed(i) for i in range(rows)]),
        positions=torch.tensor([slots.get(i, "length") for i in range(rows)]),
        all_greedy=False,
        any_top_k=True,
        any_top_p=True,
        any_min_p=True,
    )


def draw(rng: np.random.Generator, slots: Slots, rows: int) -> None:
    for slot in range(rows):
        slots.set(
            slot,
            seed=int(rng.integers(-(2**63), 2**63 - 1)),
            length=int(rng.integers(1, 30)),
            temperature=float(rng.choice([0.0, 0.2, 0.6, 1.0, 1.0, 1.7, 30.0])),
            top_k=int(rng.choice([0, 0, 0, 1, 2, 20, 50, 400, 10_000])),
            top_p=float(rng.choice([1.0, 1.0, 0.0, 0.01, 0.3, 0.8, 0.95, 0.999])),
            min_p=float(rng.choice([0.0, 0.0, 0.0, 1e-5, 0.01, 0.1, 0.5, 1.0])),
        )


def check(slots: Slots, logits: Tensor, most_doubtful: float = 0.1) -> list[int]:
    """Sample one token a slot; returns them."""
    rows = list(range(len(logits)))
    acceptable = [slots.acceptable(slot, logits[slot].float().cpu()) for slot in rows]
    by_torch = sample(logits.float().cpu(), batch_of(slots, len(rows))).tolist()
    settings = slots.fields.copy()
    tokens = slots.sample(logits, rows)[:, Result.TOKEN].tolist()
    for slot in rows:
        names = ("temperature", "top_k", "top_p", "min_p")
        slots.fields[slot], after = settings[slot], slots.fields[slot].copy()
        setting = f"row {slot}: " + ", ".join(
            f"{n} {slots.get(slot, n) if n == 'top_k' else slots.get_float(slot, n)}" for n in names
        )
        slots.fields[slot] = after
        assert tokens[slot] in acceptable[slot], setting
        assert tokens[slot] == by_torch[slot] or len(acceptable[slot]) > 1, setting
    doubtful = sum(len(tokens) > 1 for tokens in acceptable)
    assert doubtful <= most_doubtful * len(rows), "too many rows whose token rounding may change"
    return tokens


@pytest.mark.parametrize("kind", ["plain", "ties", "bans", "peaked", "flat"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_the_reference(kind: str, dtype: torch.dtype, device: torch.device, real_sizes: bool) -> None:
    rows, vocab = (2000, 5000) if real_sizes else (10, 1100)
    rng = torch.Generator().manual_seed(len(kind))
    logits = torch.randn(rows, vocab, generator=rng)
    if kind == "plain":
        logits *= 4
    elif kind == "ties":
        logits = (logits * 2).round()
    elif kind == "bans":
        logits = (logits * 4).masked_fill(torch.rand(rows, vocab, generator=rng) < 0.7, -math.inf)
        logits[:, vocab // 2] = 0.5
    elif kind == "peaked":
        logits = logits * 3 - 20
        logits.scatter_(1, torch.randint(vocab, (rows, 30), generator=rng), 1.0)
        logits += 0.1 * torch.randn(rows, vocab, generator=rng)
    else:
        logits *= 0.01
    slots = Slots(rows, vocab)
    draw(np.random.default_rng(len(kind)), slots, rows)
    check(slots, logits.to(dtype).to(device))


@pytest.mark.parametrize("vocab", [1, 3, 24, 63, 64, 65, 513])
def test_any_vocabulary(vocab: int, device: torch.device) -> None:
    slots = Slots(4, vocab)
    slots.set(0, temperature=0.0)
    slots.set(1, top_p=0.7)
    slots.set(2, top_k=5)
    slots.set(3, min_p=0.2)
    check(slots, torch.randn(4, vocab, generator=torch.Generator().manual_seed(vocab)).to(device))


@pytest.mark.parametrize("top_k", [0, 900])
def test_a_small_nucleus_takes_many_draws(top_k: int, device: torch.device, real_sizes: bool) -> None:
    """The noise alone decides among nearly equal tokens, so a draw is rejected with probability 1 - top_p."""
    rows = 200 if real_sizes else 4
    logits = 0.001 * torch.randn(rows, 1000, generator=torch.Generator().manual_seed(0))
    slots = Slots(rows, 1000)
    draws = 0
    for slot in range(rows):
        slots.set(slot, top_p=0.005, top_k=top_k)
        scores = logits[slot] + reference_noise(torch.tensor([slot]), torch.tensor([8]), 1000)[0]
        kept = reference_kept_set(logits[slot], 1.0, top_k, 1.0, 0.0)
        scores[~kept] = -math.inf
        nucleus = reference_kept_set(logits[slot], 1.0, top_k, 0.005, 0.0)
        while not nucleus[drawn := scores.argmax()]:
            scores[logits[slot] <= logits[slot, drawn]] = -math.inf
            draws += 1
    assert draws >= 3 * rows, "two sweeps were enough: the test would not show much"
    check(slots, logits.to(device), most_doubtful=0.3)


def test_min_p_draws_again_when_it_drops_the_drawn_token(device: torch.device) -> None:
    logits = torch.full((3, 600), -2.0)
    logits[:, 100:110] = torch.linspace(0, 0.1, 10)
    slots = Slots(3, 600)
    for slot, top_p in enumerate([1.0, 0.9, 0.15]):
        slots.set(slot, min_p=0.5, top_p=top_p)
        noisy = logits[slot] + reference_noise(torch.tensor([slot]), torch.tensor([8]), 600)[0]
        assert logits[slot, noisy.argmax()] == -2
    assert all(100 <= token < 110 for token in check(slots, logits.to(device)))


def test_unusual_rows(device: torch.device) -> None:
    ninf = -math.inf
    logits = torch.full((9, 700), ninf)
    logits[1, 650] = -5.0  # all but one
    logits[2, 3], logits[2, 600] = 40.0, 0.0  # one that dominates
    logits[3, 2:] = 1.0  # ties of everything
    logits[4, 600], logits[4, 20] = 3.0, 2.9999  # a temperature that would overflow
    logits[5, 600], logits[5, 20] = 3.0, 2.9999
    logits[6, 33], logits[6, 34] = math.inf, 1.0
    logits[7, 30], logits[7, 40:50], logits[7, 600] = 0.5, -0.0, 0.0  # equal, though of different bits
    logits[8, 5:8] = 1.0
    for options in ({"top_p": 0.9}, {"top_k": 2, "top_p": 0.5, "min_p": 0.1}):
        slots = Slots(9, 700)
        for slot in range(9):
            slots.set(slot, **options)
        slots.set(4, temperature=1e-20)
        slots.fields[5, 10] = 1  # the smallest float there is
        slots.set(7, top_k=2, top_p=1.0, temperature=30.0, seed=9)
        slots.set(8, temperature=0.0)
        tokens = check(slots, logits.to(device))
        assert tokens[:3] == [0, 650, 3]
        assert tokens[4:7] == [600, 600, 33]
        assert tokens[7] in range(40, 50)  # the seed is chosen so
        assert tokens[8] == 5


def test_a_broken_model_gives_some_token(device: torch.device) -> None:
    logits = torch.full((4, 600), math.nan)
    logits[2:, 50:] = 1.0
    slots = Slots(4, 600)
    for slot, options in enumerate([{"top_p": 0.5}, {"top_k": 3}, {"top_p": 0.2, "min_p": 0.1}, {"top_k": 9}]):
        slots.set(slot, **options)
    assert all(0 <= token < 600 for token in slots.sample(logits.to(device), [0, 1, 2, 3])[:, Result.TOKEN])


def test_a_row_does_not_depend_on_its_place_or_on_the_others(device: torch.device, real_sizes: bool) -> None:
    count, vocab = (300, 5000) if real_sizes else (8, 600)
    rng = np.random.default_rng(5)
    logits = (torch.randn(count, vocab, generator=torch.Generator().manual_seed(5)) * 2).to(device)
    slots = Slots(count, vocab)
    draw(rng, slots, count)
    start = slots.arrays()

    def results(order: list[int]) -> np.ndarray:
        vars(slots).update({name: array.copy() for name, array in start.items()})
        places = torch.tensor([max(i, 0) for i in order], device=device)
        return slots.sample(logits[places].contiguous(), order)

    together = results(list(range(count)))
    order = rng.permutation(count).tolist()
    spread = [slot for i in order for slot in (i, -1)]
    mixed = results(spread)
    assert np.array_equal(mixed[::2], together[order])
    assert (mixed[1::2, Result.TOKEN] == -1).all() and (np.delete(mixed[1::2], Result.TOKEN, axis=1) == 0).all()
    for i in order[:2]:
        assert np.array_equal(results([i])[0], together[i])


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Pearson's statistic in standard deviations above its expectation."""
    kept = probabilities > 0
    expected = probabilities[kept] * counts.sum()
    freedom = kept.sum() - 1
    return float((((counts[kept] - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


def test_frequencies_are_probabilities(device: torch.device, real_sizes: bool) -> None:
    draws, vocab = (20_000 if real_sizes else 120), 24
    logits = torch.linspace(0, 3, vocab).repeat(draws, 1)
    slots = Slots(draws, vocab)
    for slot in range(draws):
        slots.set(slot, temperature=0.8, top_p=0.6)
    tokens = np.array(check(slots, logits.to(device)))
    counts = np.bincount(tokens, minlength=vocab)
    kept = reference_kept_set(logits[0], 0.8, 0, 0.6, 0.0)
    probabilities = (logits[0] / 0.8).masked_fill(~kept, -math.inf).softmax(0).double().numpy()
    assert 3 < kept.sum() < 12 and counts[~kept.numpy()].sum() == 0
    assert abs(chi_square(counts, probabilities)) < 4
    assert abs(chi_square(counts, probabilities[::-1].copy()[np.argsort(~kept.numpy(), kind="stable")])) > 4


@triton.jit
def noise_kernel(fields, out, QUADS: tl.constexpr):
    slot = tl.program_id(0)
    quads = tl.arange(0, QUADS)
    ids = quads[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(out + slot * QUADS * 4 + ids, gumbel_noise(fields, slot, quads))


@triton.jit
def gumbel_kernel(words, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, gumbel(tl.load(words + at).to(tl.uint32, bitcast=True)))


def test_noise_is_that_of_the_seed_and_the_position(device: torch.device) -> None:
    seeds, positions = [0, 1, -1, 2**40 + 7, -(2**63)], [1, 2, 30_000, 131_071, 5]
    slots = Slots(5, 1)
    for slot in range(5):
        slots.set(slot, seed=seeds[slot], length=positions[slot])
    out = torch.full((5, 4096), math.nan, device=device)
    noise_kernel[(5,)](torch.from_numpy(slots.fields).to(device), out, QUADS=1024, enable_fp_fusion=False)
    expected = reference_noise(torch.tensor(seeds), torch.tensor(positions), 4096)
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-6, atol=1e-6)


def test_noise_is_accurate_in_both_tails(device: torch.device) -> None:
    edges = [k + d for k in (0, 2**8, 2**16, 2**24, 2**31, 2**32) for d in range(-128, 128)]
    words = torch.tensor([w for w in edges if 0 <= w < 2**32] + [2**32 - 1 - 2**i for i in range(32)])
    words = torch.cat([words, torch.arange(2048 - len(words)) * 2_000_003])
    out = torch.full((2048,), math.nan, device=device)
    as_int32 = torch.from_numpy(words.numpy().astype(np.uint32).view(np.int32)).to(device)
    gumbel_kernel[(1,)](as_int32, out, SIZE=2048, enable_fp_fusion=False)
    torch.testing.assert_close(out.cpu(), reference_gumbel(words), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_real_vocabulary(dtype: torch.dtype, device: torch.device, real_sizes: bool) -> None:
    if not real_sizes:
        pytest.skip("minutes in the interpreter")
    rows, vocab = 256, 151_936
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, vocab, generator=rng) * 2.5
    logits[:, :2000] += torch.rand(rows, 2000, generator=rng) * 12
    slots = Slots(rows, vocab)
    draw(np.random.default_rng(0), slots, rows)
    check(slots, logits.to(dtype).to(device))
