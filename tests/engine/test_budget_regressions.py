"""Bugs that budgets had in other engines, one test each, run through this one.

The model is scripted: `script[i]` is what it samples at output position i, so that the tokens a budget must give can be
written down. `</think>` is one token (101) in R1, three (60, 62, 63) in PIECES.
"""

from itertools import pairwise
from typing import Any

import pytest
from scripted import EOS, Scripted
from transformers import PreTrainedTokenizerFast

from s1engine import SamplingParams, ThinkingBudget, ThinkingFormat
from s1engine.config import EngineConfig
from s1engine.engine.llm_engine import LLMEngine
from s1engine.thinking import Trigger

NEWLINE, TOOL = 10, 70
R1 = ThinkingFormat(
    start=[100],
    triggers=[Trigger([101], [101]), Trigger([EOS], [101]), Trigger([TOOL], [TOOL], ignorable=False)],
    forced_close=[101, NEWLINE, 50, 51],
    separator=[NEWLINE],
    newline_ids=[NEWLINE],
    eos_ids=[EOS],
)
PIECES = ThinkingFormat(
    start=[60, 61],
    triggers=[Trigger([60, 62, 63], [60, 62, 63]), Trigger([EOS], [60, 62, 63])],
    forced_close=[60, 62, 63, 50],
    newline_ids=[NEWLINE],
    eos_ids=[EOS],
)
OVERLAP = ThinkingFormat(
    start=[100], triggers=[Trigger([101], [101])], forced_close=[60, 60, 61], newline_ids=[NEWLINE], eos_ids=[EOS]
)


def run(
    prompt: list[int], script: list[int], budget: ThinkingBudget, max_tokens: int = 12, **params: Any
) -> tuple[list[int], list[int], Any]:
    """Tokens, forced mask (0/1) and the whole completion."""
    llm = make_engine(prompt, script)
    sampling = SamplingParams(max_tokens=max_tokens, thinking=budget, **{"temperature": 0} | params)
    llm.add_request("r", {"prompt_token_ids": prompt}, sampling)
    completion = finish(llm)["r"].outputs[0]
    return completion.token_ids, [int(f) for f in completion.forced_mask], completion


def make_engine(prompt: list[int], script: list[int], **settings: Any) -> LLMEngine:
    config = EngineConfig(thinking_format=R1, **settings)
    return LLMEngine(Scripted(script, len(prompt)), config=config)


def finish(llm: LLMEngine) -> dict[str, Any]:
    done = {}
    while llm.has_unfinished_requests():
        done |= {output.request_id: output for output in llm.step() if output.finished}
    return done


def test_budget_0_where_the_prompt_opens_thinking_with_a_newline() -> None:
    # llama.cpp #28356: the newline of the prompt counted as a forced token, and thinking went on.
    tokens, forced, completion = run([5, 100, NEWLINE], [200, 201], ThinkingBudget(max_tokens=0), 7)
    assert tokens == [NEWLINE, 101, NEWLINE, 50, 51, 205, 206]
    assert forced == [1, 1, 1, 1, 1, 0, 0]
    assert completion.thinking.num_tokens == 0
    assert completion.thinking.stop_reason == "budget"


def test_tokens_of_the_prompt_are_not_thinking_tokens() -> None:
    # vLLM counts what stands behind a start marker in the prompt; here the prompt does not even open a block.
    tokens, forced, completion = run([100, 7, 7, 7, 7, 7], [200, 201, EOS], ThinkingBudget(max_tokens=2))
    assert tokens == [200, 201, EOS]
    assert not any(forced)
    assert completion.thinking.num_tokens == 0 and completion.thinking.stop_reason is None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_greedy_and_sampled_rows_alike(temperature: float) -> None:
    # vLLM #52284: greedy requests took a path without budgets. (At logit 30 against 20, sampling follows the script.)
    tokens, _, _ = run([100], [200, 201, 202], ThinkingBudget(max_tokens=2), 8, temperature=temperature, seed=3)
    assert tokens == [200, 201, NEWLINE, 101, NEWLINE, 50, 51, 207]


