"""The memory plan: parameters counted, activations against what autograd keeps, and the 32B recipe on its devices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from s1engine.models import load_model
from s1engine.models.batch import SampleBatch
from s1engine.models.config import read_config as read_model_config
from s1engine.train.memory_plan import GIB, layer_bytes, parameter_count, plan
from s1engine.train.sft_config import read_config

RECIPE = Path(__file__).parents[2] / "train" / "configs" / "s1-32b.toml"


def kept_bytes(model, tokens: int) -> int:
    """Of the distinct tensors, parameters and angles apart, that the forward pass keeps for the backward pass."""
    storages = {}
    constant = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in constant:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = SampleBatch(torch.arange(tokens), torch.tensor([0, tokens], dtype=torch.int32), [0, tokens])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model(torch.zeros(tokens, dtype=torch.int64), batch, None)
        del hidden
    return sum(storages.values())


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_autograd_keeps_of_a_layer(make_model, arch, dtype):
    kept = []
    for layers in (1, 3):
        folder = make_model(arch, dtype=dtype, num_hidden_layers=layers, num_key_value_heads=4)
        model = load_model(str(folder), packed=False).requires_grad_(True)
        kept.append(kept_bytes(model, 512))
    # On CPUs attention's result is copied, from samples into the row.
    copied = 512 * 96 * dtype.itemsize
    assert (kept[1] - kept[0]) / 2 == pytest.approx(layer_bytes(model.config, 512) + copied, rel=0.01)


@pytest.fixture(scope="module")
def qwen32b(tmp_path_factory) -> Path:
    """The configuration of Qwen2.5-32B, without weights."""
    folder = tmp_path_factory.mktemp("32b")
    config = transformers.Qwen2Config(
        vocab_size=152064, hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40,
        num_key_value_heads=8, max_position_embeddings=32768, tie_word_embeddings=False, dtype="bfloat16",
        architectures=["Qwen2ForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    return folder


def test_parameters_of_the_32b_shape(qwen32b):
    assert parameter_count(read_model_config(qwen32b)) == 32_763_876_352  # as its model card says, 32.8B


@pytest.mark.parametrize(("ranks", "deepspeed"), [(16, "zero3.json"), (8, "zero3-offload.json")])
def test_the_32b_recipe_fits_its_devices(qwen32b, ranks, deepspeed):
    config = read_config(RECIPE, [f"model={qwen32b}", f"deepspeed={RECIPE.parent / deepspeed}"])
    found = plan(config, read_model_config(qwen32b), ranks)
    assert found.device_total < 72 * GIB, json.dumps({k: v / GIB for k, v in found.device.items()})
    count = 32_763_876_352
    states = found.device | found.host
    assert states["weights"] + states["gradients"] + states["optimizer"] == pytest.approx(16 * count / ranks)
    assert found.host["layer inputs"] == 64 * 32768 * 5120 * 4


def test_without_offloading_the_32b_recipe_does_not_fit(qwen32b):
    config = read_config(RECIPE, [f"model={qwen32b}", "offload_layers=false"])
    assert plan(config, read_model_config(qwen32b), 16).device_total > 80 * GIB
