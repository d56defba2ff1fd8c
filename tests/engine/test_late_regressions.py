"""What once went wrong with launches in flight; each test failed before its fix."""

import random

import pytest
import torch
from standin import FORMAT, VOCAB, StandIn, check_released, check_request, engine, oracle

from s1engine import SamplingParams, ThinkingBudget


def test_an_abort_keeps_tokens_that_may_be_taken_back_out_of_the_prefix_cache() -> None:
    """The device goes on for some steps after an abort, and may write other tokens where held ones stood."""
    held_ones = 0
    for seed in range(60):
        llm = engine(StandIn(), 0, attention_backend="triton", block_size=1, max_num_seqs=4)
        budget = ThinkingBudget(format=FORMAT, ignore_end=50, extensions=[[16]])
        params = SamplingParams(temperature=1.0, seed=seed, max_tokens=60, thinking=budget, ignore_eos=True)
        llm.add_request("r", {"prompt_token_ids": [20, 21, 4, 5]}, params)
        for _ in range(random.Random(seed).randrange(3, 7)):
            llm.step()
        seq = llm.core.requests["r"].samples[0]
        prompt = [*seq.tokens, 20]
        held_ones += seq.held > 1
        llm.abort_request("r")
        later = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
        llm.add_request("later", {"prompt_token_ids": prompt}, later)
        while llm.has_unfinished_requests():
            outputs = llm.step()
        assert outputs[0].outputs[0].token_ids == oracle(prompt, later, 0, len(prompt) + 5).tokens
    assert held_ones


def test_min_tokens_holds_with_more_stop_ids_than_a_slot_has_room_for() -> None:
    llm = engine(StandIn(), 0, attention_backend="triton", max_num_seqs=4)
    for seed in range(20):
        stops = list(range(2, VOCAB - 2))
        params = SamplingParams(
            temperature=1.5, seed=seed, max_tokens=12, min_tokens=8, ignore_eos=True, stop_token_ids=stops
        )
        llm.add_request(f"r{seed}", {"prompt_token_ids": [20]}, params)
        while llm.has_unfinished_requests():
            outputs = llm.step()
        check_request(llm, seed, [20], params, outputs[0])
        assert len(outputs[0].outputs[0].token_ids) >= 8


def test_answer_now_outside_inference_mode() -> None:
    with torch.inference_mode():
        llm = engine(StandIn(), 0, attention_backend="triton", max_num_seqs=4)
    budget = ThinkingBudget(format=FORMAT, ignore_end=50, extensions=[[16]])
    params = SamplingParams(temperature=0, max_tokens=30, thinking=budget, ignore_eos=True)
    llm.add_request("r", {"prompt_token_ids": [20, 4, 5]}, params)
    llm.step()
    llm.answer_now("r")
    while llm.has_unfinished_requests():
        outputs = llm.step()
    assert outputs[0].outputs[0].thinking.stop_reason == "budget"


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_request_that_needs_the_host_takes_one_step_at_a_time(backend: str) -> None:
    llm = engine(StandIn(), 0, 1, 8, attention_backend=backend, max_num_seqs=4)
    plans, launch = [], llm.core.runner.launch
    llm.core.runner.launch = lambda plan: (plans.append(plan), launch(plan))[1]
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=20, logprobs=2, ignore_eos=True)
    llm.add_request("r", {"prompt_token_ids": [20, 21]}, params)
    while llm.has_unfinished_requests():
        outputs = llm.step()
    check_request(llm, 0, [20, 21], params, outputs[0])
    assert {plan.replays for plan in plans} == {1}


def test_an_exception_between_changed_blocks_and_their_upload(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was to be uploaded for slots that are given to others must not be uploaded with theirs."""
    llm = engine(StandIn(), 0, attention_backend="triton", block_size=1, max_num_seqs=4)
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    llm.add_request("r", {"prompt_token_ids": [20] * 9}, params)
    with monkeypatch.context() as broken, pytest.raises(TypeError):
        broken.setattr(llm.core.slots, "upload", None)
        llm.step()
    assert llm.core.slots._changed_blocks == []
    llm.add_request("again", {"prompt_token_ids": [21] * 5}, params)
    while llm.has_unfinished_requests():
        outputs = llm.step()
    check_request(llm, 1, [21] * 5, params, outputs[0])
    check_released(llm)


@pytest.mark.parametrize(("block_size", "num_blocks"), [(16, 150), (64, 40)])
def test_too_few_blocks_cost_no_more_launches_than_without_looking_ahead(block_size: int, num_blocks: int) -> None:
    """A launch ahead must not keep a short batch running where a preemption would let a longer one go on."""
    counts = []
    for depth in (0, 1):
        llm = engine(
            StandIn(),
            0,
            depth,
            block_size=block_size,
            num_blocks=num_blocks,
            max_num_seqs=32,
            max_num_batched_tokens=4096,
        )
        plans, launch = [], llm.core.runner.launch
        llm.core.runner.launch = lambda plan, to=plans, launch=launch: (to.append(plan), launch(plan))[1]
        rng = random.Random(1)
        for seed in range(32):
            prompt = [14 + rng.randrange(8) for _ in range(rng.randrange(5, 60))]
            params = SamplingParams(temperature=1.0, seed=seed, max_tokens=200, ignore_eos=True)
            llm.add_request(f"r{seed}", {"prompt_token_ids": prompt}, params)
        while llm.has_unfinished_requests():
            llm.step()
        assert llm.scheduler.num_preemptions > 5
        counts.append(len(plans))
    assert counts[1] <= 1.02 * counts[0]
