"""Incremental text equals the tokenizer's own, and no push ever shows half a character."""

import json
from typing import Any

import pytest
from conditions import data_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from s1engine.engine.detokenize import Detokenizer, decode, decode_after

TEXTS = [
    "plain words.\n",
    "数学の問題 🙂🙃 Ωμέγα",
    "a\ufffdb",
    "<think>so</think> 42<|im_end|>",
    " leading",
    "\n\nWait",
]


def check(tokenizer: Any, prompt: list[int], ids: list[int], skip: bool) -> None:
    text = Detokenizer(tokenizer, prompt, skip)
    shown = ""
    for token in ids:
        text.push(token)
        assert text.text.startswith(shown)
        shown = text.text
    text.flush()
    assert text.text == decode(tokenizer, prompt + ids, skip)[len(decode(tokenizer, prompt, skip)) :]
    assert text.text == decode_after(tokenizer, prompt, ids, skip)
    assert len(text.ends) == len(ids)
    if ids:
        assert text.ends[-1] == len(text.text)
        assert text.ends == sorted(text.ends)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("text", TEXTS)
def test_text_of_known_strings(tokenizer: PreTrainedTokenizerFast, text: str, skip: bool) -> None:
    check(tokenizer, tokenizer.encode("The answer is"), tokenizer.encode(text), skip)


def test_half_a_character_is_held_back(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.encode("🙂")
    assert len(ids) > 1, "the test needs a character of several tokens"
    text = Detokenizer(tokenizer, [], True)
    for token in ids[:-1]:
        text.push(token)
        assert text.text == ""
    text.push(ids[-1])
    assert text.text == "🙂"


def test_broken_bytes_do_not_pile_up(tokenizer: PreTrainedTokenizerFast) -> None:
    """Continuation bytes without a beginning are shown as broken after a while, and text goes on after them."""
    lone, smile = tokenizer.encode("🙂")[-1], tokenizer.encode("🙂")
    ids = [lone] * 100 + smile + [lone] * 50 + smile
    text = Detokenizer(tokenizer, [], True)
    for count, token in enumerate(ids, 1):
        text.push(token)
        assert len(text.text) >= min(count, 100) - 40
        assert len(text._window) <= 40
    text.flush()
    assert text.text == decode(tokenizer, ids, True)
    assert text.text.count("🙂") == 2


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_tokens(tokenizer: PreTrainedTokenizerFast, data: st.DataObject) -> None:
    """Random ids are mostly broken UTF-8: what is shown never changes, and ends as the tokenizer has it."""
    token = st.integers(0, len(tokenizer) - 1)
    ids = data.draw(st.lists(token, max_size=40))
    text = Detokenizer(tokenizer, [], False)
    shown = ""
    for i in ids:
        text.push(i)
        assert text.text.startswith(shown)
        shown = text.text
    text.flush()
    assert text.text.startswith(shown)
    assert text.text == decode(tokenizer, ids, False)


@pytest.mark.parametrize("name", ["qwen2", "deepseek-r1-distill-qwen"])
def test_real_tokenizers(name: str) -> None:
    folder = data_folder() / "tokenizers" / name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for line in (folder / "vectors.jsonl").read_text().splitlines():
        row = json.loads(line)
        for skip in (False, True):
            check(tokenizer, row["ids"][:3], row["ids"][3:][:400], skip)
