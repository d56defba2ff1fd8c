"""Who runs when, what is kept and what is given back: one property a test."""

from typing import Any

import pytest
import torch
from standin import EOS, FORMAT, StandIn, check_released, check_request, engine

from s1engine import SamplingParams, ThinkingBudget, ThinkingFormat
from s1engine.kernels.philox import hash_seed
from s1engine.thinking import Trigger


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


def test_an_exception_in_a_step_aborts_and_loses_nothing_later(monkeypatch: pytest.MonkeyPatch) -> None:
    model = StandIn()
    llm = engine(model, block_size=4)
    params = SamplingParams(n=2, temperature=0, max_tokens=20, ignore_eos=True)
    llm.add_request("r", {"prompt_token_ids": [20] * 9}, params)
    llm.step()
    with monkeypatch.context() as broken, pytest.raises(TypeError):
        broken.setattr(model, "compute_logits", None)
        llm.step()
    assert not llm.has_unfinished_requests()
    check_released(llm)
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
