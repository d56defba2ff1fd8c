"""A stand-in model whose "attention" reads its context back from the KV blocks, and an oracle for what it must say.

The stand-in fails on any block that was shared wrongly, freed too early or copied too late, and its next token depends
on every token before. The oracle runs one sequence at a time with the reference thinking machine; it knows neither
blocks nor batches.
"""

import math
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
from s1engine.engine.scheduler import Plan
from s1engine.kernels.philox import hash_seed
from s1engine.kernels.sampler import SamplingBatch, sample
from s1engine.models.batch import SlotBatch
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
            num_heads=1,
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
        if isinstance(batch, SlotBatch):
            block_tables, kept = batch.block_tables[batch.rows.clamp_min(0).long()], batch.slot_mapping >= 0
            starts = list(range(len(batch.rows) + 1)) if batch.prefill is None else batch.prefill[0].tolist()
            contexts = batch.context_lens.tolist()
        else:
            block_tables, kept = batch.block_tables, torch.ones(len(token_ids), dtype=torch.bool)
            starts, contexts = batch.query_start_list, batch.context_lens_list
            assert [n for n in np.diff(starts)[: batch.num_decodes] if n != 1] == []
        self.max_rows = max(self.max_rows, int(kept.sum()))
        keys, values = kv_cache[0, 0].view(-1), kv_cache[0, 1].view(-1)
        mapping = batch.slot_mapping[kept]
        assert len(set(mapping.tolist())) == len(mapping), "two rows write to one place"
        keys[mapping] = token_ids[kept].double()
        values[mapping] = batch.positions[kept].double()
        block_size = kv_cache.shape[3]
        self.contexts = []
        for s, context_len in enumerate(contexts):
            places = (block_tables[s].long()[:, None] * block_size + torch.arange(block_size)).flatten()[:context_len]
            assert values[places].tolist() == list(range(context_len)), "a context is not what was written"
            context = tuple(int(t) for t in keys[places])
            query_len = starts[s + 1] - starts[s]
            if context_len:  # else padding
                positions = batch.positions[starts[s] : starts[s + 1]].tolist()
                assert positions == list(range(context_len - query_len, context_len))
            self.contexts += [context[: max(context_len - query_len, 0) + 1 + i] for i in range(query_len)]
        return torch.arange(len(token_ids)).unsqueeze(1)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.stack([context_logits(self.contexts[i]) for i in hidden.flatten().tolist()]))

    def lm_head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.compute_logits(hidden)


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
        temperature=torch.tensor([params.temperature], dtype=torch.float32),
        top_k=torch.tensor([params.top_k]),
        top_p=torch.tensor([params.top_p], dtype=torch.float32),
        min_p=torch.tensor([params.min_p], dtype=torch.float32),
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


def engine(
    model: StandIn, seed: int = 0, depth: int = 0, replays: int = 1, rows_may_end: bool = False, **settings: Any
) -> LLMEngine:
    """depth, replays: how far the engine runs ahead of what it has seen, however long a step takes.

    rows_may_end: several steps are launched where rows may end too, as on a CPU; else as on a device.
    """
    block_bytes = 2 * settings.get("block_size", 16) * 8
    settings["kv_cache_memory"] = settings.pop("num_blocks", 400) * block_bytes
    config = EngineConfig(thinking_format=FORMAT, seed=seed, **settings)
    llm = LLMEngine(model, device="cpu", config=config)
    if depth or replays > 1:
        llm.core.runner.depth, llm.core.runner.launch_seconds = depth, math.inf
        llm.scheduler.max_replays, llm.scheduler.rows_may_end = replays, rows_may_end
    return llm


def launches(llm: LLMEngine) -> list[Plan]:
    """Plans as they are launched, from now on."""
    seen: list[Plan] = []
    launch = llm.core.runner.launch
    llm.core.runner.launch = lambda plan: (seen.append(plan), launch(plan))[1]
    return seen


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
