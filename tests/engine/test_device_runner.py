"""The device path on a CPU: slots, uploads, launches, late results; with PyTorch references for kernels."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted_device import by_reference, run_cases
from standin import (
    FORMAT,
    VOCAB,
    StandIn,
    check_released,
    check_request,
    engine,
    random_params,
    random_prompt,
    run_all,
)
from thinking_cases import load_conformance

from s1engine import LLM, SamplingParams, ThinkingBudget

SETTINGS = [
    {},
    {"block_size": 1, "max_num_batched_tokens": 16, "max_num_seqs": 16},
    {"block_size": 4, "max_num_batched_tokens": 16, "max_num_seqs": 8},
    {"block_size": 4, "num_blocks": 44, "max_num_batched_tokens": 40},  # too small: preemption
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("seed", [0, 1])
def test_random_requests_equal_the_oracle(settings: dict[str, Any], seed: int) -> None:
    rng = random.Random(seed)
    prefixes = [[rng.randrange(14, VOCAB) for _ in range(n)] for n in (0, 5, 16, 40)]
    requests = []
    for number in range(60):
        params = random_params(rng)
        if number % 5:  # else the host edits logits or keeps them, and everybody waits for it
            params = replace(params, logprobs=rng.choice([None, 0]), thinking=None if number % 2 else params.thinking)
        if number % 3 == 0:
            params = replace(params, ignore_eos=True, stop_token_ids=None)
        requests.append((random_prompt(rng, prefixes), params))
    llm = engine(StandIn(), seed, attention_backend="triton", **settings)
    outputs = run_all(llm, requests, {})
    for number, ((prompt, params), output) in enumerate(zip(requests, outputs, strict=True)):
        check_request(llm, number, prompt, params, output)
    check_released(llm)
    if settings.get("num_blocks"):
        assert llm.scheduler.num_preemptions > 10, "the cache was meant to be too small"


def test_every_conformance_case_through_the_decode_step() -> None:
    cases = [case for _, case, _ in load_conformance()]
    for case, completion in zip(cases, run_cases(cases, 40, "cpu"), strict=True):
        tokens, forced, thinking_tokens = by_reference(case, 40)
        assert completion.token_ids == tokens
        assert completion.forced_mask == forced
        assert completion.thinking.num_tokens == thinking_tokens


PARAMS = [
    SamplingParams(temperature=0, max_tokens=24),
    SamplingParams(temperature=0.9, seed=1, top_p=0.9, top_k=30, max_tokens=24, logprobs=0),
    SamplingParams(temperature=1.2, seed=2, min_p=0.05, max_tokens=24, repetition_penalty=1.3, presence_penalty=0.4),
    SamplingParams(temperature=1.0, seed=3, max_tokens=24, frequency_penalty=0.7, logit_bias={5: 3.0, 7: -4.0}),
    SamplingParams(temperature=0.8, seed=4, max_tokens=30, min_tokens=8, stop_token_ids=[3, 30, 99]),
    SamplingParams(temperature=0.7, seed=5, max_tokens=24, logprobs=3, bad_words=["the", " is"]),
    SamplingParams(temperature=0.7, seed=5, max_tokens=24, logprobs=1, logprobs_mode="processed_logprobs", top_k=9),
    SamplingParams(temperature=0, max_tokens=8, prompt_logprobs=2),
    SamplingParams(temperature=1.0, seed=6, n=3, max_tokens=20, stop=["a"]),
    SamplingParams(temperature=1.0, seed=7, max_tokens=60, thinking=ThinkingBudget(max_tokens=12, min_answer_tokens=9)),
    SamplingParams(temperature=1.0, seed=8, max_tokens=60, thinking=ThinkingBudget(ignore_end=2, min_tokens=20)),
]


def test_tokens_and_logprobs_are_those_of_the_cpu_path(model_folder: Callable[..., Path]) -> None:
    """Every sampling parameter, side by side in one batch."""
    folder = str(model_folder("qwen3", eos_token_id=1))
    prompts = [[10 + i, 20, 30 + i] * (1 + 3 * i) for i in range(len(PARAMS))]
    outputs = []
    for backend in ("torch", "triton"):
        llm = LLM(folder, device="cpu", attention_backend=backend, max_num_batched_tokens=40, max_num_seqs=8)
        outputs.append(llm.generate(prompts, PARAMS, use_tqdm=False))
    for by_torch, by_device in zip(*outputs, strict=True):
        assert by_torch.prompt_logprobs is None or _close(by_torch.prompt_logprobs[1:], by_device.prompt_logprobs[1:])
        for one, other in zip(by_torch.outputs, by_device.outputs, strict=True):
            assert one.token_ids == other.token_ids and one.text == other.text
            assert (one.finish_reason, one.stop_reason) == (other.finish_reason, other.stop_reason)
            assert one.forced_mask == other.forced_mask and one.banned_mask == other.banned_mask
            assert one.logprobs is None or _close(one.logprobs, other.logprobs)


def test_warming_up_leaves_no_trace(model_folder: Callable[..., Path]) -> None:
    """It runs on a GPU alone, when an engine is made."""
    llm = LLM(str(model_folder("qwen3")), device="cpu", attention_backend="triton", max_num_seqs=4)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    want = [output.outputs[0].token_ids for output in llm.generate([[5, 6, 7], [9] * 20], params, use_tqdm=False)]
    runner = llm.engine.core.runner
    before = [runner.kv_cache.clone(), *(t.clone() for t in vars(runner.slots.tensors).values() if t is not None)]
    runner._warm_up()
    after = [runner.kv_cache, *(t for t in vars(runner.slots.tensors).values() if t is not None)]
    assert all(map(torch.equal, before, after))
    again = [output.outputs[0].token_ids for output in llm.generate([[5, 6, 7], [9] * 20], params, use_tqdm=False)]
    assert again == want


def _close(entries: Any, others: Any) -> bool:
    return all(
        list(entry) == list(other)
        and all(entry[i].logprob == pytest.approx(other[i].logprob, abs=1e-4) for i in entry)
        and all(entry[i].rank == other[i].rank for i in entry)
        for entry, other in zip(entries, others, strict=True)
    )


def test_the_state_of_a_preempted_row_is_what_the_device_made_of_it() -> None:
    llm = engine(StandIn(), block_size=1, attention_backend="triton", max_num_seqs=4)
    prompt, budget = [20, 21, 4, 5], ThinkingBudget(max_tokens=0, format=FORMAT)
    params = SamplingParams(temperature=0, max_tokens=30, thinking=budget, ignore_eos=True)
    llm.add_request("r", {"prompt_token_ids": prompt}, params)
    for _ in range(4):
        llm.step()
    llm.core._commit_down_to(0)
    llm.scheduler._preempt(llm.core.requests["r"].samples[0])
    final: list[Any] = []
    while llm.has_unfinished_requests():
        final = llm.step()
    check_request(llm, 0, prompt, params, final[0])


def test_answer_now_reaches_the_device() -> None:
    llm = engine(StandIn(), attention_backend="triton", max_num_seqs=4)
    budget = ThinkingBudget(format=FORMAT, ignore_end=50, extensions=[[16]])
    params = SamplingParams(temperature=0, max_tokens=60, thinking=budget, ignore_eos=True)
    llm.add_request("r", {"prompt_token_ids": [20, 4, 5]}, params, stream=True)
    output: list[Any] = []
    for _ in range(12):
        output = llm.step()
    before = len(output[0].outputs[0].token_ids)
    llm.answer_now("r")
    while llm.has_unfinished_requests():
        output = llm.step()
    thinking = output[0].outputs[0].thinking
    event = next(e for e in thinking.events if e.kind == "budget")
    assert thinking.stop_reason == "budget" and event.position <= before + 2 + len(FORMAT.triggers[0].tokens)
