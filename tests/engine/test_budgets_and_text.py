"""Budgets together with what works on text: stop strings and streaming."""

from itertools import pairwise
from typing import Any

import pytest
from scripted import Scripted
from transformers import PreTrainedTokenizerFast

from s1engine import SamplingParams, ThinkingBudget
from s1engine.config import EngineConfig
from s1engine.engine.llm_engine import LLMEngine
from s1engine.thinking import ThinkingFormat, Trigger


@pytest.fixture
def spelled(tokenizer: PreTrainedTokenizerFast) -> ThinkingFormat:
    """`<end>` spelled in ordinary tokens: an end of several tokens, which a rewind takes back."""
    end = tuple(tokenizer.encode("<end>"))
    assert len(end) > 2
    return ThinkingFormat(
        start=tokenizer.encode("<think>"),
        triggers=[Trigger(end, end)],
        forced_close=[*end, *tokenizer.encode("\nFinal Answer:")],
        separator=tokenizer.encode("\n"),
        newline_ids=tokenizer.encode("\n"),
    )


def stream(
    tokenizer: PreTrainedTokenizerFast, fmt: ThinkingFormat, script: str, budget: dict[str, Any], **params: Any
) -> list[Any]:
    """Every completion that a streaming request shows."""
    prompt = tokenizer.encode("so <think>")
    ids = tokenizer.encode(script)
    model = Scripted(ids, len(prompt), len(tokenizer))
    llm = LLMEngine(model, tokenizer=tokenizer, config=EngineConfig(thinking_format=fmt))
    thinking = ThinkingBudget(**budget, format=fmt)
    sampling = SamplingParams(temperature=0, thinking=thinking, **{"max_tokens": len(ids)} | params)
    llm.add_request("r", {"prompt_token_ids": prompt}, sampling, stream=True)
    shown = []
    while llm.has_unfinished_requests():
        shown += [output.outputs[0] for output in llm.step()]
    return shown


def test_a_stream_never_shows_what_is_taken_back(tokenizer: PreTrainedTokenizerFast, spelled: ThinkingFormat) -> None:
    script = "one <e two <end> three <end> four"
    shown = stream(tokenizer, spelled, script, {"ignore_end": 1, "extensions": ("Wait",)})
    for sooner, later in pairwise(shown):
        assert later.text.startswith(sooner.text)
        assert later.token_ids[: len(sooner.token_ids)] == sooner.token_ids
        assert len(sooner.token_ids) == len(sooner.forced_mask) == len(sooner.banned_mask)
    assert "<e two" in shown[-1].text and "Wait" in shown[-1].text
    assert not any(completion.text.endswith("<end") for completion in shown)


def test_a_stop_string_in_an_ignored_end_does_not_stop(
    tokenizer: PreTrainedTokenizerFast, spelled: ThinkingFormat
) -> None:
    """`<en` is in the ignored end, which never stood there, and in the one that is taken."""
    budget = {"ignore_end": 1, "extensions": ("Wait",)}
    final = stream(tokenizer, spelled, "one <end> two three <end> four", budget, stop=["<en"])[-1]
    assert (final.finish_reason, final.stop_reason) == ("stop", "<en")
    assert final.thinking.num_extensions == 1
    assert final.text.startswith("one Wait") and final.text.count("<") == 0


def test_forced_text_never_stops(tokenizer: PreTrainedTokenizerFast, spelled: ThinkingFormat) -> None:
    """The forced close holds "Final", and so does what the model says later: only that one stops."""
    final = stream(tokenizer, spelled, "one two three " + "x" * 30 + " Final words", {"max_tokens": 3}, stop=["Final"])[
        -1
    ]
    assert (final.finish_reason, final.stop_reason) == ("stop", "Final")
    assert final.text.count("Final") == 1, "the forced one is shown, the sampled one is cut"
    assert final.thinking.stop_reason == "budget"
    assert final.answer and "Final" not in final.answer


def test_a_stop_string_that_begins_in_forced_text_does_not_stop(
    tokenizer: PreTrainedTokenizerFast, spelled: ThinkingFormat
) -> None:
    script = "one two three four five six seven eight nine ten eleven"
    free = stream(tokenizer, spelled, script, {"max_tokens": 3})[-1]
    border = free.forced_mask.index(True) + sum(free.forced_mask)
    sampled = tokenizer.decode(free.token_ids[border : border + 2])
    stopped = stream(tokenizer, spelled, script, {"max_tokens": 3}, stop=["Answer:" + sampled])[-1]
    assert stopped.text == free.text
    stopped = stream(tokenizer, spelled, script, {"max_tokens": 3}, stop=[sampled])[-1]
    assert stopped.text == free.text[: free.text.rindex("Answer:") + len("Answer:")]


def test_thinking_and_answer_are_the_parts_of_the_text(
    tokenizer: PreTrainedTokenizerFast, spelled: ThinkingFormat
) -> None:
    natural = stream(tokenizer, spelled, "one two <end> the answer is 42", {})[-1]
    assert natural.thinking.text == "one two " and natural.answer == " the answer is 42"
    forced = stream(tokenizer, spelled, "one two three and the answer is 42 so it is", {"max_tokens": 3})[-1]
    assert forced.text == forced.thinking.text + "\n<end>\nFinal Answer:" + forced.answer
    assert [event.kind for event in forced.thinking.events] == ["budget"]
    open_end = stream(tokenizer, spelled, "one two three", {})[-1]
    assert open_end.thinking.text == "one two three" and open_end.answer == ""
    assert open_end.thinking.stop_reason is None and open_end.finish_reason == "length"


def test_a_stream_never_shows_the_beginning_of_a_stop_string(
    tokenizer: PreTrainedTokenizerFast, spelled: ThinkingFormat
) -> None:
    for stop in ("END", "o END"):
        shown = stream(tokenizer, spelled, "Hello ENo Hello END more", {}, stop=[stop])
        assert all(later.text.startswith(sooner.text) for sooner, later in pairwise(shown))
        assert shown[-1].stop_reason == stop
        assert shown[-1].text == "Hello ENo Hello END"[: "Hello ENo Hello END".index(stop)]
        assert any(completion.text.endswith("ENo") or "ENo" in completion.text for completion in shown[:-1])


def test_streamed_logprobs_have_their_tokens_text(tokenizer: PreTrainedTokenizerFast, spelled: ThinkingFormat) -> None:
    for completion in stream(tokenizer, spelled, "one two three", {}, logprobs=1):
        assert all(e.decoded_token is not None for entry in completion.logprobs for e in entry.values())
