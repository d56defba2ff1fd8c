"""Scheduling, KV blocks, thinking and stop conditions, against an oracle that runs one sequence at a time.

The model here is a stand-in whose "attention" reads its context back from the KV blocks: it fails on any block that was
shared wrongly, freed too early or copied too late, and its next token depends on every token before. The oracle knows
neither blocks nor batches; it uses the reference thinking machine.
"""

import random
from dataclasses import dataclass, field
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from s1engine import SamplingParams, ThinkingBudget, ThinkingFormat
from s1engine.config import EngineConfig
from s1engine.engine.llm_engine import LLMEngine
from s1engine.kernels.philox import hash_seed
from s1engine.kernels.sampler import SamplingBatch, sample
from s1engine.thinking import Machine, Trigger

VOCAB, EOS, STOP = 24, 2, 3
FORMAT = ThinkingFormat(
    start=[4, 5],
    triggers=[
        Trigger([6, 7, 8], [6, 7, 8]),
        Trigger([EOS], [6, 7, 8]),
        Trigger([9], [9, 10]),
        Trigger([11], [11], ignorable=False),
    ],
    forced_close=[6, 7, 8, 12, 13],
    separator=[14],
    newline_ids=[14, 15],
    eos_ids=[EOS],
)


@lru_cache(maxsize=100_000)
def context_logits(context: tuple[int, ...]) -> np.ndarray:
    """Logits after a context: pseudo-random, leaning to tokens that make something happen."""
    rng = np.random.default_rng([len(context), *context[-8:], sum(context)])
    logits = rng.normal(size=VOCAB)
    logits[[6, 7, 8, 9]] += 0.8  # ends of thinking
    if context[-1:] in ((6,), (7,), (4,)):
        logits[context[-1] + 1] += 2.0  # delimiters of several tokens go on more often than not
    logits[[EOS, STOP]] -= 1.5
    logits = logits.astype(np.float32)
    logits.flags.writeable = False
    return logits


@dataclass
class StandIn:
    """A model whose hidden rows are numbers of contexts it read back from the KV cache."""

    config: Any = field(
        default_factory=lambda: SimpleNamespace(
            vocab_size=VOCAB,
            num_layers=1,
            num_kv_heads=1,
            head_dim=1,
            dtype=torch.float64,
            max_position_embeddings=4096,
            eos_token_ids=(EOS,),
        )
    )
    contexts: list[tuple[int, ...]] = field(default_factory=list)
    max_rows: int = 0

    def __call__(self, token_ids: torch.Tensor, batch: Any, kv_cache: torch.Tensor) -> torch.Tensor:
        self.max_rows = max(self.max_rows, len(token_ids))
        keys, values = kv_cache[0, 0].view(-1), kv_cache[0, 1].view(-1)
        assert len(set(batch.slot_mapping.tolist())) == len(token_ids), "two rows write to one place"
        keys[batch.slot_mapping] = token_ids.double()
        values[batch.slot_mapping] = batch.positions.double()
        block_size = kv_cache.shape[3]
        self.contexts = []
        starts = batch.query_start_list
        for s, context_len in enumerate(batch.context_lens_list):
            blocks = batch.block_tables[s].long()
            places = (blocks[:, None] * block_size + torch.arange(block_size)).flatten()[:context_len]
            assert values[places].tolist() == list(range(context_len)), "a context is not what was written"
            context = tuple(int(t) for t in keys[places])
            query_len = starts[s + 1] - starts[s]
            assert batch.positions[starts[s] : starts[s + 1]].tolist() == list(
                range(context_len - query_len, context_len)
            )
            self.contexts += [context[: context_len - query_len + 1 + i] for i in range(query_len)]
        assert [n for n in np.diff(starts)[: batch.num_decodes] if n != 1] == []
        return torch.arange(len(token_ids)).unsqueeze(1)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.stack([context_logits(self.contexts[i]) for i in hidden.flatten().tolist()]))


@dataclass
class Expected:
    tokens: list[int]
    forced: list[bool]
    finish_reason: str
    stop_reason: int | str | None
    thinking_tokens: int | None


