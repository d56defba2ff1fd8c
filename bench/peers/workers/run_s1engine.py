"""s1engine through its public interface. options: further settings of the engine, such as `quantization`."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch

from s1engine import LLM, SamplingParams
from s1engine.bench.speed.floor import model_sizes

BLOCK_SIZE = 16


def load(
    model: str, threads: int, cases: list[list[int]], options: dict[str, Any]
) -> tuple[Callable[[list[list[int]], int], list[list[int]]], dict[str, str]]:
    torch.set_num_threads(threads)
    blocks = max(batch * (-(-(prompt + new) // BLOCK_SIZE) + 1) for batch, prompt, new in cases)
    llm = LLM(
        model,
        dtype="bfloat16",
        device="cpu",
        max_model_len=max(prompt + new for _, prompt, new in cases),
        max_num_seqs=max(batch for batch, _, _ in cases),
        block_size=BLOCK_SIZE,
        kv_cache_memory=blocks * BLOCK_SIZE * model_sizes(model).kv * torch.bfloat16.itemsize,
        enable_prefix_caching=False,
        **options,
    )

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]

    return generate, {"s1engine": version("s1engine"), "torch": torch.__version__}
