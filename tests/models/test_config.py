"""Configurations are mapped field by field, and what is not supported is named."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import torch

from s1engine.models.config import read_config

QWEN2: dict[str, Any] = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "eos_token_id": 151643,
}
QWEN3 = {**QWEN2, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 128}
LLAMA = {**QWEN2, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def write(folder: Path, config: dict[str, Any], **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_qwen2(tmp_path):
    config = read_config(write(tmp_path, QWEN2))
    assert config.architecture == "Qwen2ForCausalLM"
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (151936, 896, 4864)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (24, 14, 2, 64)
    assert (config.max_position_embeddings, config.rms_norm_eps, config.rope.theta) == (32768, 1e-6, 1e6)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm) == (True, False, False, False)
    assert config.tie_word_embeddings and config.dtype == torch.bfloat16 and config.eos_token_ids == (151643,)
    with pytest.raises(FrozenInstanceError):
        config.vocab_size = 1


@pytest.mark.parametrize("bias", [False, True])
def test_qwen3(bias, tmp_path):
    config = read_config(write(tmp_path, QWEN3, attention_bias=bias))
    assert (config.head_dim, config.qk_norm) == (128, True)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (bias, bias, False)


@pytest.mark.parametrize("bias", [False, True])
def test_llama(bias, tmp_path):
    config = read_config(write(tmp_path, LLAMA, attention_bias=bias, mlp_bias=bias, num_key_value_heads=None))
    assert (config.head_dim, config.num_kv_heads, config.qk_norm) == (64, 14, False)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (bias, bias, bias)


def test_architecture_from_the_model_type(tmp_path):
    assert read_config(write(tmp_path, LLAMA, architectures=None)).architecture == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("generation", "own", "expected"),
    [
        (None, 7, (7,)),
        (None, [7, 8], (7, 8)),
        (None, None, ()),
        ({"eos_token_id": [3, 4]}, 7, (3, 4)),
        ({"eos_token_id": 3}, 7, (3,)),
        ({"temperature": 0.6}, 7, (7,)),
    ],
)
def test_end_tokens(generation, own, expected, tmp_path):
    write(tmp_path, QWEN2, eos_token_id=own)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert read_config(tmp_path).eos_token_ids == expected


@pytest.mark.parametrize(
    ("stored", "wanted", "expected"),
    [
        ("bfloat16", "auto", torch.bfloat16),
        ("float32", "auto", torch.float32),
        ("float16", "auto", torch.float32),
        (None, "auto", torch.float32),
        ("float16", "bfloat16", torch.bfloat16),
        ("bfloat16", "float32", torch.float32),
    ],
)
def test_dtype(stored, wanted, expected, tmp_path):
    assert read_config(write(tmp_path, QWEN2, torch_dtype=stored), wanted).dtype == expected


def test_float16_is_reported(tmp_path, caplog):
    with caplog.at_level("INFO", logger="s1engine.models.config"):
        read_config(write(tmp_path, QWEN2, torch_dtype="float16"))
    assert "float16" in caplog.text and "float32" in caplog.text


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"},
            ["MixtralForCausalLM", "Qwen3ForCausalLM"],
        ),
        ({"architectures": ["Qwen3ForCausalLM"]}, ["model_type='qwen2'", "'qwen3'"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'"]),
        ({"use_sliding_window": True, "max_window_layers": 3}, ["layer_types", "sliding_attention"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["rope_type='dynamic'", "llama3"]),
        ({"rope_scaling": {"type": "yarn"}}, ["factor"]),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, ["factor=0"]),
        ({"rope_theta": None}, ["rope_theta=None"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["quantization_config"]),
        ({"num_attention_heads": 5, "hidden_size": 320}, ["num_attention_heads=5", "num_key_value_heads=2"]),
        ({"hidden_size": 14 * 33}, ["head_dim=33"]),
        ({"hidden_size": "wide"}, ["hidden_size"]),
        ({"torch_dtype": "float64"}, ["float64"]),
        # All of them at once, not only the first.
        ({"hidden_act": "relu", "partial_rotary_factor": 0.5}, ["hidden_act='relu'", "partial_rotary_factor"]),
    ],
)
def test_unsupported_features_are_named(changes, named, tmp_path):
    with pytest.raises(ValueError) as error:
        read_config(write(tmp_path, QWEN2, **changes))
    for text in named:
        assert text in str(error.value)


def test_inactive_sliding_window_is_accepted(tmp_path):
    read_config(write(tmp_path, QWEN2, use_sliding_window=True, max_window_layers=24))


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"dtype='half'.*float32, bfloat16"):
        read_config(write(tmp_path, QWEN2), "half")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no config\.json"):
        read_config(tmp_path / "empty")