def oracle(prompt: list[int], params: SamplingParams, seed: int, limit: int) -> Expected:
    """What one sample must be, computed alone and token by token."""
    out: list[int] = []
    forced: list[bool] = []
    machine = None
    if params.thinking is not None:
        fmt = params.thinking.format
        assert isinstance(fmt, ThinkingFormat)
        if params.ignore_eos:
            fmt = ThinkingFormat(fmt.start, fmt.triggers, fmt.forced_close, fmt.separator, fmt.newline_ids)
        machine = Machine(fmt, params.thinking, prompt)
    counts: list[int] = []
    looked = 0
    stops = set(params.stop_token_ids or ())
    while True:
        logits = torch.from_numpy(context_logits(tuple(prompt + out)).copy())[None]
        for token, bias in (params.logit_bias or {}).items():
            logits[0, token] += bias
        if len(out) < params.min_tokens:
            logits[0, sorted(stops | (set() if params.ignore_eos else {EOS}))] = -torch.inf
        if machine is not None:
            logits[0, list(machine.banned)] = -torch.inf
        x = draw(logits, params, seed, len(prompt) + len(out))
        held = 0
        if machine is None:
            y, f = x, False
            ended = x == EOS and not params.ignore_eos
        else:
            step = machine.step(x)
            if step.rewind:
                del out[-step.rewind :], forced[-step.rewind :], counts[-step.rewind :]
            if step.token is None:
                while looked < len(out):  # what was held back is final now
                    if not forced[looked] and out[looked] in stops:
                        del out[looked + 1 :], forced[looked + 1 :]
                        return Expected(out, forced, "stop", out[looked], counts[looked])
                    looked += 1
                return Expected(out, forced, "length", "thinking_budget", machine.thinking_tokens)
            y, f, held, ended = step.token, step.forced, machine.held, machine.finished
        out.append(y)
        forced.append(f)
        counts.append(machine.thinking_tokens if machine is not None else 0)
        full = len(prompt) + len(out) >= limit
        while looked < len(out) - (held if not full else 0) - (1 if ended else 0):
            if not forced[looked] and out[looked] in stops:
                del out[looked + 1 :], forced[looked + 1 :]
                return Expected(out, forced, "stop", out[looked], counts[looked] if machine is not None else None)
            looked += 1
        thinking_tokens = machine.thinking_tokens if machine is not None else None
        if ended:
            return Expected(out, forced, "stop", None, thinking_tokens)
        if full:
            return Expected(out, forced, "length", None, thinking_tokens)


def draw(logits: torch.Tensor, params: SamplingParams, seed: int, position: int) -> int:
    batch = SamplingBatch(
        temperature=torch.tensor([params.temperature]),
        top_k=torch.tensor([params.top_k]),
        top_p=torch.tensor([params.top_p]),
        min_p=torch.tensor([params.min_p]),
        seeds=torch.tensor([seed]),
        positions=torch.tensor([position]),
        all_greedy=params.temperature == 0,
        any_top_k=params.top_k > 0,
        any_top_p=params.top_p < 1,
        any_min_p=params.min_p > 0,
    )
    return int(sample(logits, batch))


def random_budget(rng: random.Random) -> ThinkingBudget | None:
    if rng.random() < 0.3:
        return None
    extensions = rng.choice([[[16]], [[16], [17, 18, 14]], [[17, 14]]])
    return ThinkingBudget(
        max_tokens=rng.choice([None, 0, 1, 2, 3, 5, 8, 13, 30]),
        min_tokens=rng.choice([0, 0, 4, 12]),
        ignore_end=rng.choice([0, 0, 1, 2, 4]),
        extensions=extensions,
        scope=rng.choice(["total", "total", "segment"]),
        grace_tokens=rng.choice([0, 0, 2, 5]),
        on_budget=rng.choice(["force_end", "force_end", "force_end", "truncate"]),
        format=FORMAT,
    )


