"""The C++ sampler against the reference, token for token, over parameters, sizes, ties and borders.

Equal tokens for equal seeds make its distribution the reference's. The PyTorch implementation that serves without the
library has other limits at the ends of float32 (temperatures of 1e30, logits of 1e38): tests/kernels/ is for both.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conditions import needs_csrc
from sampling import batch_of, select
from torch import Tensor

from s1engine.kernels.philox import gumbel_noise
from s1engine.kernels.sampler import SamplingBatch, sample
from s1engine.kernels.sampler_reference import reference_sample

pytestmark = needs_csrc

KINDS = ["plain", "rounded", "bfloat16", "bans", "peaked", "flat", "equal", "far from zero", "wide"]
MIN_TEMPERATURE = 2.0**-60


def make_logits(kind: str, rows: int, vocab: int, rng: torch.Generator) -> Tensor:
    normal = torch.randn(rows, vocab, generator=rng)
    if kind == "rounded":
        return (normal * 2).round()
    if kind == "bfloat16":
        return (normal * 8).bfloat16().float()
    if kind == "bans":
        banned = torch.rand(rows, vocab, generator=rng) < 0.7
        banned[0] = True
        return (normal * 4).masked_fill(banned, -math.inf)
    if kind == "peaked":
        peaks = torch.randint(vocab, (rows, min(vocab, 30)), generator=rng)
        return (normal * 3 - 20).scatter_(1, peaks, 1.0) + 0.1 * normal
    if kind == "flat":
        return normal * 0.01
    if kind == "equal":
        return torch.full((rows, vocab), -1.5)
    if kind == "far from zero":  # so far that scores are rounded to multiples of 1/16, or of 32
        return normal + draw([1e6, -1e6, 4e8, -4e8], rows, rng)[:, None]
    if kind == "wide":
        return normal * draw([1e-30, 1e-18, 1e4, 1e20, 1e37], rows, rng)[:, None]
    return normal * 4


def draw(choices: list[float], rows: int, rng: torch.Generator) -> Tensor:
    return torch.tensor(choices)[torch.randint(len(choices), (rows,), generator=rng)]


def make_batch(rows: int, vocab: int, rng: torch.Generator) -> SamplingBatch:
    return batch_of(
        rows,
        temperature=draw([0.0, 1e-20, 1e-6, 0.01, 0.2, 0.6, 0.6, 1.0, 1.0, 1.0, 1.7, 30.0, 1e30], rows, rng),
        top_k=draw([0, 0, 0, 1, 2, 5, 50, 64, 1000, vocab - 1, vocab, 2 * vocab], rows, rng).long(),
        top_p=draw([1.0, 1.0, 0.0, 1e-30, 0.01, 0.3, 0.5, 0.8, 0.95, 0.999, 1 - 2**-24], rows, rng),
        min_p=draw([0.0, 0.0, 0.0, 1e-40, 1e-5, 0.01, 0.1, 0.5, 1.0], rows, rng),
        seeds=torch.randint(-(2**63), 2**63 - 1, (rows,), generator=rng),
        positions=torch.randint(0, 2**32, (rows,), generator=rng),
    )


def expected_token(logits: Tensor, batch: SamplingBatch, row: int) -> int:
    temperature = batch.temperature[row].item()
    return reference_sample(
        logits[row],
        max(temperature, MIN_TEMPERATURE) if temperature > 0 else 0.0,
        int(batch.top_k[row]),
        batch.top_p[row].item(),
        batch.min_p[row].item(),
        int(batch.seeds[row]),
        int(batch.positions[row]),
    )


def check(logits: Tensor, batch: SamplingBatch) -> Tensor:
    tokens = sample(logits, batch)
    expected = [expected_token(logits, batch, row) for row in range(len(logits))]
    wrong = [
        (row, got, wanted)
        for row, (got, wanted) in enumerate(zip(tokens.tolist(), expected, strict=True))
        if got != wanted
    ]
    assert not wrong, f"(row, token, expected): {wrong}; {select(batch, torch.tensor([row for row, *_ in wrong]))}"
    return tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", [1, 3, 63, 64, 65, 297, 4097])
def test_the_tokens_of_the_reference(vocab: int, kind: str) -> None:
    rng = torch.Generator().manual_seed(vocab)
    check(make_logits(kind, 48, vocab, rng), make_batch(48, vocab, rng))


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_vocabulary(kind: str) -> None:
    rng = torch.Generator().manual_seed(len(kind))
    check(make_logits(kind, 6, 151_936, rng), make_batch(6, 151_936, rng))


@pytest.mark.parametrize("offset", [0.0, 30.0, -3000.0, 1e5, 1e7, 5e8, 3e9])
def test_scores_that_differ_by_little_or_nothing(offset: float) -> None:
    """Noise alone decides, in scores that float32 rounds the coarser the farther the logits are from zero."""
    rows, vocab = 8000, 192
    logits = 0.1 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(7)) + offset
    for temperature in (1.0, 0.3):
        batch = batch_of(rows, temperature=temperature, seeds=torch.arange(rows))
        scores = logits / temperature + gumbel_noise(batch.seeds, batch.positions, vocab)
        assert torch.equal(sample(logits, batch), scores.argmax(1))


def test_every_bit_of_the_noise() -> None:
    """Where logits cancel the noise all scores are equal, to 0, and the first token wins. One bit, and another does."""
    rows, vocab = 3000, 192
    seeds, positions = torch.arange(rows) * 2**40 + 5, torch.arange(rows) * 2**17
    logits = -gumbel_noise(seeds, positions, vocab)
    assert not sample(logits, batch_of(rows, seeds=seeds, positions=positions)).any()


def test_the_largest_uniform_number_is_below_1() -> None:
    """That of token 0: its noise is the least there is, -2.81, and not -inf."""
    batch = batch_of(1, seeds=16_390_493)
    least, other = gumbel_noise(batch.seeds, batch.positions, 2)[0].tolist()
    assert least == pytest.approx(-math.log(24 * math.log(2)))
    assert check(torch.tensor([[other + 2.9, 0.0]]), batch).item() == 0


def test_limits_in_the_middle_of_what_float32_can_tell() -> None:
    """top_p is the float32 number next to a share of the mass, min_p that next to a token's: float64 decides."""
    rng, rows, vocab = torch.Generator().manual_seed(8), 150, 9
    for offset in (0.0, 30_000.0):
        logits = torch.randn(rows, vocab, generator=rng) + offset
        scaled = (logits / 0.7).double()
        mass = (scaled - scaled.amax(1, keepdim=True)).exp()
        share = mass.sort(dim=1, descending=True).values.cumsum(1) / mass.sum(1, keepdim=True)
        index = torch.randint(vocab - 1, (rows, 1), generator=rng)
        top_p, min_p = (values.gather(1, index).squeeze(1).float() for values in (share, mass))
        for factor in (1.0, 1 + 1e-7, 1 - 1e-7, 1 + 7e-5, 1 - 7e-5):
            for options in ({"top_p": top_p * factor}, {"min_p": min_p * factor}):
                check(logits, batch_of(rows, temperature=0.7, seeds=torch.arange(rows), **options))