def test_natural_end_one_token_before_the_cap() -> None:
    tokens, forced, completion = run([100], [200, 201, 101, 300 - 1, EOS], ThinkingBudget(max_tokens=3))
    assert tokens == [200, 201, 101, 299, EOS]
    assert not any(forced)
    assert completion.thinking.stop_reason == "natural"


def test_natural_end_exactly_at_the_cap() -> None:
    tokens, forced, completion = run([100], [200, 201, 101, 203, EOS], ThinkingBudget(max_tokens=2))
    assert (tokens, completion.thinking.stop_reason) == ([200, 201, 101, 203, EOS], "natural")
    assert not any(forced)


def test_a_close_that_the_model_began_is_not_begun_again() -> None:
    # TensorRT-LLM #18616 restarts a tag of several tokens that the model had begun.
    budget = ThinkingBudget(max_tokens=3, format=PIECES)
    tokens, forced, completion = run([60, 61], [200, 60, 62, 205], budget, 7)
    assert tokens == [200, 60, 62, 63, 50, 205, 206]
    assert forced == [0, 0, 0, 1, 1, 0, 0]
    assert completion.thinking.num_tokens == 1  # 60 and 62 turned out to be the close


def test_a_close_that_overlaps_itself() -> None:
    budget = ThinkingBudget(max_tokens=3, format=OVERLAP)
    tokens, forced, _ = run([100], [60, 60, 60, 205], budget, 6)
    assert tokens == [60, 60, 60, 61, 204, 205]
    assert forced == [0, 0, 0, 1, 0, 0]


def test_the_natural_close_is_not_the_forced_one() -> None:
    # vLLM #39697: the forced string, longer than the natural one, was injected into the answer of a natural end.
    tokens, forced, _ = run([100], [200, 101, 202, 203, EOS], ThinkingBudget(max_tokens=4))
    assert tokens == [200, 101, 202, 203, EOS]
    assert not any(forced)


def test_a_start_marker_in_the_user_s_text_means_nothing() -> None:
    # SGLang #33146 looked for the delimiters anywhere in the prompt.
    prompt = [5, 100, 101, 100, 6, 7]
    tokens, forced, completion = run(prompt, [200, 201, 202, EOS], ThinkingBudget(max_tokens=1))
    assert (tokens, completion.thinking.num_tokens) == ([200, 201, 202, EOS], 0)
    assert not any(forced)


def test_a_second_block_is_held_to_what_is_left() -> None:
    # vLLM #43708: thinking again after a forced end had no budget; the second close is the natural one.
    script = [200, 201, 0, 0, 0, 0, 0, 100, 208, 209]
    tokens, forced, completion = run([100], script, ThinkingBudget(max_tokens=2), 11)
    assert tokens == [200, 201, NEWLINE, 101, NEWLINE, 50, 51, 100, NEWLINE, 101, 210]
    assert forced == [0, 0, 1, 1, 1, 1, 1, 0, 1, 1, 0]
    assert [e.kind for e in completion.thinking.events] == ["budget", "started", "budget"]


def test_a_tool_call_ends_thinking() -> None:
    # vLLM #44676 forced the end of thinking into the arguments of a tool call.
    tokens, forced, completion = run(
        [100], [200, TOOL, 202, 203, 204, EOS], ThinkingBudget(max_tokens=3, ignore_end=2, extensions=[[90]])
    )
    assert tokens == [200, TOOL, 202, 203, 204, EOS]
    assert not any(forced)
    assert completion.thinking.stop_reason == "natural"


def test_eos_inside_thinking_becomes_the_close() -> None:
    tokens, forced, completion = run([100], [200, EOS, 202, EOS], ThinkingBudget(max_tokens=9))
    assert (tokens, forced) == ([200, 101, 202, EOS], [0, 1, 0, 0])
    assert completion.finish_reason == "stop"


def test_eos_inside_thinking_is_ignored_even_where_it_is_a_stop_id() -> None:
    budget = ThinkingBudget(ignore_end=1, extensions=[[90]])
    tokens, forced, _ = run([100], [200, EOS, 202, 101, 204, EOS], budget, stop_token_ids=[EOS, 101])
    assert tokens == [200, 90, 202, 101]  # the end that is taken is the model's own, and listed
    assert forced == [0, 1, 0, 0]