def random_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        n=rng.choice([1, 1, 1, 2, 3]),
        temperature=rng.choice([0.0, 0.0, 0.7, 1.5]),
        top_k=rng.choice([0, 0, 3, 8]),
        top_p=rng.choice([1.0, 1.0, 0.5, 0.9]),
        min_p=rng.choice([0.0, 0.0, 0.1]),
        seed=rng.choice([None, 0, 7, -5]),
        max_tokens=rng.choice([1, 4, 20, 60]),
        min_tokens=rng.choice([0, 0, 0, 1]),
        stop_token_ids=rng.choice([None, None, [STOP], [STOP, 9], [6]]),
        ignore_eos=rng.random() < 0.2,
        logit_bias=rng.choice([None, None, {16: 1.0}]),
        logprobs=rng.choice([None, None, 0, 2]),
        thinking=random_budget(rng),
    )


def random_prompt(rng: random.Random, prefixes: list[list[int]]) -> list[int]:
    body = [rng.randrange(14, VOCAB) for _ in range(rng.randrange(0, 30))]
    return rng.choice(prefixes) + body + rng.choice([[], [4], [4, 5], [4, 5, 14]]) or [20]


def engine(model: StandIn, seed: int = 0, **settings: Any) -> LLMEngine:
    block_bytes = 2 * settings.get("block_size", 16) * 8
    settings["kv_cache_memory"] = settings.pop("num_blocks", 400) * block_bytes
    config = EngineConfig(thinking_format=FORMAT, seed=seed, **settings)
    return LLMEngine(model, config=config)  # type: ignore[arg-type]


def run_all(llm: LLMEngine, requests: list[tuple[list[int], SamplingParams]], aborts: dict[int, int]) -> list[Any]:
    """Run requests that arrive over time; aborts: {request: step}. Returns outputs in the order of the requests."""
    outputs: dict[str, Any] = {}
    arrivals = list(enumerate(requests))
    steps = 0
    while arrivals or llm.has_unfinished_requests():
        for number, (prompt, params) in arrivals[:3]:
            llm.add_request(f"r{number}", {"prompt_token_ids": prompt}, params)
        del arrivals[:3]
        for output in llm.step():
            assert output.request_id not in outputs
            outputs[output.request_id] = output
        check_blocks(llm)
        steps += 1
        for number, at in aborts.items():
            if at == steps and (output := llm.abort_request(f"r{number}")) is not None:
                outputs[output.request_id] = output
    return [outputs[f"r{i}"] for i in range(len(requests))]


def check_blocks(llm: LLMEngine) -> None:
    llm.kv.check(seq.table for r in llm.core.requests.values() for seq in r.samples if seq.table is not None)


def check_released(llm: LLMEngine) -> None:
    check_blocks(llm)
    assert llm.kv.num_free_blocks == llm.kv.num_blocks
    assert llm.core.slots.num_free == llm.config.max_num_seqs
    assert not llm.scheduler.running and not llm.core.requests


def check_request(llm: LLMEngine, number: int, prompt: list[int], params: SamplingParams, output: Any) -> None:
    limit = len(prompt) + min(params.max_tokens or 10**9, llm.max_model_len - len(prompt))
    for i, completion in enumerate(output.outputs):
        seed = hash_seed(llm.config.seed, number + 1) if params.seed is None else params.seed
        want = oracle(prompt, params, hash_seed(seed, i), limit)
        assert completion.token_ids == want.tokens
        assert completion.forced_mask == want.forced
        assert (completion.finish_reason, completion.stop_reason) == (want.finish_reason, want.stop_reason)
        assert len(completion.banned_mask) == len(want.tokens)
        if want.thinking_tokens is not None:
            assert completion.thinking.num_tokens == want.thinking_tokens
        if params.logprobs is not None:
            check_logprobs(prompt, completion)


def check_logprobs(prompt: list[int], completion: Any) -> None:
    """Raw logprobs are the model's own at each position, forced or not."""
    for i, token in enumerate(completion.token_ids):
        logits = torch.from_numpy(context_logits(tuple(prompt + completion.token_ids[:i])).copy()).double()
        want = torch.log_softmax(logits, 0)[token].item()
        assert completion.logprobs[i][token].logprob == pytest.approx(want, abs=1e-5)
        assert completion.logprobs[i][token].rank == int((logits > logits[token]).sum()) + 1


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


