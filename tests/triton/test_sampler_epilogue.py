"""Edits before the draw, and what the drawn token does to its slot, against the CPU's functions for both."""

import math

import numpy as np
import pytest
import torch
from sampler_slots import Slots
from thinking_cases import draw_cases

from s1engine.kernels import sampler_scores_triton
from s1engine.kernels.logprobs import token_logprobs
from s1engine.kernels.slot_layout import Field, Result
from s1engine.thinking import resolve_extensions
from s1engine.thinking.layout import Flag, Phase, State
from s1engine.thinking.program import compile_program, initial_state
from s1engine.thinking.table_step import table_step

VOCAB = 300


@pytest.fixture(autouse=True)
def many_tiles(real_sizes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not real_sizes:
        monkeypatch.setattr(sampler_scores_triton, "TILE", 256)


def thinking_slots(count: int, rng: np.random.Generator, penalties: bool) -> tuple[Slots, torch.Tensor]:
    """Slots in the middle of random thinking cases, and logits with a peak at the next sample of each."""
    slots = Slots(count, VOCAB, penalties=penalties, max_len=60, seed=1)
    logits = torch.full((count, VOCAB), -1.0)
    cases = [case for case in draw_cases(int(rng.integers(1000)), 2 * count) if case.sampled]
    for slot, case in enumerate(cases[:count]):
        budget = case.budget
        slots.programs[slot] = compile_program(case.format, resolve_extensions(budget), budget.scope, budget.on_budget)
        start = initial_state(slots.programs[slot], case.format, budget, case.prompt)
        prompt = [int(token) for token in case.prompt] + [9] * 4
        steps = [(start, prompt, 0)]  # state, known tokens, flags of the step before
        states = start[None].copy()
        for x in case.sampled:
            out = table_step(slots.programs[slot : slot + 1], states, np.array([0]), np.array([x]))
            rewind, token, flags, _ = out[0].tolist()
            known = steps[-1][1]
            steps.append((states[0].copy(), known[: len(known) - rewind] + [token] * (token >= 0), flags))
        # Most steps are uneventful: take one that is not, where there is one.
        events = [i for i in range(len(case.sampled)) if steps[i + 1][2] & ~Flag.FORCED or steps[i][0][State.BAN]]
        choices = events if events and rng.random() < 0.6 else range(len(case.sampled))
        done = int(rng.choice(choices))
        slots.states[slot], known, _ = steps[done]
        slots.tokens[slot, : len(known)] = known
        room = int(rng.integers(1, 12))
        slots.prompt_lengths[slot] = len(prompt)
        slots.set(
            slot,
            length=len(known),
            limit=len(known) + room,
            has_machine=int(rng.random() < 0.85),
            reserve=int(rng.choice([0, 2, 5])),
            user_cap=int(rng.choice([-1, 3, 20])),
            temperature=0.0,
        )
        slots.set_stops(slot, rng.choice(8, int(rng.integers(0, 4)), replace=False).tolist())
        if penalties and rng.random() < 0.7:
            slots.set_penalties(slot, float(rng.choice([1.0, 1.3])), float(rng.choice([0.0, 0.4])), 0.25)
        logits[slot, case.sampled[done]] = 9.0
        logits[slot, 100 + slot % 50] = 5.0
    return slots, logits


def check(slots: Slots, logits: torch.Tensor, rows: list[int], valid: np.ndarray | None = None) -> np.ndarray:
    """Sample, and compare results and all arrays with what the CPU makes of the sampled token."""
    expected, start = slots, slots.arrays()
    sampled, banned = [], []
    for row, slot in enumerate(rows):
        x, was_banned = expected.edited(max(slot, 0), logits[row], valid)
        choices = expected.acceptable(max(slot, 0), x)
        assert len(choices) == 1, "the case is in doubt: choose another seed"
        sampled.append(choices.pop())
        banned.append(was_banned)
    wanted = expected.advanced(rows, sampled, banned)
    after = expected.arrays()
    vars(slots).update({name: array.copy() for name, array in start.items()})
    results = slots.sample(logits, rows, valid)
    assert np.array_equal(results, wanted), np.flatnonzero((results != wanted).any(1))
    for name, array in slots.arrays().items():
        assert np.array_equal(array, after[name]), name
    return results


@pytest.mark.parametrize("penalties", [False, True])
def test_the_drawn_token_enters_its_slot(penalties: bool, device: torch.device, real_sizes: bool) -> None:
    count = 2000 if real_sizes else 50
    rng = np.random.default_rng(2)
    slots, logits = thinking_slots(count, rng, penalties)
    for slot in rng.choice(count, count // 10, replace=False).tolist():
        slots.set(slot, active=0)
    rows = rng.permutation(count).tolist()
    for row in range(0, count, 7):
        rows[row] = -1
    caps = slots.states[:, State.MAX_TOKENS].copy()
    places = torch.tensor([max(slot, 0) for slot in rows])
    results = check(slots, logits[places].contiguous().to(device), rows)
    flags = results[:, Result.FLAGS]
    for flag in Flag:
        assert (flags & flag).any(), f"no case of {flag.name}"
    assert {0, 1} <= set(results[:, Result.ACTIVE]) and {0, 1} == set(results[:, Result.BANNED])
    assert (results[:, Result.REWIND] > 0).any() and (results[:, Result.HELD] > 0).any()
    assert (results[:, Result.PHASE] == Phase.ANSWER).any() and (slots.states[:, State.MAX_TOKENS] != caps).any()


def test_edits_come_before_the_draw(device: torch.device, real_sizes: bool) -> None:
    count = 400 if real_sizes else 24
    rng = np.random.default_rng(3)
    slots = Slots(count, VOCAB, penalties=True)
    for slot in range(count):
        slots.set(
            slot,
            temperature=float(rng.choice([0.0, 0.7, 1.0])),
            top_k=int(rng.choice([0, 5])),
            top_p=float(rng.choice([1.0, 0.6])),
            min_p=float(rng.choice([0.0, 0.1])),
            min_length=int(rng.choice([0, 8, 9])),
        )
        slots.set_stops(slot, rng.choice(20, int(rng.integers(0, 17)), replace=False).tolist())
        if rng.random() < 0.6:
            ids = rng.choice(20, int(rng.integers(1, 21)), replace=False).tolist()
            values = rng.normal(0, 4, len(ids)).astype(np.float32)
            values[rng.random(len(ids)) < 0.2] = -math.inf
            slots.set_biases(slot, dict(zip(ids, values.tolist(), strict=True)))
        if rng.random() < 0.7:
            slots.tokens[slot] %= 20
            slots.set_penalties(slot, float(rng.choice([1.0, 0.8, 1.5])), float(rng.normal()), float(rng.normal()))
    valid = np.ones(VOCAB, bool)
    valid[rng.choice(30, 8, replace=False)] = False
    valid[VOCAB - 20 :] = False
    logits = torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(3)) * 2
    logits[:, :30] += 4
    logits[:, VOCAB - 10 :] += 20
    results = check(slots, logits.to(device), list(range(count)), valid)
    assert valid[results[:, Result.TOKEN]].all()
    assert {0, 1} == set(results[:, Result.BANNED])


def test_when_all_is_banned_the_first_token_is_taken(device: torch.device) -> None:
    slots = Slots(3, 16)
    slots.set(0, min_length=100)
    slots.set_stops(0, list(range(16)))
    slots.set_biases(1, dict.fromkeys(range(16), -math.inf))
    slots.set(1, top_p=0.5)
    slots.set(2, top_k=3)
    results = slots.sample(torch.randn(3, 16, device=device), [0, 1, 2], valid=np.array([False] * 16))
    assert results[:, Result.TOKEN].tolist() == [0, 0, 0] and results[:, Result.BANNED].tolist() == [1, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logprob_and_rank_are_those_before_edits(dtype: torch.dtype, device: torch.device, real_sizes: bool) -> None:
    count = 300 if real_sizes else 20
    rng = np.random.default_rng(7)
    slots, peaks = thinking_slots(count, rng, penalties=False)
    for slot in range(count):
        slots.set(slot, wants_logprob=int(slot % 4 > 0), temperature=float(rng.choice([0.0, 2.0])), top_k=50)
        slots.set_biases(slot, {int(rng.integers(VOCAB)): 50.0 if slot % 3 == 0 else 1.0})
    slots.set(1, active=0)
    valid = np.ones(VOCAB, bool)
    valid[VOCAB - 20 :] = False
    logits = (peaks + torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(4))).to(dtype)
    rows = list(range(count))
    results = slots.sample(logits.to(device), rows, valid, with_logprobs=True)
    raw = logits.float().masked_fill(~torch.from_numpy(valid), -math.inf)
    tokens = results[:, Result.TOKEN]
    chosen, _, _, _ = token_logprobs(raw, torch.from_numpy(np.maximum(tokens, 0)).long(), 0)
    logprobs, ranks = np.ascontiguousarray(results[:, Result.LOGPROB]).view(np.float32), results[:, Result.RANK]
    filled = 0
    for row in rows:
        if row % 4 == 0 or tokens[row] < 0 or results[row, Result.REWIND] > 0:
            assert logprobs[row] == 0 and ranks[row] == 0
        else:
            assert logprobs[row] == pytest.approx(float(chosen[row]), abs=1e-5)
            assert ranks[row] == 1 + int((raw[row] > raw[row, tokens[row]]).sum())
            filled += 1
    forced = (results[:, Result.FLAGS] & Flag.FORCED) != 0
    rewound = (results[:, Result.REWIND] > 0) & (slots.fields[:, Field.WANTS_LOGPROB] > 0)
    assert filled > count // 3 and rewound.any() and (ranks > 10).any()
    assert (ranks[forced] > 1).any(), "no forced token that is not the most likely one"


def test_several_steps_in_a_row(device: torch.device) -> None:
    """What one step leaves is what the next begins with."""
    rng = np.random.default_rng(6)
    slots, _ = thinking_slots(6, rng, penalties=True)
    for slot in range(6):
        slots.set(slot, limit=60, temperature=0.7)
        slots.set_stops(slot, [])
    for step in range(3):
        logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(step))
        logits[:, :8] += 8
        check(slots, logits.to(device), list(range(6)))
    assert (slots.states[:, State.PHASE] != Phase.BEFORE).any()
