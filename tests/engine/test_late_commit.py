"""Steps that are launched before the results of the last ones are in: the tokens are the same, and nothing leaks."""

import random
from dataclasses import replace
from typing import Any

import pytest
from standin import (
    EOS,
    FORMAT,
    STOP,
    VOCAB,
    StandIn,
    check_released,
    check_request,
    engine,
    launches,
    oracle,
    random_params,
    random_prompt,
    run_all,
)

from s1engine import SamplingParams, ThinkingBudget
from s1engine.engine.llm_engine import LLMEngine


def run(llm: LLMEngine, prompt: list[int], params: SamplingParams, **settings: Any) -> Any:
    llm.add_request("r", {"prompt_token_ids": prompt}, params, **settings)
    outputs = []
    while llm.has_unfinished_requests():
        outputs += llm.step()
    check_released(llm)
    return outputs[-1].outputs[0]


SETTINGS = [
    {},
    {"block_size": 1, "max_num_batched_tokens": 16},
    {"block_size": 4, "max_num_batched_tokens": 16, "max_num_seqs": 8},
    {"block_size": 4, "num_blocks": 44, "max_num_batched_tokens": 40},  # too small: preemption
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(("depth", "replays"), [(0, 5), (1, 1), (1, 4), (3, 2)])
def test_random_requests_equal_the_oracle(settings: dict[str, Any], depth: int, replays: int) -> None:
    """Mixed with a few whose next step needs the host (biases, logprobs), and with requests that end at every turn."""
    rng = random.Random(depth + replays)
    prefixes = [[rng.randrange(14, VOCAB) for _ in range(n)] for n in (0, 5, 16, 40)]
    requests = []
    for number in range(80):
        params = random_params(rng)
        if number % 10:
            params = replace(params, logit_bias=None, logprobs=None, min_tokens=0)
        if number % 3 == 0:
            params = replace(params, ignore_eos=True, stop_token_ids=None)
        requests.append((random_prompt(rng, prefixes), params))
    llm = engine(StandIn(), 0, depth, replays, **settings)
    plans = launches(llm)
    outputs = run_all(llm, requests, {})
    for number, ((prompt, params), output) in enumerate(zip(requests, outputs, strict=True)):
        check_request(llm, number, prompt, params, output)
    check_released(llm)
    if settings.get("num_blocks"):
        assert llm.scheduler.num_preemptions > 10, "the cache was meant to be too small"
    if replays > 1 and not settings.get("num_blocks"):
        assert max(plan.replays for plan in plans) > 1


def test_a_thousand_requests_with_aborts_leak_nothing() -> None:
    rng = random.Random(5)
    prefixes = [[rng.randrange(14, VOCAB) for _ in range(n)] for n in (0, 8, 20)]
    requests = []
    for _ in range(1000):
        params = replace(random_params(rng), logit_bias=None, logprobs=None, min_tokens=0)
        requests.append((random_prompt(rng, prefixes), params))
    aborts = {i: i // 3 + rng.randrange(1, 40) for i in rng.sample(range(1000), 200)}
    llm = engine(StandIn(), 0, 1, 4, block_size=4, num_blocks=200, max_num_seqs=24, max_num_batched_tokens=64)
    outputs = run_all(llm, requests, aborts)
    aborted = 0
    for number, ((prompt, params), output) in enumerate(zip(requests, outputs, strict=True)):
        if "abort" in {o.finish_reason for o in output.outputs}:
            aborted += 1
        elif number % 3 == 0:  # the oracle takes a millisecond a token
            check_request(llm, number, prompt, params, output)
    assert aborted > 20 and llm.scheduler.num_preemptions > 20
    check_released(llm)


def test_several_steps_are_launched_at_once_where_nobody_can_end() -> None:
    llm = engine(StandIn(), 0, 1, 4)
    plans = launches(llm)
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=24, ignore_eos=True)
    completion = run(llm, [20, 21], params)
    assert completion.token_ids == oracle([20, 21], params, 1, 26).tokens
    # The prompt's step samples the first token; four at a time after that, and the rest before the limit.
    assert [plan.replays for plan in plans] == [1, 4, 4, 4, 4, 4, 3]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=24),
        SamplingParams(max_tokens=24, ignore_eos=True, stop_token_ids=[STOP]),
        SamplingParams(max_tokens=24, thinking=ThinkingBudget(format=FORMAT)),
        SamplingParams(max_tokens=24, ignore_eos=True, thinking=ThinkingBudget(3, on_budget="truncate", format=FORMAT)),
    ],
)
def test_one_step_at_a_time_where_somebody_may_end(params: SamplingParams) -> None:
    llm = engine(StandIn(), 0, 1, 4)
    plans = launches(llm)
    run(llm, [20, 21], params)
    assert {plan.replays for plan in plans} == {1}


