"""Several steps a launch on the CPU, with rows that end inside: tokens are those of the oracle, and nothing leaks."""

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from standin import (
    FORMAT,
    STOP,
    VOCAB,
    StandIn,
    check_released,
    check_request,
    engine,
    launches,
    random_params,
    random_prompt,
    run_all,
)

from s1engine import LLM, SamplingParams, ThinkingBudget
from s1engine.engine.llm_engine import LLMEngine
from s1engine.kernels import native
from s1engine.kernels.slot_layout import Result

SETTINGS = [
    {},
    {"block_size": 1, "max_num_batched_tokens": 16, "max_num_seqs": 16},
    {"block_size": 4, "max_num_batched_tokens": 16, "max_num_seqs": 8, "enable_prefix_caching": False},
    {"block_size": 4, "num_blocks": 44, "max_num_batched_tokens": 40},  # too small: preemption
]


def random_requests(rng: random.Random, count: int) -> list[tuple[list[int], SamplingParams]]:
    """Most of them with nothing that the host looks at in each step."""
    prefixes = [[rng.randrange(14, VOCAB) for _ in range(n)] for n in (0, 5, 16, 40)]
    requests = []
    for number in range(count):
        params = random_params(rng)
        if number % 20:
            logprobs = 0 if number % 2 and params.thinking is None else None
            params = replace(params, logit_bias=None, logprobs=logprobs, min_tokens=0)
        requests.append((random_prompt(rng, prefixes), params))
    return requests


def ended_inside(llm: LLMEngine) -> list[int]:
    """Of each launch from now on, how many rows ended before its last step."""
    counts: list[int] = []
    launch = llm.core.runner.launch

    def counting(plan: Any) -> Any:
        done = launch(plan)
        active = done.collect().results[:-1, :, Result.ACTIVE]
        counts.append(int((active == 0).any(0).sum()))
        return done

    llm.core.runner.launch = counting
    return counts


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(("depth", "replays"), [(0, 8), (0, 3), (1, 4)])
def test_random_requests_equal_the_oracle(settings: dict[str, Any], depth: int, replays: int) -> None:
    rng = random.Random(10 * depth + replays)
    requests = random_requests(rng, 80)
    llm = engine(StandIn(), 0, depth, replays, rows_may_end=True, **settings)
    plans, ended = launches(llm), ended_inside(llm)
    outputs = run_all(llm, requests, {})
    for number, ((prompt, params), output) in enumerate(zip(requests, outputs, strict=True)):
        check_request(llm, number, prompt, params, output)
    check_released(llm)
    if settings.get("num_blocks"):
        assert llm.scheduler.num_preemptions > 10, "the cache was meant to be too small"
    elif "max_num_seqs" not in settings:  # else somebody waits most of the time
        assert max(plan.replays for plan in plans) == replays and sum(ended) > 5
    elif replays == 8:
        assert max(plan.replays for plan in plans) >= 4 and sum(ended) > 0


@pytest.mark.parametrize("seed", range(3))
def test_launches_that_end_at_any_step(seed: int) -> None:
    """As they do on a machine that is now faster, now slower."""
    rng = random.Random(seed)
    requests = random_requests(rng, 60)
    llm = engine(StandIn(), 0, rng.choice([0, 0, 1]), 8, rows_may_end=True, block_size=4, num_blocks=80)
    runner: Any = llm.core.runner
    runner.launch_seconds = 3.0
    ticks = accumulate(iter(lambda: rng.choice([0.0, 0.5, 1.0]), None))
    runner.clock = lambda: next(ticks)
    plans = launches(llm)
    outputs = run_all(llm, requests, {})
    for number, ((prompt, params), output) in enumerate(zip(requests, outputs, strict=True)):
        check_request(llm, number, prompt, params, output)
    check_released(llm)
    assert len({plan.replays for plan in plans}) > 4