def test_the_limit_of_mass_that_is_out_of_reach_of_the_noise() -> None:
    """The many tokens that are hardly ever drawn are a share of the mass too."""
    rows, vocab = 2000, 5000
    logits = torch.full((1, vocab), -14.0)
    logits[0, :2] = torch.tensor([0.0, -0.01])
    mass = logits[0].double().exp()
    top_p = (1 / mass[:2].sum() + 1 / mass.sum()).item() / 2  # above the first token's share, of all tokens alone
    batch = batch_of(rows, top_p=top_p, seeds=torch.arange(rows))
    assert sample(logits.repeat(rows, 1), batch).unique().tolist() == [0, 1]


def test_rows_alone_and_in_company() -> None:
    rng, rows, vocab = torch.Generator().manual_seed(9), 60, 4097
    logits = torch.cat([make_logits(kind, rows // 5, vocab, rng) for kind in KINDS[:5]])
    batch = make_batch(rows, vocab, rng)
    together = sample(logits, batch)
    for row in range(rows):
        one = slice(row, row + 1)
        assert torch.equal(sample(logits[one], select(batch, one)), together[one])
    order = torch.randperm(rows, generator=rng)
    assert torch.equal(sample(logits[order], select(batch, order)), together[order])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(sample(logits, batch), together)
    finally:
        torch.set_num_threads(threads)


def test_logits_at_any_address() -> None:
    rng, rows, vocab = torch.Generator().manual_seed(10), 20, 131
    logits, batch = make_logits("plain", rows, vocab, rng), make_batch(rows, vocab, rng)
    expected = check(logits, batch)
    for offset in (1, 2, 3):
        storage = torch.full((rows * vocab + 2 * offset,), 1000.0)  # what lies beside them is no candidate
        moved = storage[offset:-offset].view(rows, vocab).copy_(logits)
        assert torch.equal(sample(moved, batch), expected)


def test_a_row_without_a_distribution() -> None:
    """Nothing but bans gives token 0, an overflow the first maximum, logits that are NaN some token."""
    options = {"top_k": 3, "top_p": 0.5, "min_p": 0.1}
    for vocab in (1, 64, 100, 1000):
        for temperature in (0.0, 1.0):
            assert (
                sample(torch.full((1, vocab), -math.inf), batch_of(1, temperature=temperature, **options)).item() == 0
            )
            assert (
                0 <= sample(torch.full((1, vocab), math.nan), batch_of(1, temperature=temperature, **options)) < vocab
            )
    logits = torch.tensor([[1e38, 3e38, 3e38, 2e38]])
    assert sample(logits, batch_of(1, temperature=0.1, **options)).item() == 1
    assert sample(torch.empty(0, 7), batch_of(0)).shape == (0,)


PROGRAM = """
import sys, torch
from s1engine.kernels import native
from s1engine.kernels.sampler import sample
cases = torch.load(sys.argv[1], weights_only=False)
torch.save((native.ISA, [sample(logits, batch) for logits, batch in cases]), sys.argv[2])
"""


def test_all_instruction_sets_give_the_same_tokens(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(11)
    cases = []
    for vocab in (3, 65, 297, 4097, 40_000):
        cases += [(make_logits(kind, 32, vocab, rng), make_batch(32, vocab, rng)) for kind in KINDS]
    torch.save(cases, tmp_path / "cases")
    expected = [sample(logits, batch) for logits, batch in cases]
    for name in ("baseline", "avx2", "avx512"):
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "cases"), str(tmp_path / "tokens")]
        subprocess.run(command, env={**os.environ, "S1ENGINE_CPU_ISA": name}, check=True)
        served, tokens = torch.load(tmp_path / "tokens", weights_only=False)
        assert served == name or name != "baseline"  # this processor may lack the others: its best one served then
        assert all(map(torch.equal, tokens, expected)), served
