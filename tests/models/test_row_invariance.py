"""With row_invariant=True a row's bits depend on its own sequence only: not on company, chunks, blocks or threads.

The same tests fail without it (see the last one), so they can see a difference.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s1engine.models import load_model

# Sizes chosen to be awkward: groups of 3 and 7 heads, dimensions that are no multiple of a vector's width.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 40, "intermediate_size": 164}),
    "qwen3": ("qwen3", {"num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 64, "hidden_size": 112}),
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True, "intermediate_size": 332}),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def prompts(count: int) -> dict[str, list[int]]:
    generator = torch.Generator().manual_seed(3)
    lengths = [1, 300, 17, 128, 129, 5, *range(20, 140, 2)][:count]
    return {f"s{i}": torch.randint(1000, (n,), generator=generator).tolist() for i, n in enumerate(lengths)}


@pytest.fixture(
    scope="module",
    params=[
        *((case, dtype, "packed") for case in CASES for dtype in DTYPES),
        *(("llama", dtype, "") for dtype in DTYPES),
    ],
    ids=" ".join,
)
def model_and_alone(request, make_model, paged_runner):
    """A model and the hidden states of every prompt when it runs by itself in one chunk."""
    case, dtype, packed = request.param
    arch, config = CASES[case]
    model = load_model(str(make_model(arch, **config)), dtype=dtype, row_invariant=True, packed=bool(packed))
    alone = {}
    for name, tokens in prompts(64).items():
        alone[name] = paged_runner(model).step({name: tokens})[name]
    return model, alone


def run(runner: Any, sequences: dict[str, list[int]], budget: int, dice: random.Random) -> dict[str, torch.Tensor]:
    """Feed all sequences in random order and random chunks of together at most `budget` tokens a step."""
    fed = dict.fromkeys(sequences, 0)
    collected: dict[str, list[torch.Tensor]] = {name: [] for name in sequences}
    while waiting := [name for name in sequences if fed[name] < len(sequences[name])]:
        dice.shuffle(waiting)
        chunks: dict[str, list[int]] = {}
        left = budget
        for name in waiting:
            limit = min(left, dice.choice((1, 1, 3, 16, 61, 8192)))
            tokens = sequences[name][fed[name] : fed[name] + limit]
            if tokens:
                chunks[name] = tokens
                left -= len(tokens)
        for name, hidden in runner.step(chunks).items():
            collected[name].append(hidden)
            fed[name] += len(chunks[name])
    return {name: torch.cat(parts) for name, parts in collected.items()}


@settings(max_examples=8, deadline=None)
@given(count=st.integers(1, 12), budget=st.sampled_from([16, 50, 8192]), seed=st.integers(0, 2**16))
def test_any_batch_gives_the_same_bits(model_and_alone, paged_runner, count, budget, seed):
    model, alone = model_and_alone
    dice = random.Random(seed)
    chosen = dict(dice.sample(list(prompts(12).items()), count))
    together = run(paged_runner(model, num_blocks=256, seed=seed), chosen, budget, dice)
    for name, hidden in together.items():
        assert torch.equal(hidden, alone[name]), name


def test_among_sixty_three_others(model_and_alone, paged_runner):
    model, alone = model_and_alone
    runner = paged_runner(model, num_blocks=640)
    hidden = runner.step({name: tokens[:-1] for name, tokens in prompts(64).items() if len(tokens) > 1})
    last = runner.step({name: tokens[-1:] for name, tokens in prompts(64).items()})
    logits = runner.logits(torch.cat(list(last.values())))
    for row, name in enumerate(last):
        assert torch.equal(torch.cat((hidden[name], last[name])) if name in hidden else last[name], alone[name])
        assert torch.equal(logits[row], runner.logits(alone[name][-1:])[0])


def test_the_fast_path_is_not_invariant(make_model, paged_runner):
    """What the promise costs effort for: without it the same comparison finds differences."""
    arch, config = CASES["qwen3"]
    model = load_model(str(make_model(arch, **config)), packed=False)
    sequences = prompts(12)
    together = paged_runner(model, num_blocks=256).step(sequences)
    differing = [
        name
        for name, tokens in sequences.items()
        if not torch.equal(together[name], paged_runner(model).step({name: tokens})[name])
    ]
    assert differing
