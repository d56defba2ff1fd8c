"""Formats from ids, from strings and by name; with a small tokenizer made here, and with two real ones where given."""

import dataclasses
import logging
from typing import Any

import pytest
from conditions import data_folder
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from s1engine.thinking import (
    ThinkingBudget,
    ThinkingFormat,
    Trigger,
    resolve_extensions,
    resolve_format,
    simulate,
    split_thinking,
)
from s1engine.thinking.program import compile_program
from s1engine.thinking.text import vocabulary

IDS: dict[str, Any] = {
    "start": [1],
    "triggers": [Trigger([2, 3], [4])],
    "forced_close": [4, 5],
    "separator": [],
    "newline_ids": [],
    "eos_ids": [],
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": []}, r"ThinkingFormat\.start is empty"),
        ({"forced_close": []}, r"ThinkingFormat\.forced_close is empty"),
        ({"triggers": []}, r"ThinkingFormat\.triggers is empty"),
        ({"triggers": [[2, 3]]}, r"ThinkingFormat\.triggers\[0\]=\[2, 3\] .*give a Trigger"),
        ({"triggers": [Trigger([], [4])]}, r"triggers\[0\]\.tokens is empty"),
        ({"triggers": [Trigger([2], [])]}, r"triggers\[0\]\.close is empty"),
        ({"triggers": [Trigger([2], [4]), Trigger([2], [5])]}, r"triggers\[1\]\.tokens=\[2\] is there twice"),
        ({"triggers": [Trigger([1], [1]), Trigger([2, 3], [2])]}, r"triggers\[1\]\.close=\[2\] is a proper prefix"),
        ({"separator": "\n"}, r"ThinkingFormat\.separator='\\n' .*list of token ids"),
        ({"eos_ids": [-1]}, r"ThinkingFormat\.eos_ids holds -1"),
        ({"eos_ids": 2}, r"ThinkingFormat\.eos_ids=2"),
        ({"newline_ids": [1.5]}, r"ThinkingFormat\.newline_ids holds 1\.5"),
        ({"start": [True]}, r"ThinkingFormat\.start holds True"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ThinkingFormat(**{**IDS, **changes})


def test_formats_are_values() -> None:
    format = ThinkingFormat(**IDS)
    assert format == ThinkingFormat(**{**IDS, "start": (1,), "triggers": (Trigger((2, 3), (4,)),)})
    assert len({format, dataclasses.replace(format)}) == 1
    assert Trigger([2, 3], [4]).tokens == (2, 3)


def small_tokenizer(added: list[str], eos: str | None = "<eos>") -> PreTrainedTokenizerFast:
    """Byte-level BPE with the merges that matter here: `</think>` is three tokens alone, others beside its edges."""
    merges = ["< /", "t h", "th i", "thi n", "thin k", "Ċ Ċ", "> Ċ", "> ĊĊ", ". </", "W a", "Wa i", "Wai t"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(merge.replace(" ", "") for merge in merges)]
    tokenizer = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [tuple(merge.split()) for merge in merges])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = [*added, *([eos] if eos else [])]
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)