def test_eos_right_after_the_close_is_banned() -> None:
    # SGLang bans it in one of its three ways; without that, answers are empty.
    script = [200, 101, EOS, EOS]
    tokens, _, completion = run([100], script, ThinkingBudget(max_tokens=9))
    assert tokens == [200, 101, 299, EOS]
    assert completion.banned_mask == [False, False, True, False]


def test_the_end_is_banned_right_after_an_extension() -> None:
    budget = ThinkingBudget(ignore_end=1, extensions=[[90]])
    tokens, _, completion = run([100], [200, 101, 101, 101, 204, EOS], budget)
    assert tokens == [200, 90, 299, 101, 204, EOS]
    assert completion.banned_mask == [False, False, True, False, True, False]


def test_an_ignored_end_of_several_tokens_is_taken_back() -> None:
    budget = ThinkingBudget(ignore_end=1, extensions=[[90, 91]], format=PIECES)
    # Positions 1 and 2 are sampled again after the rewind; the script answers by position.
    tokens, forced, completion = run([60, 61], [200, 60, 62, 63, 204, EOS], budget, 9, logprobs=0)
    assert tokens[:3] == [200, 90, 91]
    assert forced[:3] == [0, 1, 1]
    assert len(completion.logprobs) == len(tokens) == len(completion.banned_mask)
    # 90 stands at position 1, where the script's token is 60: its logprob is that of position 1, not of 63's.
    assert completion.logprobs[1][90].logprob == pytest.approx(-30, abs=0.01)


def test_a_stop_id_that_begins_an_end_waits_for_it() -> None:
    """A stop id that an ignored end takes back never stood there; one that stays does stop."""
    budget = ThinkingBudget(ignore_end=1, extensions=[[90]], format=PIECES)
    tokens, _, completion = run([60, 61], [200, 60, 62, 63, 204, 205, 60, 207, EOS], budget, 12, stop_token_ids=[60])
    assert tokens == [200, 90, 62, 63, 204, 205, 60]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", 60)


def test_preempted_in_the_middle_of_a_forced_close() -> None:
    prompt = [5, 100]
    llm = make_engine(prompt, [200])
    params = SamplingParams(temperature=0, max_tokens=9, thinking=ThinkingBudget(max_tokens=1))
    llm.add_request("r", {"prompt_token_ids": prompt}, params)
    for _ in range(3):
        llm.step()
    llm.scheduler._preempt(llm.scheduler.running[0])
    completion = finish(llm)["r"].outputs[0]
    assert completion.token_ids == [200, NEWLINE, 101, NEWLINE, 50, 51, 206, 207, 208]


def test_a_prefix_cache_hit_that_ends_inside_a_delimiter() -> None:
    """The start marker's first token is in a cached block, its second is not."""
    prompt = [7, 7, 7, 60, 61]
    llm = make_engine(prompt, [200, 201, 202], block_size=4)
    budget = ThinkingBudget(max_tokens=2, format=PIECES)
    expected = None
    for name in ("first", "second"):
        params = SamplingParams(temperature=0, max_tokens=8, thinking=budget)
        llm.add_request(name, {"prompt_token_ids": prompt}, params)
        output = finish(llm)[name]
        expected = expected or output.outputs[0].token_ids
        assert output.outputs[0].token_ids == expected == [200, 201, 60, 62, 63, 50, 206, 207]
        assert output.num_cached_tokens == (4 if name == "second" else 0)


def test_samples_forked_where_the_prompt_opens_thinking() -> None:
    prompt = [7, 7, 7, 100]
    llm = make_engine(prompt, [200, 201, 202], block_size=4)
    params = SamplingParams(n=3, temperature=1, seed=1, max_tokens=8, thinking=ThinkingBudget(max_tokens=1))
    llm.add_request("r", {"prompt_token_ids": prompt}, params)
    outputs = finish(llm)["r"].outputs
    assert [o.token_ids for o in outputs] == [[200, NEWLINE, 101, NEWLINE, 50, 51, 206, 207]] * 3


