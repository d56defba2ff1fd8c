"""Frequencies and angles equal those of transformers for every scaling, in old and new spellings of the config."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from s1engine.models.config import read_config
from s1engine.models.rotary import RopeConfig, inverse_frequencies, rotary_table

BASE: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 96,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
SETTINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.5}},
    "yarn": {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", **YARN}},
    "yarn new spelling": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, **YARN}},
    "yarn without original length": {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "yarn attention factor": {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "attention_factor": 1.7, **YARN}},
    "yarn mscale": {
        "rope_theta": 1e5,
        "rope_scaling": {"type": "yarn", "mscale": 1.3, "mscale_all_dim": 0.7, **YARN},
    },
    "yarn betas": {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "beta_fast": 16, "beta_slow": 2, **YARN}},
    "yarn untruncated": {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "truncate": False, **YARN}},
    "yarn step": {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "beta_fast": 1, "beta_slow": 1, **YARN}},
    "llama3": {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
}


def write(folder: Any, **settings: Any) -> Any:
    (folder / "config.json").write_text(json.dumps({**BASE, **settings}))
    return folder


@pytest.mark.parametrize("name", SETTINGS)
def test_scaled_frequencies(name, tmp_path):
    write(tmp_path, **SETTINGS[name])
    theirs = AutoConfig.from_pretrained(tmp_path)
    expected, factor = ROPE_INIT_FUNCTIONS[theirs.rope_parameters["rope_type"]](theirs, "cpu")
    rope = read_config(tmp_path).rope
    assert rope.rope_type == theirs.rope_parameters["rope_type"]
    torch.testing.assert_close(inverse_frequencies(rope, 24), expected, rtol=1e-6, atol=0)
    assert rope.attention_factor == pytest.approx(factor, rel=1e-9)


@pytest.mark.parametrize("theta", [1e4, 1e6])
@pytest.mark.parametrize("scaling", [None, {"type": "yarn", **YARN}])
def test_table_at_every_position(theta, scaling, tmp_path):
    write(tmp_path, rope_theta=theta, rope_scaling=scaling)
    rotary = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).model.rotary_emb
    positions = torch.arange(5000)
    cos, sin = rotary(torch.zeros(1), positions.unsqueeze(0))
    table = rotary_table(read_config(tmp_path).rope, 24, 5000)
    assert table.shape == (5000, 2, 12)
    # One unit in the last place of an angle of 5000 is 5e-4.
    for actual, expected in ((table[:, 0], cos), (table[:, 1], sin)):
        torch.testing.assert_close(actual[:100], expected[0, :100, :12], rtol=0, atol=1e-5)
        torch.testing.assert_close(actual, expected[0, :, :12], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "positions"),
    [
        ({"rope_theta": 1e4}, 512),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.5}}, 1280),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 8.0}}, 4096),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "yarn", **YARN}}, 512),
        ({"rope_theta": 1e4, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}, 512),
    ],
)
def test_scaling_extends_the_context(settings, positions, tmp_path):
    assert read_config(write(tmp_path, **settings)).max_position_embeddings == positions


def test_unknown_type_is_named():
    with pytest.raises(ValueError, match=r"rope_type='spiral'.*default, linear, yarn, llama3"):
        inverse_frequencies(RopeConfig(rope_type="spiral"), 8)
