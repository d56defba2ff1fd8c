"""All layers in one C++ call give the bits of the operators called one by one."""

from __future__ import annotations

import pytest
import torch
from conditions import needs_csrc

from s1engine.kernels import decoder_layers as module
from s1engine.models import CausalLM, load_model

pytestmark = needs_csrc


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "llama"])
def test_the_same_bits(arch, dtype, quantization, make_model, paged_runner, monkeypatch):
    config = {"attention_bias": True, "mlp_bias": True} if arch == "llama" else {}
    model = load_model(str(make_model(arch, dtype=dtype, **config)), quantization=quantization)
    chunks = {"a": list(range(40)), "b": list(range(7)), "c": [5]}

    def run() -> list[torch.Tensor]:
        runner = paged_runner(model)
        return [*runner.step(chunks).values(), *runner.step({name: [3] for name in chunks}).values()]

    fused = run()
    calls = []

    def one_by_one(*arguments: object) -> torch.Tensor:
        calls.append(arguments)
        return module._decoder_layers(*arguments)

    monkeypatch.setattr("s1engine.models.causal_lm.decoder_layers", one_by_one)
    separate = run()
    assert len(calls) == 2
    for one, other in zip(fused, separate, strict=True):
        assert torch.equal(one, other) and one.isfinite().all()


def test_what_does_not_fit_is_named(make_model):
    model = load_model(str(make_model("qwen2")))
    config = model.config
    weights = [tensor for layer in model.layers for tensor in layer.packed_weights()]
    cache = torch.zeros(config.num_layers, 2, 4, 16, config.num_kv_heads, config.head_dim)
    caches = [part for layer in cache.unbind(0) for part in layer.unbind(0)]

    def run(**changed: object) -> torch.Tensor:
        arguments = {
            "residual": torch.zeros(1, config.hidden_size),
            "weights": weights,
            "caches": caches,
            "rotary": model.planner.rotary,
            "positions": torch.tensor([3]),
            "slot_mapping": torch.tensor([3]),
            "block_tables": torch.zeros(1, 1, dtype=torch.int32),
            "query_start": torch.tensor([0, 1], dtype=torch.int32),
            "context_lens": torch.tensor([4], dtype=torch.int32),
        } | changed
        sizes = (config.num_heads, config.intermediate_size, config.rms_norm_eps, 1.0)
        return module.decoder_layers(*arguments.values(), *sizes)

    assert run().shape == (1, config.hidden_size)
    for changed, message in (
        ({"weights": weights[:-1]}, "weights: must be 12 a layer"),
        ({"positions": torch.tensor([10**6])}, "positions: has 1000000 at 0"),
        ({"slot_mapping": torch.tensor([64])}, "slot_mapping: has 64 at 0"),
        ({"block_tables": torch.full((1, 1), 4, dtype=torch.int32)}, "block_tables: has 4 at 0"),
        ({"context_lens": torch.tensor([17], dtype=torch.int32)}, "block_tables: too narrow"),
        ({"query_start": torch.tensor([0, 2], dtype=torch.int32)}, "query_start: must go from 0"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(**changed)


def test_a_new_cache_is_noticed(make_model, paged_runner):
    """The lists of tensors are made once for a cache, and again for another."""
    model: CausalLM = load_model(str(make_model("qwen3")))
    first = paged_runner(model).step({"a": [1, 2, 3]})["a"]
    assert torch.equal(paged_runner(model, num_blocks=32).step({"a": [1, 2, 3]})["a"], first)
