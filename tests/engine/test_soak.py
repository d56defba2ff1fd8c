"""Two thousand requests through one engine and a real (random) model: memory stays flat."""

import gc
import random
from collections.abc import Callable
from pathlib import Path

from s1engine import SamplingParams, ThinkingBudget
from s1engine.config import EngineConfig
from s1engine.engine.llm_engine import LLMEngine
from s1engine.engine.request import Request, Sequence

COUNT = 2000


def resident_bytes() -> int:
    with open("/proc/self/statm") as line:
        return int(line.read().split()[1]) * 4096


def test_memory_is_flat(model_folder: Callable[..., Path]) -> None:
    rng = random.Random(0)
    config = EngineConfig(max_num_seqs=48, kv_cache_memory=2**20, block_size=8, max_num_batched_tokens=256)
    llm = LLMEngine(str(model_folder("qwen2")), config=config)
    think = llm.tokenizer.convert_tokens_to_ids("<think>")
    reasons: dict[str, int] = {}
    resident = []
    for number in range(COUNT):
        budget = None
        if rng.random() < 0.5:
            cap, waits = rng.choice([None, 0, 3, 9]), rng.choice([0, 2])
            extensions = ["Wait", [rng.randrange(300)]]  # a format and program of its own for many requests
            budget = ThinkingBudget(max_tokens=cap, ignore_end=waits, extensions=extensions, format="deepseek-r1")
        params = SamplingParams(
            n=rng.choice([1, 1, 2]),
            temperature=rng.choice([0.0, 1.0]),
            max_tokens=rng.randrange(1, 24),
            stop=rng.choice([None, ["e", "th"]]),
            logprobs=rng.choice([None, None, 1]),
            presence_penalty=rng.choice([0.0, 0.5]),
            thinking=budget,
        )
        prompt = [rng.randrange(350) for _ in range(rng.randrange(1, 40))] + ([think] if budget else [])
        llm.add_request(str(number), prompt, params, stream=rng.random() < 0.2)
        if rng.random() < 0.1:
            output = llm.abort_request(str(rng.randrange(number + 1)))
            count(reasons, [] if output is None else [output])
        if number % 8 == 7:
            count(reasons, llm.step())
        if number in (COUNT // 2, COUNT - 1):
            while llm.has_unfinished_requests():
                count(reasons, llm.step())
            gc.collect()
            resident.append(resident_bytes())
    assert sum(reasons.values()) == COUNT
    assert min(reasons[r] for r in ("stop", "length", "abort")) > 50
    assert llm.kv.num_free_blocks == llm.kv.num_blocks
    assert llm.core.slots.num_free == 48
    assert llm.scheduler.num_preemptions > 0
    assert not [o for o in gc.get_objects() if isinstance(o, Request | Sequence)]
    assert resident[1] - resident[0] < 16 * 2**20


def count(reasons: dict[str, int], outputs: list) -> None:
    for output in outputs:
        if output.finished:
            reason = output.outputs[0].finish_reason
            reasons[reason] = reasons.get(reason, 0) + 1