def test_a_long_prompt_does_not_stall_decoding() -> None:
    llm = engine(StandIn(), block_size=16, max_num_batched_tokens=32)
    llm.add_request("short", {"prompt_token_ids": [20]}, SamplingParams(max_tokens=30, ignore_eos=True), stream=True)
    assert len(llm.step()[0].outputs[0].token_ids) == 1
    llm.add_request("long", {"prompt_token_ids": [21] * 600}, SamplingParams(max_tokens=4, ignore_eos=True))
    for expected in range(2, 12):  # the long prompt takes 20 steps
        assert [len(o.outputs[0].token_ids) for o in llm.step()] == [expected]


def test_the_oldest_progresses_and_the_youngest_goes_first() -> None:
    llm = engine(StandIn(), block_size=4, num_blocks=20, enable_prefix_caching=False)
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    for name in ("old", "middle", "young"):
        llm.add_request(name, {"prompt_token_ids": [20] * 8}, params)
    finished = []
    preempted_first = None
    while llm.has_unfinished_requests():
        finished += [o.request_id for o in llm.step()]
        counts = {r: llm.core.requests[r].metrics.num_preemptions for r in llm.core.requests}
        if preempted_first is None and any(counts.values()):
            preempted_first = [r for r, n in counts.items() if n]
    assert preempted_first == ["young"]
    assert finished[0] == "old"
    check_released(llm)


@pytest.mark.parametrize("steps", range(1, 8))
def test_preemption_in_the_middle_of_a_forced_sequence(steps: int) -> None:
    """A queue that is half written survives losing slot and blocks, at whichever step that happens."""
    llm = engine(StandIn(), block_size=1, num_blocks=400, enable_prefix_caching=False)
    budget = ThinkingBudget(max_tokens=0, format=FORMAT)
    params = SamplingParams(temperature=0, max_tokens=30, thinking=budget, ignore_eos=True)
    prompt = [20, 21, 4, 5]
    llm.add_request("r", {"prompt_token_ids": prompt}, params)
    for _ in range(steps):
        llm.step()
    llm.scheduler._preempt(llm.core.requests["r"].samples[0])
    final = []
    while llm.has_unfinished_requests():
        final = llm.step()
    assert final[0].metrics.num_preemptions == 1
    assert final[0].outputs[0].forced_mask[:7] == [True] * 6 + [False]
    check_request(llm, 0, prompt, params, final[0])


def test_prompts_without_room_are_refused_at_once() -> None:
    llm = engine(StandIn(), block_size=4, num_blocks=10)
    with pytest.raises(ValueError, match=r"40 tokens leave no room in the context of 40"):
        llm.add_request("r", {"prompt_token_ids": [20] * 40}, SamplingParams())
    assert not llm.has_unfinished_requests()
    llm.add_request("r", {"prompt_token_ids": [20] * 39}, SamplingParams(max_tokens=100, ignore_eos=True))
    assert len(llm.step()[0].outputs[0].token_ids) == 1


def test_samples_equal_single_runs_with_their_own_seeds() -> None:
    """Sample i of seed s is the single run of seed hash(s, i); samples and repeated prompts differ."""
    params = SamplingParams(n=4, temperature=1.5, seed=11, max_tokens=20, ignore_eos=True)
    llm = engine(StandIn())
    llm.add_request("n", {"prompt_token_ids": [20, 21]}, params)
    for i in range(4):
        alone = SamplingParams(temperature=1.5, seed=hash_seed(11, i), max_tokens=20, ignore_eos=True)
        llm.add_request(f"alone{i}", {"prompt_token_ids": [20, 21]}, alone)
    unseeded = SamplingParams(temperature=1.5, max_tokens=20, ignore_eos=True)
    for i in range(3):
        llm.add_request(f"again{i}", {"prompt_token_ids": [20, 21]}, unseeded)
    done = {}
    while llm.has_unfinished_requests():
        done |= {o.request_id: [c.token_ids for c in o.outputs] for o in llm.step()}
    assert done["n"] == [done[f"alone{i}"][0] for i in range(4)]
    assert len({tuple(t) for t in done["n"]}) == 4
    assert len({tuple(done[f"again{i}"][0]) for i in range(3)}) == 3


