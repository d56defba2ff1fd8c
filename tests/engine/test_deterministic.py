"""deterministic=True: the same request gives the same tokens and logprobs, bit for bit, whatever is around it."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from s1engine import LLM, SamplingParams, ThinkingBudget


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_alone_or_in_company(arch: str, dtype: str, model_folder: Callable[..., Path]) -> None:
    rng = random.Random(1)
    # Bits depend on company only where sums are long: a hidden size of several hundred, as a small real model has.
    folder = str(model_folder(arch, hidden_size=384, intermediate_size=1056, num_attention_heads=6, head_dim=64))
    prompts = [[rng.randrange(400) for _ in range(n)] for n in (1, 9, 33, 64, 150, 20)]
    params = [
        SamplingParams(
            temperature=rng.choice([0.0, 1.0]),
            top_p=rng.choice([1.0, 0.9]),
            seed=i,
            max_tokens=24,
            ignore_eos=True,
            logprobs=0,
            thinking=ThinkingBudget(max_tokens=6, extensions=[[5]], ignore_end=1, format="s1") if i % 2 else None,
        )
        for i in range(len(prompts))
    ]
    others = [[rng.randrange(400) for _ in range(rng.randrange(1, 60))] for _ in range(64)]
    noise = [SamplingParams(temperature=1.0, seed=i, max_tokens=rng.randrange(1, 40)) for i in range(64)]
    plain: dict[str, Any] = {"dtype": dtype, "deterministic": True, "max_num_seqs": 128, "kv_cache_memory": 2**26}

    alone = LLM(folder, **plain)
    expected = [bits(alone.generate([p], [s], use_tqdm=False)[0]) for p, s in zip(prompts, params, strict=True)]
    for settings in (
        {},
        {"max_num_batched_tokens": 16, "max_num_seqs": 16},
        {"max_num_batched_tokens": 70, "max_num_seqs": 70, "block_size": 8},
        {"block_size": 32, "enable_prefix_caching": False},
    ):
        llm = LLM(folder, **plain | settings)
        mixed = others[:32] + prompts + others[32:]
        outputs = llm.generate(mixed, noise[:32] + params + noise[32:], use_tqdm=False)
        got = [bits(o) for o in outputs[32 : 32 + len(prompts)]]
        assert got == expected, settings
    again = [bits(o) for o in alone.generate(prompts, params, use_tqdm=False)]  # with prompts in the prefix cache
    assert again == expected


def bits(output: Any) -> tuple[list[int], list[float]]:
    completion = output.outputs[0]
    return completion.token_ids, [e[t].logprob for e, t in zip(completion.logprobs, completion.token_ids, strict=True)]
