"""Scheduling, KV blocks, thinking and stop conditions, all at once, against the oracle of `tests/support`."""

import random
from typing import Any

import pytest
from standin import (
    VOCAB,
    StandIn,
    check_released,
    check_request,
    engine,
    random_params,
    random_prompt,
    run_all,
)

CONFIGS = [
    {},
    {"block_size": 1, "max_num_batched_tokens": 16},
    {"block_size": 4, "max_num_batched_tokens": 16, "max_num_seqs": 8, "enable_prefix_caching": False},
    {"block_size": 8, "max_num_batched_tokens": 7, "max_num_seqs": 5},
    {"block_size": 4, "num_blocks": 44, "max_num_batched_tokens": 40},  # too small: preemption
    {"block_size": 1, "num_blocks": 120, "max_num_batched_tokens": 64, "enable_prefix_caching": False},
]


@pytest.mark.parametrize("settings", CONFIGS)
@pytest.mark.parametrize("seed", [0, 1])
def test_random_requests_equal_the_oracle(settings: dict[str, Any], seed: int) -> None:
    rng = random.Random(seed)
    prefixes = [[rng.randrange(14, VOCAB) for _ in range(n)] for n in (0, 0, 5, 16, 40)]
    requests = [(random_prompt(rng, prefixes), random_params(rng)) for _ in range(60)]
    model = StandIn()
    llm = engine(model, seed, **settings)
    outputs = run_all(llm, requests, {})
    for number, ((prompt, params), output) in enumerate(zip(requests, outputs, strict=True)):
        check_request(llm, number, prompt, params, output)
    check_released(llm)
    assert model.max_rows <= llm.config.max_num_batched_tokens
    if settings.get("num_blocks"):
        assert llm.scheduler.num_preemptions > 10, "the cache was meant to be too small"
    if settings.get("enable_prefix_caching", True) and settings.get("block_size", 16) < 16:
        assert any(o.num_cached_tokens for o in outputs)


def test_two_thousand_requests_with_aborts() -> None:
    """No leak of blocks or slots, and every request ends for the right reason."""
    rng = random.Random(5)
    prefixes = [[rng.randrange(14, VOCAB) for _ in range(n)] for n in (0, 8, 20)]
    requests = [(random_prompt(rng, prefixes), random_params(rng)) for _ in range(2000)]
    # A request arrives at step number // 3 + 1 at the earliest.
    aborts = {i: i // 3 + rng.randrange(1, 40) for i in rng.sample(range(2000), 400)}
    llm = engine(StandIn(), block_size=4, num_blocks=200, max_num_seqs=24, max_num_batched_tokens=64)
    outputs = run_all(llm, requests, aborts)
    aborted = 0
    for number, ((prompt, params), output) in enumerate(zip(requests, outputs, strict=True)):
        assert output.finished
        if "abort" in {o.finish_reason for o in output.outputs}:
            assert number in aborts
            aborted += 1
        elif number % 3 == 0:  # the oracle takes a millisecond a token
            check_request(llm, number, prompt, params, output)
    assert aborted > 50
    assert llm.scheduler.num_preemptions > 50
    check_released(llm)