def test_answer_now_closes_at_the_next_position() -> None:
    llm = engine(StandIn())
    budget = ThinkingBudget(format=FORMAT, ignore_end=50, extensions=[[16]])
    params = SamplingParams(temperature=0, max_tokens=60, thinking=budget, ignore_eos=True)
    llm.add_request("r", {"prompt_token_ids": [20, 4, 5]}, params, stream=True)
    for _ in range(12):
        output = llm.step()[0].outputs[0]
    before = len(output.token_ids)
    llm.answer_now("r")
    while llm.has_unfinished_requests():
        output = llm.step()[0].outputs[0]
    assert output.thinking.stop_reason == "budget"
    event = next(e for e in output.thinking.events if e.kind == "budget")
    assert before <= event.position <= before + len(FORMAT.triggers[0].tokens)
    with pytest.raises(ValueError, match="no such unfinished request"):
        llm.answer_now("r")


@pytest.mark.parametrize("scope", ["total", "segment"])
@pytest.mark.parametrize("min_answer", [1, 7])
@pytest.mark.parametrize("prompt", [[20, 4, 5], [20]])
def test_room_for_the_answer_is_kept(scope: Any, min_answer: int, prompt: list[int]) -> None:
    """However the thinking goes, `min_answer_tokens` of the request are left after the close."""
    llm = engine(StandIn())
    seen = 0
    for seed in range(200):
        budget = ThinkingBudget(
            ignore_end=3, extensions=[[16, 17]], scope=scope, min_answer_tokens=min_answer, format=FORMAT
        )
        params = SamplingParams(temperature=1.0, seed=seed, max_tokens=30, thinking=budget, ignore_eos=True)
        llm.add_request(f"r{seed}", {"prompt_token_ids": prompt}, params)
    while llm.has_unfinished_requests():
        for output in llm.step():
            completion = output.outputs[0]
            events = completion.thinking.events
            if not events or events[-1].kind != "budget":
                continue
            start = max((e.position + 1 for e in events if e.kind == "started"), default=0)
            close = len(FORMAT.separator) + len(FORMAT.forced_close)
            # A block that the model opens when the room is gone already can only be closed at once.
            if 30 - start >= close + min_answer + 2:
                assert len(completion.token_ids) == 30
                assert 30 - (events[-1].position + close) >= min_answer
                seen += 1
    assert seen > 3
    budget = ThinkingBudget(min_answer_tokens=30, format=FORMAT)
    with pytest.raises(ValueError, match="min_answer_tokens=30"):
        llm.add_request("r", {"prompt_token_ids": prompt}, SamplingParams(max_tokens=30, thinking=budget))


def test_unseeded_samples_differ_across_requests() -> None:
    """Sample i of one request is not sample 0 of another: pass@k over duplicates would be wrong."""
    llm = engine(StandIn())
    for i in range(4):
        params = SamplingParams(n=4, temperature=1.5, max_tokens=20, ignore_eos=True)
        llm.add_request(f"r{i}", {"prompt_token_ids": [20, 21]}, params)
    samples = []
    while llm.has_unfinished_requests():
        samples += [tuple(c.token_ids) for output in llm.step() for c in output.outputs]
    assert len(set(samples)) == 16


def test_a_request_of_one_step_leaves_its_prompt_in_the_cache() -> None:
    llm = engine(StandIn(), block_size=4)
    cached = []
    for i in range(2):
        llm.add_request(f"r{i}", {"prompt_token_ids": list(range(14, 24)) * 4}, SamplingParams(max_tokens=1))
        cached.append(llm.step()[0].num_cached_tokens)
    assert cached == [0, 36]


