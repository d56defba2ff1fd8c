"""The sampler against sort-and-mask in float64 with the same noise, against transformers, and against probabilities.

It is the one in PyTorch: tests/csrc/test_sampler.py looks at the one in C++.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from sampling import batch_of, select
from torch import Tensor
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from s1engine.kernels import sampler
from s1engine.kernels.philox import gumbel_at, gumbel_noise
from s1engine.kernels.sampler import SamplingBatch, processed_logits, sample
from s1engine.kernels.sampler_reference import reference_kept_set, reference_sample


@pytest.fixture(autouse=True)
def in_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "_sample_op", sampler._sample)


def check_against_reference(logits: Tensor, batch: SamplingBatch) -> None:
    before = logits.clone()
    tokens, processed = sample(logits, batch), processed_logits(logits, batch)
    assert torch.equal(logits, before), "the logits were modified"
    assert tokens.dtype == torch.int64 and tokens.shape == (len(logits),)
    for row in range(len(logits)):
        x, temperature, k = logits[row], batch.temperature[row].item(), int(batch.top_k[row])
        p, m = batch.top_p[row].item(), batch.min_p[row].item()
        setting = f"row {row}: V={len(x)} T={temperature} k={k} p={p} min_p={m}"
        seed, position = int(batch.seeds[row]), int(batch.positions[row])
        assert tokens[row] == reference_sample(x, temperature, k, p, m, seed, position), setting
        if temperature == 0:
            assert torch.equal(processed[row], x), setting
        else:
            kept = reference_kept_set(x, temperature, k, p, m)
            assert torch.equal(processed[row], (x / temperature).masked_fill(~kept, -math.inf)), setting


def draw(rng: torch.Generator, choices: list[float], rows: int) -> Tensor:
    return torch.tensor(choices)[torch.randint(len(choices), (rows,), generator=rng)]


@pytest.mark.parametrize("kind", ["plain", "ties", "bans", "peaked", "flat"])
@pytest.mark.parametrize("case", range(40))
def test_agrees_with_the_reference(kind: str, case: int) -> None:
    rng = torch.Generator().manual_seed(case)
    sizes = (1, 2, 3, 17, 63, 64, 65, 128, 500, 1000, 1500, 2500, 5000)
    vocab = sizes[case % len(sizes)] if case < 26 else int(torch.randint(1, 5001, (1,), generator=rng))
    rows = 16
    logits = torch.randn(rows, vocab, generator=rng)
    if kind == "plain":
        logits *= 4
    elif kind == "ties":
        logits = (logits * 8).bfloat16().float() if case % 2 else (logits * 2).round()
    elif kind == "bans":
        logits = (logits * 4).masked_fill(torch.rand(rows, vocab, generator=rng) < 0.7, -math.inf)
        logits[:, vocab // 2] = 0.5
    elif kind == "peaked":
        logits = logits * 3 - 20
        logits.scatter_(1, torch.randint(vocab, (rows, min(vocab, 30)), generator=rng), 1.0)
        logits += 0.1 * torch.randn(rows, vocab, generator=rng)
    else:
        logits *= 0.01
    batch = batch_of(
        rows,
        temperature=draw(rng, [0.0, 0.2, 0.6, 1.0, 1.0, 1.7, 30.0], rows),
        top_k=draw(rng, [0, 0, 1, 2, 5, 20, 50, 1000, 4999, 10_000], rows).long(),
        top_p=draw(rng, [1.0, 1.0, 0.0, 0.01, 0.3, 0.5, 0.8, 0.95, 0.999, 1 - 2**-24], rows),
        min_p=draw(rng, [0.0, 0.0, 0.0, 1e-5, 0.01, 0.1, 0.5, 1.0], rows),
        seeds=torch.randint(-(2**63), 2**63 - 1, (rows,), generator=rng),
        positions=torch.randint(0, 2**20, (rows,), generator=rng),
    )
    check_against_reference(logits, batch)


@pytest.mark.parametrize("top_p", [0.02, 0.1, 0.5])
def test_a_small_nucleus_takes_many_draws(top_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = 0
    inner = sampler._exact_argmax

    def counting(*args: Tensor) -> Tensor:
        nonlocal draws
        draws += 1
        return inner(*args)

    monkeypatch.setattr(sampler, "_exact_argmax", counting)
    # The noise alone decides among so many nearly equal tokens, so a draw is rejected with probability 1 - top_p.
    logits = 0.001 * torch.randn(8, 700, generator=torch.Generator().manual_seed(0))
    check_against_reference(logits, batch_of(8, top_p=top_p, seeds=torch.arange(8)))
    assert draws >= 2


def test_near_ties_of_approximate_scores_are_decided_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    inner, rng = sampler.gumbel_approximate, torch.Generator().manual_seed(7)

    def inexact(words: Tensor) -> Tensor:
        noise = inner(words)
        return noise + 4e-5 * torch.randn(noise.shape, generator=rng).clamp(-1, 1)

    monkeypatch.setattr(sampler, "gumbel_approximate", inexact)
    rows, vocab = 60_000, 64
    logits = 0.1 * torch.randn(rows, vocab, generator=rng)
    batch = batch_of(rows, seeds=torch.arange(rows))
    noisy = logits + gumbel_noise(batch.seeds, batch.positions, vocab)
    first, second = noisy.topk(2, dim=1).values.unbind(1)
    assert (first - second < 5e-5).any(), "no near tie: the test would show nothing"
    assert torch.equal(sample(logits, batch), noisy.argmax(1))


def test_mass_out_of_reach_of_the_noise_counts() -> None:
    """Tokens too unlikely to be drawn here are skipped, but top-p is a share of their mass as well."""
    # Both leading tokens with large noise: then nothing 18 below can win, and the second of them is drawn.
    seeds = torch.arange(3_000_000)
    noise = [gumbel_at(seeds, torch.zeros_like(seeds), torch.full_like(seeds, token)) for token in (0, 1)]
    found = torch.nonzero((noise[0] > 5) & (noise[1] > noise[0] + 0.1)).flatten()[:3]
    assert len(found) == 3
    logits = torch.full((1, 5000), -18.0)
    logits[0, :2] = torch.tensor([0.0, -0.01])
    mass = logits[0].double().exp()
    alone, everything = 1 / mass[:2].sum().item(), 1 / mass.sum().item()
    assert alone - everything > 1e-5
    top_p = (alone + everything) / 2  # of everything, the first token has less than this; of the two, more
    for seed in found.tolist():
        for top_k in (0, 4999):
            assert sample(logits, batch_of(1, top_p=top_p, top_k=top_k, seeds=seed)).tolist() == [1]


def test_a_large_vocabulary() -> None:
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(10, 151_936, generator=rng) * 2.5
    logits[:, :2000] += torch.rand(10, 2000, generator=rng) * 12
    logits[5:] = logits[5:].bfloat16().float()
    batch = batch_of(
        10,
        temperature=torch.tensor([1.0, 0.6, 0.6, 1.0, 0.0] * 2),
        top_k=torch.tensor([0, 0, 20, 0, 0] * 2),
        top_p=torch.tensor([1.0, 0.95, 0.95, 1.0, 1.0] * 2),
        min_p=torch.tensor([0.0, 0.0, 0.0, 0.05, 0.0] * 2),
        seeds=torch.arange(10),
        positions=torch.arange(10) * 1000,
    )
    check_against_reference(logits, batch)


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    rng = torch.Generator().manual_seed(1)
    rows, vocab = 48, 9001  # several chunks
    logits = torch.randn(rows, vocab, generator=rng) * draw(rng, [0.1, 3.0, 10.0], rows).unsqueeze(1)
    batch = batch_of(
        rows,
        temperature=draw(rng, [0.0, 0.6, 1.0, 2.0], rows),
        top_k=draw(rng, [0, 0, 7, 300], rows).long(),
        top_p=draw(rng, [1.0, 0.3, 0.9], rows),
        min_p=draw(rng, [0.0, 0.0, 0.1], rows),
        seeds=torch.arange(rows),
    )
    together, processed = sample(logits, batch), processed_logits(logits, batch)
    for start, end in [(i, i + 1) for i in range(rows)] + [(0, 7), (7, 30), (30, 48)]:
        part = slice(start, end)
        assert torch.equal(sample(logits[part], select(batch, part)), together[part])
        assert torch.equal(processed_logits(logits[part], select(batch, part)), processed[part])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(sample(logits, batch), together)
    finally:
        torch.set_num_threads(threads)
    order = torch.randperm(rows, generator=rng)
    shuffled = replace(select(batch, slice(None)), **{
        name: getattr(batch, name)[order] for name in ("temperature", "top_k", "top_p", "min_p", "seeds", "positions")
    })  # fmt: skip
    assert torch.equal(sample(logits[order], shuffled), together[order])


def test_mass_of_a_row_has_the_same_bits_in_every_batch() -> None:
    """Accepting a draw compares sums, so these must not depend on how torch splits or orders the rows."""
    rng = torch.Generator().manual_seed(2)
    scaled = torch.randn(9, 64 * 700, generator=rng) * 5
    together = sampler._row_sum(sampler._mass(scaled))
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for row in range(9):
                alone = scaled[row : row + 1].clone()
                assert torch.equal(sampler._row_sum(sampler._mass(alone)), together[row : row + 1])
                padded = torch.nn.functional.pad(alone, (0, 64 * 5), value=-math.inf)
                assert torch.equal(sampler._row_sum(sampler._mass(padded)), together[row : row + 1])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("top_k, top_p, min_p", [(0, 0.9, 0.0), (40, 1.0, 0.0), (0, 1.0, 0.02), (100, 0.8, 0.001)])
def test_keeps_what_transformers_keeps(top_k: int, top_p: float, min_p: float) -> None:
    """Without ties. transformers' processors in the order min-p, top-k, top-p."""
    logits = torch.randn(6, 3000, generator=torch.Generator().manual_seed(3)) * 3
    expected = logits / 0.7
    ids = torch.LongTensor([[0]] * 6)
    if min_p:
        expected = MinPLogitsWarper(min_p)(ids, expected)
    if top_k:
        expected = TopKLogitsWarper(top_k)(ids, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(ids, expected)
    batch = batch_of(6, temperature=0.7, top_k=top_k, top_p=top_p, min_p=min_p)
    actual = processed_logits(logits, batch)
    assert torch.equal(actual.isfinite(), expected.isfinite())
    assert torch.allclose(actual, expected)
    assert 1 < actual.isfinite().sum() < actual.numel()


def test_ties_are_kept_or_dropped_together() -> None:
    logits = torch.tensor([[3.0, 2.0, 3.0, 2.0, 2.0, 0.0]])

    def kept(**options: float) -> list[int]:
        return torch.nonzero(processed_logits(logits, batch_of(1, **options))[0].isfinite()).flatten().tolist()

    assert kept(top_k=1) == [0, 2]
    assert kept(top_k=2) == [0, 2]
    assert kept(top_k=3) == [0, 1, 2, 3, 4]
    assert kept(top_k=5) == [0, 1, 2, 3, 4]
    assert kept(top_k=6) == [0, 1, 2, 3, 4, 5]
    share = 2 * math.exp(3) / (2 * math.exp(3) + 3 * math.exp(2) + 1)
    assert kept(top_p=0.01) == [0, 2]
    assert kept(top_p=share - 0.001) == [0, 2]
    assert kept(top_p=share + 0.001) == [0, 1, 2, 3, 4]
    assert kept(min_p=1.0) == [0, 2]
    assert kept(min_p=0.36) == [0, 1, 2, 3, 4]  # e**-1 is 0.3679
    assert kept(min_p=0.37) == [0, 2]


def test_top_p_counts_shares_of_what_is_left() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    # Of the two that top-k leaves, the first has 4/7 of the mass; of all four it has 4/10.
    batch = batch_of(1, top_k=2, top_p=0.5)
    assert processed_logits(logits, batch).isfinite().tolist() == [[True, False, False, False]]
    batch = batch_of(1, top_k=0, top_p=0.5)
    assert processed_logits(logits, batch).isfinite().tolist() == [[True, True, False, False]]


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    for vocab in (5, 64, 130, 700):
        logits = torch.zeros(4, vocab)
        logits[1, vocab - 1] = 1
        logits[2, 3:] = 2
        logits[3] = -math.inf
        for batch in (batch_of(4, temperature=0.0), batch_of(4, temperature=torch.tensor([0.0, 0.0, 0.0, 1.0]))):
            assert sample(logits, batch).tolist() == [0, vocab - 1, 3, 0]


def test_unusual_rows() -> None:
    # A temperature so small that float32 would overflow is as good as greedy; a row of bans alone gives token 0.
    logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0], [-math.inf] * 3, [-math.inf, -5.0, -math.inf]])
    temperature = torch.tensor([1e-45, 1e-20, 1.0, 1.0])
    for options in ({}, {"top_p": 0.9}, {"top_k": 2, "top_p": 0.5, "min_p": 0.1}):
        batch = batch_of(4, temperature=temperature, seeds=torch.arange(4), **options)
        assert sample(logits, batch).tolist() == [1, 1, 0, 1]
        assert processed_logits(logits, batch)[:2].log_softmax(1)[:, 1].tolist() == [0.0, 0.0]
    assert sample(torch.empty(0, 7), batch_of(0)).shape == (0,)
    # A broken model gives some token, and not an endless loop.
    broken = torch.full((1, 100), math.nan)
    assert 0 <= int(sample(broken, batch_of(1, top_p=0.5))) < 100


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """Pearson's statistic in standard deviations above its expectation; cells that expect under 5 are merged."""
    expected = probabilities.double() * counts.sum()
    small = expected < 5
    cells = torch.cat([counts[~small].double(), counts[small].sum().double()[None]])
    wanted = torch.cat([expected[~small], expected[small].sum()[None]])
    cells, wanted = cells[wanted > 0], wanted[wanted > 0]
    freedom = len(cells) - 1
    return ((cells - wanted).square().div(wanted).sum().item() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("varied", ["seeds", "positions"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_k": 12}, {"top_p": 0.7}, {"min_p": 0.1}])
def test_frequencies_are_probabilities(varied: str, options: dict[str, float]) -> None:
    """Chi-square of 60000 draws over 80 tokens; inputs are fixed, so it never wavers."""
    draws, vocab = 60_000, 80
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(4)) * 1.5
    batch = batch_of(draws, **options, **{varied: torch.arange(draws)})
    tokens = sample(logits.expand(draws, vocab).contiguous(), batch)
    counts = torch.bincount(tokens, minlength=vocab)
    probabilities = processed_logits(logits, select(batch, slice(0, 1)))[0].softmax(0)
    assert counts[probabilities == 0].sum() == 0
    assert abs(chi_square(counts, probabilities)) < 4
    # Two draws in a row are independent: the same test on the table of pairs.
    pairs = torch.bincount(tokens[:-1] * vocab + tokens[1:], minlength=vocab * vocab)
    assert abs(chi_square(pairs, (probabilities[:, None] * probabilities).flatten())) < 4
    # And the test can fail.
    assert abs(chi_square(counts, (logits[0] * 1.05 + 0.01 * torch.arange(vocab)).softmax(0))) > 4


def test_is_a_custom_operator() -> None:
    batch = batch_of(3, top_p=0.9)
    arguments = (batch.temperature, batch.top_k, batch.top_p, batch.min_p, batch.seeds, batch.positions)
    flags = (batch.all_greedy, batch.any_top_k, batch.any_top_p, batch.any_min_p)
    torch.library.opcheck(
        torch.ops.s1engine.sample.default,
        (torch.randn(3, 50), *arguments, *flags),
        test_utils=("test_schema", "test_faketensor"),
    )
