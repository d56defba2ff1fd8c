"""Weights that change under the engine, and weights in 8 bits."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conditions import needs_csrc
from safetensors.torch import load_file

from s1engine import LLM, SamplingParams
from s1engine.kernels import native

PROMPTS = [[1, 2, 3, 4], list(range(40, 90))]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


def tokens(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


def open_llm(folder: object, **settings: object) -> LLM:
    return LLM(str(folder), kv_cache_memory=1 << 20, max_model_len=128, **settings)


@pytest.mark.parametrize("quantization", [None, pytest.param("int8", marks=needs_csrc)])
def test_updated_weights_generate_what_their_own_engine_does(quantization, make_model):
    folders = [make_model("qwen2", seed=seed, tie_word_embeddings=True) for seed in (1, 2)]
    llm, other = (open_llm(folder, quantization=quantization) for folder in folders)
    before = tokens(llm)
    assert before != tokens(other)
    # Pairs, as a trainer would stream them. What was cached of the prompts is of the old weights, and must not be used.
    llm.update_weights(iter(load_file(folders[1] / "model.safetensors").items()))
    assert tokens(llm) == tokens(other)


def test_no_update_under_an_open_stream(make_model):
    folder = make_model("llama", seed=3)
    llm = open_llm(folder)
    stream = llm.stream(PROMPTS[0], GREEDY)
    next(stream)
    with pytest.raises(ValueError, match="update_weights: 1 requests are unfinished"):
        llm.update_weights(load_file(folder / "model.safetensors"))
    assert len(list(stream)[-1].outputs[0].token_ids) == 12


@needs_csrc
def test_int8_is_near_the_model(make_model):
    folder = make_model("qwen3", dtype=torch.bfloat16, hidden_size=128, vocab_size=500)
    llm, rounded = open_llm(folder), open_llm(folder, quantization="int8")
    scores = [torch.tensor(one.score([PROMPTS[0]], [PROMPTS[1]])[0]) for one in (llm, rounded)]
    error = (scores[0] - scores[1]).abs()
    assert 0 < error.mean() < 0.1, "the logarithms of probabilities of 50 tokens"


def test_int8_where_it_cannot_be(make_model, monkeypatch):
    with pytest.raises(ValueError, match="quantization='int4': must be None or 'int8'"):
        open_llm(make_model("qwen2"), quantization="int4")
    monkeypatch.setattr(native, "AVAILABLE", False)
    with pytest.raises(ValueError, match="quantization='int8': needs the C\\+\\+ operators"):
        open_llm(make_model("qwen2"), quantization="int8")


def test_sleep_gives_the_cache_back_and_wake_up_goes_on(model_folder: Callable[..., Path]) -> None:
    llm = LLM(str(model_folder()), kv_cache_memory=64 << 20, max_model_len=128)
    params = SamplingParams(seed=1, max_tokens=20, ignore_eos=True)
    want = llm.generate("Wait, let me think", params)[0].outputs[0]
    llm.engine.core.runner.kv_cache[:, :, 8:] = 1  # a cache takes memory where it was written
    before = resident_bytes()
    given = llm.sleep()
    assert given > 60 << 20 and before - resident_bytes() > given / 2
    with pytest.raises(ValueError, match="call wake_up first"):
        llm.generate("Wait", params)
    llm.wake_up()
    output = llm.generate("Wait, let me think", params)[0]
    assert output.num_cached_tokens == 0 and output.outputs[0] == want
    llm.wake_up()  # nothing more to do
    stream = llm.stream("Wait", params)
    next(stream)
    with pytest.raises(ValueError, match="1 requests are unfinished"):
        llm.sleep()
    stream.close()


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