def test_a_thousand_requests_with_aborts_leak_nothing() -> None:
    rng = random.Random(5)
    requests = random_requests(rng, 1000)
    aborts = {i: i // 3 + rng.randrange(1, 12) for i in rng.sample(range(1000), 200)}
    llm = engine(
        StandIn(), 0, 0, 8, rows_may_end=True, block_size=4, num_blocks=200, max_num_seqs=24, max_num_batched_tokens=64
    )
    ended = ended_inside(llm)
    outputs = run_all(llm, requests, aborts)
    aborted = 0
    for number, ((prompt, params), output) in enumerate(zip(requests, outputs, strict=True)):
        if "abort" in {o.finish_reason for o in output.outputs}:
            aborted += 1
        elif number % 3 == 0:  # the oracle takes a millisecond a token
            check_request(llm, number, prompt, params, output)
    check_released(llm)
    assert aborted > 20 and llm.scheduler.num_preemptions > 20 and sum(ended) > 20


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=40, temperature=1.0),
        SamplingParams(max_tokens=40, temperature=1.0, ignore_eos=True, stop_token_ids=[STOP]),
        SamplingParams(max_tokens=40, thinking=ThinkingBudget(3, on_budget="truncate", format=FORMAT)),
        SamplingParams(max_tokens=40, thinking=ThinkingBudget(9, ignore_end=2, extensions=[[16]], format=FORMAT)),
        SamplingParams(n=3, max_tokens=40, temperature=1.0),
    ],
)
def test_every_kind_of_end_inside_a_launch(params: SamplingParams) -> None:
    llm = engine(StandIn(), 0, 0, 8, rows_may_end=True, block_size=4)
    plans, ended = launches(llm), ended_inside(llm)
    prompt = [20, 21, 4, 5]
    done = {}
    for number in range(24):
        llm.add_request(str(number), prompt, replace(params, seed=number))
    while llm.has_unfinished_requests():
        done |= {output.request_id: output for output in llm.step()}
    for number in range(24):
        check_request(llm, number, prompt, replace(params, seed=number), done[str(number)])
    check_released(llm)
    assert sum(ended) > 0 and max(plan.replays for plan in plans) == 8


def test_rows_that_have_ended_are_not_computed() -> None:
    rows = []

    class Counting(StandIn):
        def __call__(self, *args: Any) -> Any:
            rows.append(len(args[0]))
            return super().__call__(*args)

    llm = engine(Counting(), 0, 0, 8, rows_may_end=True)
    lengths = []
    for seed in range(8):
        llm.add_request(str(seed), [20, 21], SamplingParams(temperature=1.0, seed=seed, max_tokens=60))
    while llm.has_unfinished_requests():
        lengths += [len(output.outputs[0].token_ids) for output in llm.step()]
    assert sum(rows) == sum(lengths) + 8  # a prompt's other token
    assert len(rows) == max(lengths)


def test_a_launch_ends_in_time() -> None:
    """However many steps were planned, at least one is done, and no further one begins that would take too long."""
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=30, ignore_eos=True)
    llm = engine(StandIn(), 0, 0, 8, rows_may_end=True)
    llm.core.runner.launch_seconds = 0.0
    plans = launches(llm)
    llm.add_request("r", [20, 21], params)
    outputs = []
    while llm.has_unfinished_requests():
        outputs += llm.step()
    check_request(llm, 0, [20, 21], params, outputs[0])
    assert len(plans) == 30 and {plan.replays for plan in plans} == {1}


@pytest.mark.parametrize(
    "watched",
    [
        SamplingParams(max_tokens=12, ignore_eos=True, logprobs=1),
        SamplingParams(max_tokens=12, ignore_eos=True, presence_penalty=1.0),
        SamplingParams(max_tokens=12, ignore_eos=True, stop_token_ids=[*range(17)]),  # more than a slot has room for
    ],
)
def test_one_step_at_a_time_for_what_the_host_looks_at(watched: SamplingParams) -> None:
    llm = engine(StandIn(), 0, 0, 8, rows_may_end=True)
    plans = launches(llm)
    llm.add_request("free", [20, 21], SamplingParams(max_tokens=40, ignore_eos=True))
    llm.add_request("watched", [20, 21], watched)
    while "watched" in llm.core.requests:
        llm.step()
    assert {plan.replays for plan in plans} == {1}
    llm.step()
    assert plans[-1].replays == 8


def test_a_streaming_request_sees_every_token_of_everybody() -> None:
    llm = engine(StandIn(), 0, 0, 8, rows_may_end=True)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    llm.add_request("stream", [20], params, stream=True)
    llm.add_request("other", [21], params)
    lengths = []
    while llm.has_unfinished_requests():
        lengths += [len(o.outputs[0].token_ids) for o in llm.step() if o.request_id == "stream"]
    assert lengths == list(range(1, 13))


def test_who_waits_gets_a_slot_soon() -> None:
    """At most half of the steps where somebody waits, and none beyond the first certain end."""
    llm = engine(StandIn(), 0, 0, 8, rows_may_end=True, max_num_seqs=2)
    plans = launches(llm)
    for name, tokens in (("short", 7), ("long", 30), ("waits", 30)):
        llm.add_request(name, [20, 21], SamplingParams(max_tokens=tokens, ignore_eos=True))
    while llm.has_unfinished_requests():
        llm.step()
    assert [plan.replays for plan in plans] == [1, 4, 2, 1, 8, 8, 8, 5]
    assert [len(plan.chunks) for plan in plans][:4] == [2, 2, 2, 2]