def test_a_streaming_request_sees_every_token() -> None:
    llm = engine(StandIn(), 0, 1, 4)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    llm.add_request("r", {"prompt_token_ids": [20]}, params, stream=True)
    lengths = []
    while llm.has_unfinished_requests():
        lengths += [len(output.outputs[0].token_ids) for output in llm.step()]
    assert lengths == list(range(1, 13))


def test_what_the_device_ends_is_not_computed_again() -> None:
    """The launch after an EOS that nobody has seen yet leaves the row alone: the model is not even called."""
    calls = []

    class Counting(StandIn):
        def __call__(self, *args: Any) -> Any:
            calls.append(len(args[0]))
            return super().__call__(*args)

    llm = engine(Counting(), 0, 1)
    plans = launches(llm)
    params = SamplingParams(temperature=2.0, seed=3, max_tokens=400)
    completion = run(llm, [20, 21], params)
    assert completion.token_ids[-1] == EOS and completion.finish_reason == "stop"
    assert len(plans) == len(completion.token_ids) + 1, "one launch was on its way when the EOS was seen"
    assert len(calls) == len(completion.token_ids)


def test_a_stop_that_the_host_finds_late_drops_the_surplus() -> None:
    """More stop ids than a slot holds: the last of them are seen on the host alone, one step late."""
    llm = engine(StandIn(), 0, 1)
    stops = [i for i in range(VOCAB) if i not in (20, 21)][:17]  # the 17th is not in the slot
    params = SamplingParams(temperature=1.5, max_tokens=100, ignore_eos=True, stop_token_ids=stops)
    late = 0
    for seed in range(60):
        seeded = replace(params, seed=seed)
        llm.add_request(f"r{seed}", {"prompt_token_ids": [20]}, seeded)
        while llm.has_unfinished_requests():
            outputs = llm.step()
        want = oracle([20], seeded, seed, 101)
        assert (outputs[0].outputs[0].token_ids, outputs[0].outputs[0].stop_reason) == (want.tokens, want.stop_reason)
        late += want.stop_reason == stops[-1]
    assert late > 0
    check_released(llm)


def test_an_abort_in_flight_returns_what_was_seen() -> None:
    llm = engine(StandIn(), 0, 1, block_size=4)
    params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
    llm.add_request("r", {"prompt_token_ids": [20] * 9}, params)
    llm.add_request("other", {"prompt_token_ids": [21] * 9}, params)
    for _ in range(8):
        llm.step()
    output = llm.abort_request("r")
    assert output is not None
    tokens = output.outputs[0].token_ids
    assert tokens == oracle([20] * 9, params, 0, 59).tokens[: len(tokens)] and len(tokens) == 7
    llm.add_request("again", {"prompt_token_ids": [20] * 9}, params)  # takes slot and blocks of the one before
    done = {}
    while llm.has_unfinished_requests():
        done |= {output.request_id: output for output in llm.step()}
    check_request(llm, 1, [21] * 9, params, done["other"])
    check_request(llm, 2, [20] * 9, params, done["again"])
    check_released(llm)


def test_answer_now_reaches_a_request_in_flight() -> None:
    llm = engine(StandIn(), 0, 1)
    budget = ThinkingBudget(format=FORMAT, ignore_end=50, extensions=[[16]])
    params = SamplingParams(temperature=0, max_tokens=60, thinking=budget, ignore_eos=True)
    llm.add_request("r", {"prompt_token_ids": [20, 4, 5]}, params, stream=True)
    output = None
    for _ in range(12):
        output = llm.step()
    assert output
    before = len(output[0].outputs[0].token_ids)
    llm.answer_now("r")
    while llm.has_unfinished_requests():
        output = llm.step()
    thinking = output[0].outputs[0].thinking
    assert thinking.stop_reason == "budget"
    event = next(e for e in thinking.events if e.kind == "budget")
    # One token later than without a launch on its way.
    assert before <= event.position <= before + 1 + len(FORMAT.triggers[0].tokens)


def test_an_exception_in_flight_aborts_and_loses_nothing_later(monkeypatch: pytest.MonkeyPatch) -> None:
    model = StandIn()
    llm = engine(model, 0, 1, block_size=4)
    params = SamplingParams(n=2, temperature=0, max_tokens=20, ignore_eos=True)
    llm.add_request("r", {"prompt_token_ids": [20] * 9}, params)
    for _ in range(3):
        llm.step()
    with monkeypatch.context() as broken, pytest.raises(TypeError):
        broken.setattr(model, "compute_logits", None)
        llm.step()
    assert not llm.has_unfinished_requests()
    check_released(llm)
    llm.add_request("again", {"prompt_token_ids": [20] * 9}, params)
    output: list[Any] = []
    while llm.has_unfinished_requests():
        output = llm.step()
    check_request(llm, 1, [20] * 9, params, output[0])
