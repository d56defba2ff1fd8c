"""Logits equal those of transformers in float32, whole prompts and in chunks through the paged cache."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from s1engine.models import load_model

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 3/1 heads of 40": ("qwen2", {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 40}),
    "qwen2 14/2 heads of 64": ("qwen2", {"num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 64}),
    "qwen2 yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen2 full vocabulary": ("qwen2", {"vocab_size": 151936, "hidden_size": 32, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3 biased 3/1 heads of 40": (
        "qwen3",
        {"attention_bias": True, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 40},
    ),
    "qwen3 yarn, no groups": ("qwen3", {"rope_parameters": YARN, "num_key_value_heads": 4}),
    "llama": ("llama", {}),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama linear rope": ("llama", {"rope_parameters": LINEAR}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
}


@pytest.mark.parametrize(
    ("block_size", "options"),
    [(8, {}), (16, {}), (16, {"packed": False}), (8, {"row_invariant": True}), (16, {"row_invariant": True})],
    ids=str,
)
@pytest.mark.parametrize("case", CASES)
def test_float32_logits_equal_transformers(case, block_size, options, make_model, paged_runner):
    arch, config = CASES[case]
    folder = make_model(arch, **config)
    generator = torch.Generator().manual_seed(1)
    vocab_size = config.get("vocab_size", 1000)
    prompts = {
        name: torch.randint(vocab_size, (length,), generator=generator).tolist()
        for name, length in (("short", 5), ("even", 32), ("odd", 77), ("long", 150))
    }
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = {name: reference(torch.tensor([tokens])).logits[0] for name, tokens in prompts.items()}
    runner = paged_runner(load_model(str(folder), **options), block_size=block_size)

    whole = runner.step({f"whole {name}": tokens for name, tokens in prompts.items()})
    for name in prompts:
        assert_equal_logits(runner.logits(whole[f"whole {name}"]), expected[name])

    # The same prompts in random chunks, of one token often: mixed batches of decoding rows and chunks.
    dice = random.Random(2)
    fed = dict.fromkeys(prompts, 0)
    while any(fed[name] < len(prompts[name]) for name in prompts):
        chunks = {}
        for name in prompts:
            tokens = prompts[name][fed[name] : fed[name] + dice.choice((1, 1, 2, 7, 16, 40))]
            if tokens:
                chunks[name] = tokens
        for name, hidden in runner.step(chunks).items():
            end = fed[name] + len(chunks[name])
            assert_equal_logits(runner.logits(hidden), expected[name][fed[name] : end])
            fed[name] = end


def assert_equal_logits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Within the rounding of float32 sums of some hundred terms; the logits have a standard deviation of about 1.5."""
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0, atol=5e-5)


def test_decoding_continues_like_generate(make_model, paged_runner):
    """A hundred greedy tokens, which are varied enough to tell a wrong model from a right one."""
    folder = make_model("qwen3", tie_word_embeddings=True)
    prompt = list(range(3, 20))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = reference.generate(
        torch.tensor([prompt]), max_new_tokens=100, min_new_tokens=100, do_sample=False, eos_token_id=None
    )[0, len(prompt) :].tolist()
    assert len(set(expected)) > 20
    runner = paged_runner(load_model(str(folder)))
    tokens, actual = prompt, []
    for _ in expected:
        hidden = runner.step({"a": tokens})["a"]
        tokens = [int(runner.logits(hidden[-1:]).argmax())]
        actual += tokens
    assert actual == expected
