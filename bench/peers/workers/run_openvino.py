"""OpenVINO GenAI's continuous batching.

Settings: the threads, bfloat16 arithmetic, no prefix cache, a KV cache of the cases' size, and a scheduler that takes a
case's prompts in one step as the others do (its default is 256 tokens a step). options: `kv_cache`, the precision of
the KV cache; the default, u8, where it is absent. Activations are quantised by its own default where weights are int8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import openvino
import openvino_genai

BLOCK_TOKENS = 32  # of a KV block on a CPU


def load(
    model: str, threads: int, cases: list[list[int]], options: dict[str, Any]
) -> tuple[Callable[[list[list[int]], int], list[list[int]]], dict[str, str]]:
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.num_kv_blocks = max(batch * (-(-(prompt + new) // BLOCK_TOKENS) + 1) for batch, prompt, new in cases)
    scheduler.max_num_seqs = max(batch for batch, _, _ in cases)
    scheduler.max_num_batched_tokens = max(batch * prompt for batch, prompt, _ in cases)
    scheduler.enable_prefix_caching = False
    properties = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "bf16"}
    if "kv_cache" in options:
        properties["KV_CACHE_PRECISION"] = options["kv_cache"]
    pipeline = openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = new_tokens
        config.ignore_eos = True
        config.set_eos_token_id(0)  # it refuses a model that names none
        ids = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        results = pipeline.generate(ids, [config] * len(ids))
        return [list(result.m_generation_ids[0]) for result in results]

    return generate, {"openvino-genai": openvino_genai.__version__, "openvino": openvino.__version__}