def ids_of(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def test_auto_prefers_think(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = small_tokenizer(["<think>", "</think>", "<|im_start|>"])
    with caplog.at_level(logging.INFO):
        format = resolve_format("auto", tokenizer)
    assert "picked 'qwen3'" in caplog.text
    think, end, eos = (tokenizer.convert_tokens_to_ids(name) for name in ("<think>", "</think>", "<eos>"))
    assert format.start == (think,)
    assert format.triggers == (Trigger([end], [end]), Trigger([eos], [end]))
    assert tokenizer.decode(format.forced_close) == "</think>\n\nFinal Answer:"
    assert (format.separator, format.eos_ids) == (ids_of(tokenizer, "\n"), (eos,))
    assert resolve_format(format) is format


def test_auto_takes_s1_for_chat_tokens_alone(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = small_tokenizer(["<|im_start|>", "<|im_end|>"])
    with caplog.at_level(logging.INFO):
        format = resolve_format("auto", tokenizer)
    assert "picked 's1'" in caplog.text
    answer = ids_of(tokenizer, "<|im_start|>answer")
    starts, ends, eos = (tokenizer.convert_tokens_to_ids(name) for name in ("<|im_start|>", "<|im_end|>", "<eos>"))
    assert format.triggers == (Trigger([starts], answer), Trigger([ends], answer), Trigger([eos], answer))
    assert tokenizer.decode(format.forced_close) == "<|im_start|>answer\nFinal Answer:"


def test_auto_fits_or_fails() -> None:
    with pytest.raises(ValueError, match=r'"auto" fits no tokenizer without <think>'):
        resolve_format("auto", small_tokenizer([]))
    with pytest.raises(ValueError, match=r"'s2' is not known: give one of 'auto', 's1', 'deepseek-r1', 'qwen3'"):
        resolve_format("s2", small_tokenizer([]))


def test_all_eos_ids_end_thinking() -> None:
    tokenizer = small_tokenizer(["<think>", "</think>", "<stop>"])
    stop, eos = tokenizer.convert_tokens_to_ids("<stop>"), tokenizer.eos_token_id
    format = resolve_format("auto", tokenizer, eos_ids=[eos, stop])
    assert [trigger.tokens for trigger in format.triggers[1:]] == [(eos,), (stop,)]
    assert resolve_format("qwen3", small_tokenizer(["<think>", "</think>"], eos=None)).eos_ids == ()


def test_newline_ids_are_all_tokens_that_end_a_line() -> None:
    tokenizer = small_tokenizer([])
    assert {tokenizer.decode([i]) for i in vocabulary(tokenizer).newline_ids} == {"\n", "\n\n", ">\n", ">\n\n"}


@pytest.mark.parametrize(
    ("text", "thought"),
    [("a.</think>\n\nb", "a"), ("a</think>b", "a"), ("a.</think>b", "a"), ("a\n</think>\nb", "a\n")],
)
def test_ordinary_tokens_end_thinking_in_each_spelling(text: str, thought: str) -> None:
    """The tokenizer merges `.</` and `>` with line breaks; the machine must see the end all the same."""
    tokenizer = small_tokenizer([])
    format = resolve_format("deepseek-r1", tokenizer)
    assert format.triggers[0] == Trigger(ids_of(tokenizer, "</think>"), ids_of(tokenizer, "</think>"))
    prompt, output = ids_of(tokenizer, "<think>"), ids_of(tokenizer, text)
    trace = simulate(format, ThinkingBudget(), prompt, output)
    assert (trace.output, trace.phase, trace.stop_reason) == (list(output), "answer", "natural")
    ((start, end),) = split_thinking(format, prompt, output).thinking
    assert tokenizer.decode(output[start:end]) == thought
    ignored = simulate(format, ThinkingBudget(ignore_end=1, extensions=[[7]]), prompt, output)
    assert tokenizer.decode(ignored.output[:end]) == thought
    assert ignored.output[end] == 7


def test_a_spelling_goes_on_with_the_rest_of_its_close() -> None:
    tokenizer = small_tokenizer([])
    format = ThinkingFormat.from_strings(
        tokenizer, start="<think>", triggers=[("</think>", "</think><a>"), ("##", "<a>")], forced_close="<a>"
    )
    spelled = ids_of(tokenizer, ".</think>\n\n")
    assert format.trigger_of[spelled].close == (*spelled, *ids_of(tokenizer, "<a>"))
    compile_program(format)


def test_from_strings_refuses() -> None:
    tokenizer = small_tokenizer([])
    fields: dict[str, Any] = {"start": "<a>", "triggers": [("</a>", "</a>")], "forced_close": "</a>"}
    for change, message in [
        ({"start": ""}, "start='' .*no token"),
        ({"triggers": []}, "triggers is empty"),
        ({"triggers": [("", "x")]}, r"triggers\[0\]='' .*no token"),
        ({"forced_close": [1]}, r"forced_close=\[1\] .*give a string"),
    ]:
        with pytest.raises(ValueError, match=message):
            ThinkingFormat.from_strings(tokenizer, **{**fields, **change})
    assert ThinkingFormat.from_strings(tokenizer, **fields, separator="").separator == ()


@pytest.fixture(scope="module")
def real_tokenizers() -> dict[str, Any]:
    paths = (data_folder() / "tokenizers").iterdir()
    return {path.name: AutoTokenizer.from_pretrained(path) for path in paths if path.is_dir()}


def test_s1_on_qwen2(real_tokenizers: dict[str, Any]) -> None:
    """The ids of the s1 authors' evaluation: `Wait` is one token, the forced close six and a line break."""
    tokenizer = real_tokenizers["qwen2"]
    format = resolve_format("auto", tokenizer)
    assert format.start == (151644, 26865)
    assert format.triggers == (Trigger([151644], [151644, 9217]), Trigger([151645], [151644, 9217]))
    assert format.forced_close == (151644, 9217, 198, 19357, 21806, 25)
    assert (format.separator, format.eos_ids) == ((198,), (151645,))
    assert resolve_extensions(ThinkingBudget(ignore_end=1), tokenizer) == ((14190,),)


def test_deepseek_r1(real_tokenizers: dict[str, Any]) -> None:
    format = resolve_format("auto", real_tokenizers["deepseek-r1-distill-qwen"])
    assert format.start == (151648,)
    assert format.triggers == (Trigger([151649], [151649]), Trigger([151643], [151649]))
    assert format.forced_close == (151649, 271, 19357, 21806, 25)
    assert (format.separator, format.eos_ids) == ((198,), (151643,))
    assert len(format.newline_ids) == 2178
    assert {198, 271, 382} <= format.newline_set


def test_think_tags_on_qwen2_are_ordinary_tokens(real_tokenizers: dict[str, Any]) -> None:
    tokenizer = real_tokenizers["qwen2"]
    format = resolve_format("deepseek-r1", tokenizer)
    assert format.start == (13708, 766, 29)
    assert format.triggers[0] == Trigger([522, 26865, 29], [522, 26865, 29])
    assert format.forced_close == (522, 26865, 1339, 19357, 21806, 25)
    for text in ["done.</think>\n\nThe", "x)\n</think>\n**A**", "\\]</think>\n", "so 4 </think> 4"]:
        trace = simulate(format, ThinkingBudget(), ids_of(tokenizer, "<think>"), ids_of(tokenizer, text))
        assert (trace.phase, trace.stop_reason) == ("answer", "natural"), text


def test_every_name_fits_a_program_on_real_tokenizers(real_tokenizers: dict[str, Any]) -> None:
    extensions = resolve_extensions(
        ThinkingBudget(ignore_end=1, extensions=["Wait", "Hmm", "Alternatively"]), real_tokenizers["qwen2"]
    )
    for tokenizer in real_tokenizers.values():
        for name in ("s1", "deepseek-r1", "qwen3"):
            compile_program(resolve_format(name, tokenizer), extensions)
