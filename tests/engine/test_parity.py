"""Greedy tokens equal transformers' `generate` in float32, token for token."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from s1engine import LLM, SamplingParams

NEW_TOKENS = 64
LENGTHS = (1, 3, 17, 33, 8, 70, 2, 40)
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen2-14/2": {"num_attention_heads": 14, "num_key_value_heads": 2, "hidden_size": 112, "head_dim": 8},
    "qwen2-3/1-d40": {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 120, "head_dim": 40},
    "qwen2-tied-d64": {"hidden_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64}
    | {"vocab_size": 151936, "tie_word_embeddings": True},
    "qwen3-3/1-d40": {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 40},
    "qwen3-14/2-d64": {"num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 151936},
    "llama-3/1-d64": {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 64},
    "llama-14/2-d40-rope": {
        "hidden_size": 112,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "head_dim": 40,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
}
# (block size, chunk budget, prefix cache, KV blocks: None for plenty)
ENGINES = [
    (8, 16, True, None),
    (16, 8192, True, None),
    (16, 16, False, None),
    (8, 8192, False, None),
    (8, 64, True, 34),
]


@cache
def reference(folder: Path, vocab: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts of mixed lengths and transformers' continuation of each, one at a time: no padding that could matter."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    shared = torch.randint(vocab, (33,), generator=generator).tolist()
    prompts = [torch.randint(vocab, (n,), generator=generator).tolist() for n in LENGTHS]
    prompts += [shared + prompts[1], shared + prompts[2]]  # something for the prefix cache to find
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )
        outputs.append(whole[0, len(prompt) :].tolist())
    return prompts, outputs


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_tokens(name: str, make_model: Callable[..., Path]) -> None:
    config = ARCHITECTURES[name]
    folder = make_model(name.split("-")[0], eos_token_id=None, **config)
    prompts, expected = reference(folder, config.get("vocab_size", 1000))
    assert len({tuple(e) for e in expected}) > 5, "the model says the same whatever it is asked"
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    for block_size, chunk, prefix_cache, blocks in ENGINES:
        llm = LLM(
            str(folder),
            block_size=block_size,
            max_num_batched_tokens=chunk,
            max_num_seqs=min(chunk, 16),
            enable_prefix_caching=prefix_cache,
            kv_cache_memory=None if blocks is None else blocks * block_bytes(folder, block_size),
        )
        for _ in range(2 if prefix_cache else 1):  # the second time, prompts are found in the cache
            outputs = llm.generate(prompts, params, use_tqdm=False)
            got = [o.outputs[0].token_ids for o in outputs]
            assert got == expected, (block_size, chunk, prefix_cache, blocks)
        if prefix_cache and blocks is None:
            assert sum(o.num_cached_tokens for o in outputs) > 100
        if blocks is not None:
            assert llm.engine.scheduler.num_preemptions > 0
        assert llm.engine.kv.num_free_blocks == llm.engine.kv.num_blocks


def block_bytes(folder: Path, block_size: int) -> int:
    config = AutoModelForCausalLM.from_pretrained(folder).config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * head_dim * block_size