def test_only_some_rows_of_a_batch_have_a_budget() -> None:
    prompt = [5, 100]
    llm = make_engine(prompt, [200, 201, 202, 203])
    budgets = {
        "none": None,
        "two": ThinkingBudget(max_tokens=2),
        "free": ThinkingBudget(),
        "zero": ThinkingBudget(max_tokens=0),
    }
    for name, budget in budgets.items():
        params = SamplingParams(temperature=0, max_tokens=7, thinking=budget)
        llm.add_request(name, {"prompt_token_ids": prompt}, params)
    done = {name: output.outputs[0].token_ids for name, output in finish(llm).items()}
    assert done["none"] == done["free"] == [200, 201, 202, 203, 204, 205, 206]
    assert done["two"] == [200, 201, NEWLINE, 101, NEWLINE, 50, 51]
    assert done["zero"] == [NEWLINE, 101, NEWLINE, 50, 51, 205, 206]


def test_a_batch_without_budgets_never_runs_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("the machine ran")

    prompt = [5, 100]
    llm = make_engine(prompt, [200])
    monkeypatch.setattr("s1engine.engine.torch_runner.step", fail)
    llm.add_request("r", {"prompt_token_ids": prompt}, SamplingParams(temperature=0, max_tokens=3))
    assert finish(llm)["r"].outputs[0].token_ids == [200, 201, 202]
    llm.add_request("b", {"prompt_token_ids": prompt}, SamplingParams(max_tokens=3, thinking=ThinkingBudget()))
    with pytest.raises(AssertionError, match="the machine ran"):
        finish(llm)


def test_truncation_ends_the_request_without_a_token() -> None:
    budget = ThinkingBudget(max_tokens=2, on_budget="truncate")
    tokens, forced, completion = run([100], [200, 201, 202], budget)
    assert (tokens, forced) == ([200, 201], [0, 0])
    assert (completion.finish_reason, completion.stop_reason) == ("length", "thinking_budget")
    assert completion.thinking.stop_reason == "budget" and completion.answer == ""


def test_a_character_cut_by_the_budget_is_shown_as_broken_not_lost(tokenizer: PreTrainedTokenizerFast) -> None:
    """The cap falls between two bytes of a character: streaming shows no half, and the text is the tokenizer's."""
    euro, close, letter = (tokenizer.encode(text) for text in ("€", "</think>", "A"))
    assert len(euro) == 3
    prompt = tokenizer.encode("5<think>")
    model = Scripted([*euro, *letter, *letter], len(prompt), len(tokenizer))
    config = EngineConfig(thinking_format="deepseek-r1")
    llm = LLMEngine(model, tokenizer=tokenizer, config=config)
    budget = ThinkingBudget(max_tokens=2)
    params = SamplingParams(temperature=0, max_tokens=6, thinking=budget)
    llm.add_request("r", {"prompt_token_ids": prompt}, params, stream=True)
    texts = []
    while llm.has_unfinished_requests():
        texts += [output.outputs[0] for output in llm.step()]
    assert [o.text for o in texts[:2]] == ["", ""]
    assert all(later.text.startswith(sooner.text) for sooner, later in pairwise(texts))
    assert close[0] in texts[-1].token_ids
    assert texts[-1].text == tokenizer.decode(texts[-1].token_ids)
    assert texts[-1].thinking is not None and "\ufffd" in texts[-1].thinking.text + texts[-1].text


def test_a_held_stop_id_stops_a_truncated_request_too() -> None:
    budget = ThinkingBudget(max_tokens=3, on_budget="truncate", format=PIECES)
    _, _, completion = run([60, 61], [200, 201, 60, 62, 63], budget, stop_token_ids=[60])
    assert (completion.token_ids, completion.finish_reason, completion.stop_reason) == ([200, 201, 60], "stop", 60)


def test_a_late_stop_takes_back_what_was_decided_after_it() -> None:
    """The stop id 60 begins the end 60, 62, 63: by the time it is looked at the end is complete, and then it is cut."""
    _, _, completion = run([60, 61], [200, 60, 62, 63], ThinkingBudget(format=PIECES), stop_token_ids=[60])
    assert completion.token_ids == [200, 60]
    assert completion.thinking.events == [] and completion.thinking.stop_reason is None
    assert completion.thinking.num_tokens == 2 and completion.answer == ""
