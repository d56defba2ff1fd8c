"""Fixtures that several test folders share: small random models, written once per session by transformers.

The tests run on the CPU, also where there is a GPU; with S1ENGINE_TEST_GPU=1, those in tests/triton run on it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

if os.environ.get("S1ENGINE_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when the first test asks for a GPU

_KINDS = {
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
}
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 2048,
    "initializer_range": 0.15,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": 2,
}

MakeModel = Callable[..., Path]


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """make_model(arch, dtype=torch.float32, seed=0, max_shard_size="5GB", **config) -> folder of a random checkpoint.

    arch is qwen2, qwen3 or llama; further arguments go to its config. Weights are drawn with a standard deviation of
    0.15, which keeps greedy continuations varied; norms and biases are drawn too, so that none of them is a no-op. The
    same arguments give the same folder: do not write to it.
    """
    made: dict[str, Path] = {}

    def make(
        arch: str,
        *,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        max_shard_size: str = "5GB",
        **config: Any,
    ) -> Path:
        key = json.dumps([arch, str(dtype), seed, max_shard_size, config], sort_keys=True)
        if key in made:
            return made[key]
        config_class, model_class = _KINDS[arch]
        settings = config_class(**{**_DEFAULTS, **config}, dtype=dtype)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            model = model_class(settings)
            for name, parameter in model.named_parameters():
                if name.endswith(".bias"):
                    parameter.normal_(0.0, 0.5)
                elif "norm" in name:
                    parameter.uniform_(0.5, 1.5)
        folder = tmp_path_factory.mktemp(arch)
        model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
        made[key] = folder
        return folder

    return make
