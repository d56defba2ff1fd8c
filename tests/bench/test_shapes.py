"""The shapes of real models, and checkpoints written from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from s1engine.bench.speed import shapes
from s1engine.bench.speed.shapes import SHAPES, make_model, model_shape

# Billions of parameters, as the model cards give them.
PUBLISHED = {
    "qwen2.5-0.5b": 0.49,
    "qwen2.5-1.5b": 1.54,
    "qwen2.5-7b": 7.61,
    "qwen2.5-32b": 32.5,
    "qwen3-0.6b": 0.6,
    "qwen3-8b": 8.2,
    "llama-3.1-8b": 8.03,
}


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_shapes_have_the_published_number_of_parameters(name: str) -> None:
    config = {key: value for key, value in SHAPES[name].items() if key != "model_type"}
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(AutoConfig.for_model(SHAPES[name]["model_type"], **config))
    assert sum(p.numel() for p in net.parameters()) / 1e9 == pytest.approx(PUBLISHED[name], rel=0.01)
    layer, shape = net.model.layers[0], model_shape(name)
    assert tuple(net.lm_head.weight.shape) == (shape.vocab, shape.hidden)
    assert tuple(layer.mlp.up_proj.weight.shape) == (shape.intermediate, shape.hidden)
    assert tuple(layer.self_attn.q_proj.weight.shape) == (shape.heads * shape.head_dim, shape.hidden)
    assert tuple(layer.self_attn.k_proj.weight.shape) == (shape.kv_heads * shape.head_dim, shape.hidden)
    assert hasattr(layer.self_attn, "q_norm") == shape.qk_norm


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_bytes", [20_000, 1 << 30])
def test_a_written_model_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int, tied: bool) -> None:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 300, "head_dim": 8}
    config = SHAPES["llama-3.1-8b"] | small | {"num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setitem(SHAPES, "small", config | {"tie_word_embeddings": tied})
    monkeypatch.setattr(shapes, "SHARD_BYTES", shard_bytes)
    make_model("small", tmp_path, torch.bfloat16)

    files = sorted(tmp_path.glob("*.safetensors"))
    stored = [load_file(file) for file in files]
    assert (len(files) == 1) == (shard_bytes > 20_000)
    assert all(len(part) == 1 or sum(t.nbytes for t in part.values()) <= shard_bytes for part in stored)
    net = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    tensors = {name: tensor for part in stored for name, tensor in part.items()}
    assert len(tensors) == sum(len(part) for part in stored) == len(dict(net.named_parameters()))
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, tensors[name]), name
    assert tensors["model.layers.1.mlp.up_proj.weight"].float().std() == pytest.approx(0.02, rel=0.2)
    assert net.config.rope_parameters["factor"] == 8.0
