"""In bfloat16 the logits are no further from float32 than transformers' own bfloat16 logits are."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from s1engine.models import load_model

QWEN25_05B = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
}
POSITIONS = 64


@pytest.mark.parametrize(
    ("arch", "num_layers"), [("qwen2", 3), ("qwen3", 3), pytest.param("qwen2", 24, marks=pytest.mark.slow)]
)
def test_bfloat16_is_as_close_to_float32_as_transformers(arch, num_layers, make_model, paged_runner):
    folder = make_model(arch, dtype=torch.bfloat16, num_hidden_layers=num_layers, **QWEN25_05B)
    tokens = torch.randint(1000, 150000, (POSITIONS,), generator=torch.Generator().manual_seed(0)).tolist()

    def transformers_logits(dtype: torch.dtype) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        with torch.inference_mode():
            return model(torch.tensor([tokens])).logits[0].float()

    exact = transformers_logits(torch.float32)
    theirs = (transformers_logits(torch.bfloat16) - exact).abs()
    model = load_model(str(folder))
    assert model.config.dtype == torch.bfloat16
    runner = paged_runner(model)
    whole = runner.logits(runner.step({"whole": tokens})["whole"])
    parts = [runner.step({"parts": part})["parts"] for part in (tokens[:40], *([token] for token in tokens[40:]))]
    for ours in (whole, runner.logits(torch.cat(parts))):
        error = (ours - exact).abs()
        assert error.mean() <= 1.1 * theirs.mean()
        assert percentile_99(error) <= 1.1 * percentile_99(theirs)


def percentile_99(values: torch.Tensor) -> float:
    return values.flatten().kthvalue(int(0.99 * values.numel())).values.item()