def test_a_second_block_in_segment_scope_has_the_room_that_is_left() -> None:
    """The machine's segment count goes on over blocks; the room kept for the answer must not be taken off twice."""
    llm = engine(StandIn())
    for seed in range(300):
        budget = ThinkingBudget(scope="segment", min_answer_tokens=4, format=FORMAT)
        params = SamplingParams(temperature=1.0, seed=seed, max_tokens=60, thinking=budget, ignore_eos=True)
        llm.add_request(f"r{seed}", {"prompt_token_ids": [20, 4, 5]}, params)
    spare = []
    while llm.has_unfinished_requests():
        for output in llm.step():
            events = output.outputs[0].thinking.events
            if [event.kind for event in events][-2:] == ["started", "budget"]:
                close = len(FORMAT.separator) + len(FORMAT.forced_close)
                spare.append(60 - events[-1].position - close - budget.min_answer_tokens)
    # Closed as late as the room allows: what is spare is only what a second, shorter close or a kept prefix saved.
    assert len(spare) > 3 and max(spare) <= 0


def test_aborted_sequences_do_not_pile_up() -> None:
    llm = engine(StandIn(), max_num_seqs=1)
    params = SamplingParams(max_tokens=50, ignore_eos=True)
    llm.add_request("runs", {"prompt_token_ids": [20]}, params)
    llm.add_request("waits", {"prompt_token_ids": [20]}, params)
    llm.step()
    for i in range(500):
        llm.add_request(f"r{i}", {"prompt_token_ids": [20]}, params)
        llm.abort_request(f"r{i}")
    assert len(llm.scheduler.waiting) <= 4
    while llm.has_unfinished_requests():
        llm.step()
    check_released(llm)


def test_an_exception_in_a_step_aborts_and_loses_nothing_later() -> None:
    model = StandIn()
    llm = engine(model, block_size=4)
    params = SamplingParams(n=2, temperature=0, max_tokens=20, ignore_eos=True)
    llm.add_request("r", {"prompt_token_ids": [20] * 9}, params)
    llm.step()
    compute, model.compute_logits = model.compute_logits, None  # type: ignore[method-assign, assignment]
    with pytest.raises(TypeError):
        llm.step()
    assert not llm.has_unfinished_requests()
    check_released(llm)
    model.compute_logits = compute  # type: ignore[method-assign]
    llm.add_request("again", {"prompt_token_ids": [20] * 9}, params)
    while llm.has_unfinished_requests():
        output = llm.step()
    check_request(llm, 1, [20] * 9, params, output[0])


def test_the_model_s_eos_ends_a_request_whatever_the_format_names() -> None:
    llm = engine(StandIn())
    fmt = ThinkingFormat(start=[4, 5], triggers=[Trigger([9], [9])], forced_close=[9], newline_ids=[14])
    params = SamplingParams(max_tokens=50, thinking=ThinkingBudget(format=fmt), logit_bias={EOS: 50.0})
    llm.add_request("r", {"prompt_token_ids": [20]}, params)
    output = llm.step()[0].outputs[0]
    assert (output.token_ids, output.finish_reason) == ([EOS], "stop")


def test_a_broken_row_hurts_its_own_request_alone() -> None:
    """NaN logits (an overflow, say) in one row leave the others' tokens what they are alone."""

    class Broken(StandIn):
        def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
            logits = super().compute_logits(hidden)
            for row, context in enumerate(self.contexts[i] for i in hidden.flatten().tolist()):
                if context[0] == 23:
                    logits[row] = torch.nan
            return logits

    llm = engine(Broken())
    params = SamplingParams(temperature=0.7, seed=3, max_tokens=10, logprobs=2, ignore_eos=True)
    llm.add_request("broken", {"prompt_token_ids": [23, 20]}, params)
    llm.add_request("good", {"prompt_token_ids": [21, 20]}, params)
    done = {}
    while llm.has_unfinished_requests():
        done |= {output.request_id: output for output in llm.step()}
    assert len(done["broken"].outputs[0].token_ids) == 10
    check_request(llm, 1, [21, 20], params, done["good"])
