"""What the host does in a step does not grow with what came before: counted, not timed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from standin import StandIn, engine

from s1engine import LLM, SamplingParams, ThinkingBudget
from s1engine.engine import torch_runner
from s1engine.engine.kv_cache import KVCache
from s1engine.engine.step_rows import DecodeRows


def test_a_batch_is_laid_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """While nobody enters it, only new blocks are written; rows that leave it cost one more layout each."""
    made = []

    class Counting(DecodeRows):
        def __init__(self, seqs: Any, *args: Any) -> None:
            made.append(len(seqs))
            super().__init__(seqs, *args)

    monkeypatch.setattr(torch_runner, "DecodeRows", Counting)
    llm = engine(StandIn(), 0, 0, 4, rows_may_end=True, block_size=4)
    for number, tokens in enumerate((60, 60, 30)):
        llm.add_request(str(number), [20, 21], SamplingParams(max_tokens=tokens, ignore_eos=True))
    written, sync = [], llm.core.slots.sync_blocks
    llm.core.slots.sync_blocks = lambda: (written.append(sync()), written[-1])[1]
    while llm.has_unfinished_requests():
        llm.step()
    assert made == [3, 2]
    entries = [end - start for step in written for _, start, end in step]
    assert max(entries) <= 3 and sum(entries) <= 2 * (16 + 16 + 8)


@pytest.mark.parametrize("budget", [None, ThinkingBudget(max_tokens=300, format="deepseek-r1")])
def test_a_stream_decodes_what_is_new(model_folder: Callable[..., Path], budget: ThinkingBudget | None) -> None:
    llm = LLM(str(model_folder("qwen2")), device="cpu", block_size=8)
    tokenizer, decoded = llm.get_tokenizer(), []
    decode = tokenizer.decode
    tokenizer.decode = lambda ids, **kwargs: (decoded.append(len(ids)), decode(ids, **kwargs))[1]
    think = [tokenizer.convert_tokens_to_ids("<think>")]
    params = SamplingParams(temperature=1.5, seed=1, max_tokens=400, ignore_eos=True, thinking=budget)
    costs = []
    for output in llm.stream({"prompt_token_ids": think}, params):
        costs.append((len(output.outputs[0].token_ids), sum(decoded)))
        decoded.clear()
    del tokenizer.decode
    assert len(costs) > 300
    early = max(cost for length, cost in costs if length < 100)
    late = max(cost for length, cost in costs[:-1] if length > 300)
    assert late <= 2 * early


def test_each_block_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []
    chain = KVCache._chain
    monkeypatch.setattr(KVCache, "_chain", lambda self, *args: (hashed.append(args[2]), chain(self, *args))[1])
    llm = engine(StandIn(), 0, 0, 4, rows_may_end=True, block_size=4)
    llm.add_request("r", [20, 21], SamplingParams(max_tokens=100, ignore_eos=True))
    while llm.has_unfinished_requests():
        llm.step()
    assert hashed == list(range(0, 100, 4))