def test_what_a_launch_reserves_ends_at_the_limit() -> None:
    """Blocks for exactly as many tokens as there can be are enough for as many steps as there are."""
    llm = engine(StandIn(), 0, 0, 8, rows_may_end=True, block_size=4, num_blocks=11, enable_prefix_caching=False)
    plans = launches(llm)
    # The last tokens, of 17 and of 29, are never computed: that makes 4 blocks and 7.
    params = [SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True) for tokens in (12, 24)]
    for number in range(2):
        llm.add_request(str(number), [20 + number] * 5, params[number])
    done = {}
    while llm.has_unfinished_requests():
        done |= {output.request_id: output for output in llm.step()}
    for number in range(2):
        check_request(llm, number, [20 + number] * 5, params[number], done[str(number)])
    assert [plan.replays for plan in plans] == [1, 8, 8, 7] and llm.scheduler.num_preemptions == 0


def test_what_was_made_in_one_launch_serves_as_a_cached_prefix() -> None:
    llm = engine(StandIn(), 0, 0, 8, rows_may_end=True, block_size=4)
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    llm.add_request("r", [20, 21], params)
    while llm.has_unfinished_requests():
        first = llm.step()
    prompt = [20, 21, *first[0].outputs[0].token_ids]
    llm.add_request("again", prompt, params)
    while llm.has_unfinished_requests():
        output = llm.step()
    assert output[0].num_cached_tokens == 28
    check_request(llm, 1, prompt, params, output[0])


def test_a_model_says_the_same_in_one_step_and_in_several(model_folder: Callable[..., Path]) -> None:
    folder = str(model_folder("qwen3", eos_token_id=1))
    rng = random.Random(3)
    prompts = [[rng.randrange(350) for _ in range(rng.randrange(1, 40))] for _ in range(40)]
    budget = ThinkingBudget(max_tokens=9, ignore_end=1, format="deepseek-r1")
    params = [
        SamplingParams(
            n=rng.choice([1, 2]),
            temperature=rng.choice([0.0, 1.0]),
            top_p=rng.choice([1.0, 0.8]),
            seed=number,
            max_tokens=rng.randrange(1, 40),
            thinking=rng.choice([None, budget]),
        )
        for number in range(40)
    ]
    outputs = []
    for replays in (1, 8):
        llm = LLM(folder, device="cpu", deterministic=True, max_num_seqs=16, block_size=8)
        llm.engine.scheduler.max_replays = replays
        plans = launches(llm.engine)
        outputs.append(llm.generate(prompts, params, use_tqdm=False))
        assert max(plan.replays for plan in plans) == min(replays, 4) or replays == 8
    for one, other in zip(*outputs, strict=True):
        for a, b in zip(one.outputs, other.outputs, strict=True):
            assert (a.token_ids, a.text, a.finish_reason) == (b.token_ids, b.text, b.finish_reason)
            assert (a.forced_mask, a.banned_mask, a.thinking) == (b.forced_mask, b.banned_mask, b.thinking)


@pytest.mark.parametrize("deterministic", [True, False])
def test_several_steps_only_where_the_batch_does_not_show_in_the_bits(
    model_folder: Callable[..., Path], deterministic: bool
) -> None:
    """What a launch holds is a matter of time, and so is who is in a batch with whom."""
    llm = LLM(str(model_folder("qwen2")), device="cpu", deterministic=deterministic)
    assert llm.engine.scheduler.max_replays == (8 if deterministic or native.AVAILABLE else 1)


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
@pytest.mark.parametrize("budget", [None, ThinkingBudget(max_tokens=9, ignore_end=1, format="deepseek-r1")])
def test_the_log_probability_of_the_token_alone_needs_no_step_of_its_own(
    model_folder: Callable[..., Path], mode: str, budget: ThinkingBudget | None
) -> None:
    """It is that which stands among the most likely ones, of each of which the host makes a list."""
    llm = LLM(str(model_folder("qwen3", eos_token_id=1)), deterministic=True)
    common: dict[str, Any] = {"n": 3, "max_tokens": 40, "top_p": 0.9, "logprobs_mode": mode, "thinking": budget}
    params = [SamplingParams(temperature=0.5 + 0.5 * seed, seed=seed, **common) for seed in range(4)]
    prompts = [[7, 8, 9 + seed] for seed in range(4)]
    alone, listed = (
        [
            completion
            for output in llm.generate(prompts, [replace(p, logprobs=top) for p in params], use_tqdm=False)
            for completion in output.outputs
        ]
        for top in (0, 2)
    )
    for one, other in zip(alone, listed, strict=True):
        assert one.token_ids == other.token_ids
        for token, entry, entries in zip(one.token_ids, one.logprobs, other.logprobs, strict=True):
            assert entry == {token: entries[token]}
        assert one.cumulative_logprob == other.cumulative_logprob
