"""Penalties against a float64 loop and against transformers."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from s1engine.kernels.penalties import apply_penalties


def penalised_reference(
    logits: list[float], prompt: list[int], output: list[int], repetition: float, presence: float, frequency: float
) -> list[float]:
    result = list(logits)
    for token in set(prompt) | set(output):
        result[token] = result[token] / repetition if result[token] > 0 else result[token] * repetition
    for token in set(output):
        result[token] -= presence + frequency * output.count(token)
    return result


@pytest.mark.parametrize("case", range(20))
def test_agrees_with_a_loop(case: int) -> None:
    rng = torch.Generator().manual_seed(case)
    rows, vocab = 5, 40
    logits = torch.randn(rows, vocab, generator=rng) * 5
    logits[torch.rand(rows, vocab, generator=rng) < 0.1] = -math.inf
    logits[:, 0] = 0.0
    prompts = [torch.randint(vocab, (10 * (row % 3),), generator=rng).tolist() for row in range(rows)]
    outputs = [torch.randint(vocab, (15 * (row % 2),), generator=rng).tolist() for row in range(rows)]
    repetition = torch.rand(rows, generator=rng) * 1.5 + 0.5
    presence, frequency = (torch.rand(rows, generator=rng) * 4 - 2 for _ in range(2))
    repetition[0], presence[1], frequency[2] = 1.0, 0.0, 0.0
    expected = []
    for row, prompt, output in zip(range(rows), prompts, outputs, strict=True):
        parameters = (float(parameter[row]) for parameter in (repetition, presence, frequency))
        expected.append(penalised_reference(logits[row].tolist(), prompt, output, *parameters))
    mask = torch.zeros(rows, vocab, dtype=torch.bool)
    counts = torch.zeros(rows, vocab, dtype=torch.int32)
    for row in range(rows):
        mask[row, prompts[row]] = True
        for token in outputs[row]:
            counts[row, token] += 1
    apply_penalties(logits, mask, counts, repetition, presence, frequency)
    assert torch.allclose(logits.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_repetition_is_that_of_transformers() -> None:
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 100, generator=rng) * 3
    ids = torch.randint(100, (4, 30), generator=rng)
    expected = RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone())
    mask = torch.zeros(4, 100, dtype=torch.bool).scatter_(1, ids[:, :20], True)
    counts = torch.zeros(4, 100, dtype=torch.int32).scatter_add_(1, ids[:, 20:], torch.ones(4, 10, dtype=torch.int32))
    apply_penalties(logits, mask, counts, torch.full((4,), 1.3), torch.zeros(4), torch.zeros(4))
    assert torch.allclose(logits, expected)


def test_off_changes_no_bit() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    before = logits.clone()
    everything = torch.ones(3, 50, dtype=torch.bool)
    apply_penalties(logits, everything, everything.int(), torch.ones(3), torch.zeros(3), torch.zeros(3))
    assert torch.equal(logits, before)
