"""From a row to a prompt, which gets no loss, and the completion that the model should write after it.

"s1" is the text that the authors of s1 trained on (`data/tokenization.py` in simplescaling/s1), in Qwen2.5's chat form,
the first two lines being the prompt:

    <|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n
    <|im_start|>user\\n{question}<|im_end|>\\n<|im_start|>assistant\\n
    <|im_start|>think\\n{thinking}\\n<|im_start|>answer\\n{Answer: }{attempt}<|im_end|>\\n

Training writes `think\\n`. Inference, the authors' and ours, ends the prompt in `<|im_start|>think` without a newline:
the model has learned to write it. All of the completion is learned, the newline after the last <|im_end|> included: so
did TRL's `DataCollatorForCompletionOnlyLM`, with which s1 was trained, which masks what stands up to the end of
"<|im_start|>assistant\\n" and nothing after it.

"chat" is the tokenizer's own chat template. Where that marks what the assistant writes ({% generation %}), all its
turns are learned; otherwise the last one alone, behind exactly the prompt that inference would render.

Prompt and completion are encoded apart, since at inference the completion follows the prompt's ids.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from s1engine.train.rows import Columns, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
S1_PROMPT = (
    f"{IM_START}system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.{IM_END}\n"
    f"{IM_START}user\n{{question}}{IM_END}\n{IM_START}assistant\n"
)
S1_COMPLETION = f"{IM_START}think\n{{thinking}}\n{IM_START}answer\n{{answer}}{IM_END}\n"

GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
STAND_IN = "@@words of the assistant@@"

Message = dict[str, Any]


@dataclass(frozen=True)
class Encoded:
    """`token_ids` int32 [n]; `learned` bool [n]: the tokens that get a loss."""

    token_ids: np.ndarray
    learned: np.ndarray


def s1_texts(question: str, thinking: str, attempt: str) -> tuple[str, str]:
    """Prompt and completion of the s1 text, with the authors' stripping of blanks."""
    answer = attempt if "Answer:" in attempt else "Answer: " + attempt
    return (
        S1_PROMPT.format(question=question),
        S1_COMPLETION.format(thinking=thinking.strip(), answer=answer.strip()),
    )


class S1Template:
    """Template "s1", for tokenizers with Qwen2.5's chat tokens. Raises ValueError for others."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, columns: Columns) -> None:
        ids = {token: tokenizer.encode(token, add_special_tokens=False) for token in (IM_START, IM_END)}
        if lacking := [token for token, encoded in ids.items() if len(encoded) != 1]:
            raise ValueError(
                f"template 's1': the tokenizer has no token {' and no token '.join(lacking)} (it splits the text); "
                f"use a tokenizer of Qwen2.5's kind, or template 'chat'"
            )
        self.tokenizer, self.columns = tokenizer, columns
        self.end_of_turn = IM_END

    def render(self, row: Row) -> tuple[str, str]:
        """Prompt and completion."""
        texts = []
        for field in ("question", "thinking", "attempt"):
            column = _required(self.columns, field, row)
            texts.append(row.text(column))
            _refuse(row, column, texts[-1], (IM_START, IM_END))
        return s1_texts(*texts)

    def encode(self, rendered: Sequence[tuple[str, str]]) -> list[Encoded]:
        return _encode_apart(self.tokenizer, rendered)


class ChatTemplate:
    """Template "chat", by the tokenizer's own. Raises ValueError for a tokenizer without one.

    A row is a conversation (`messages`), or a question and an attempt; where thinking stands in a column of its own it
    goes before the attempt as `<think>\\n{thinking}\\n</think>\\n\\n`, the form of DeepSeek-R1 and Qwen3.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, columns: Columns) -> None:
        if not isinstance(tokenizer.chat_template, str):
            raise ValueError("template 'chat': the tokenizer has no chat template; use one that has, or template 's1'")
        if tokenizer.eos_token is None:
            raise ValueError("template 'chat': the tokenizer names no eos_token, so no end of turn can be learned")
        self.tokenizer, self.columns = tokenizer, columns
        self.end_of_turn = str(tokenizer.eos_token)
        self.marked = GENERATION_MARKER.search(tokenizer.chat_template) is not None

    def render(self, row: Row) -> tuple[list[Message], tuple[str, str]]:
        """The conversation; prompt and completion, both empty where the template marks the assistant's words."""
        named = self.columns.question or self.columns.attempt
        column = None if named else self.columns.resolve("messages", row)
        if column is None:
            return self._render(row, self._question_and_answer(row), "")
        messages = row.messages(column)
        for message in messages:
            _refuse(row, column, message["content"], (self.end_of_turn,))
        return self._render(row, messages, column)

    def _question_and_answer(self, row: Row) -> list[Message]:
        question, attempt = (_required(self.columns, field, row) for field in ("question", "attempt"))
        answer, thinking = row.text(attempt), self.columns.resolve("thinking", row)
        if thinking is not None:
            answer = f"<think>\n{row.text(thinking).strip()}\n</think>\n\n{answer.strip()}"
        messages = [{"role": "user", "content": row.text(question)}, {"role": "assistant", "content": answer}]
        for column, message in zip((question, attempt), messages, strict=True):
            _refuse(row, column, message["content"], (self.end_of_turn,))
        return messages

    def _render(self, row: Row, messages: list[Message], column: str) -> tuple[list[Message], tuple[str, str]]:
        from jinja2 import TemplateError

        try:
            if self.marked:
                self._text(messages)  # here, where an error still has its row
                return messages, ("", "")
            return messages, self._texts(messages)
        except (TemplateError, ValueError) as error:
            where = f"{row.place}, {column}" if column else row.place
            raise ValueError(f"{where}: the chat template refuses it: {error}") from None

    def _text(self, messages: list[Message], prompt: bool = False) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))

    def _texts(self, messages: list[Message]) -> tuple[str, str]:
        """The prompt that inference would render, and what the model has to write after it for the last message."""
        *before, last = messages
        prompt, whole, answer = self._text(before, prompt=True), self._text(messages), last["content"]
        completion = whole.removeprefix(prompt)
        if whole.startswith(prompt) and _squeezed(answer) in _squeezed(completion):
            return prompt, completion
        # Some templates open the thinking in the prompt and drop it from answers that are past (DeepSeek-R1). What the
        # model writes is then the answer as it stands, without the opening, and the ending that every answer gets.
        header, found, ending = self._text([*before, {**last, "content": STAND_IN}]).rpartition(STAND_IN)
        opening = prompt.removeprefix(header)
        if not found or not prompt.startswith(header):
            raise ValueError("what it renders for the prompt is not the beginning of what it renders for the answer")
        if not answer.startswith(opening):
            raise ValueError(f"its prompt ends in {opening!r}, with which the answer must begin")
        return prompt, answer.removeprefix(opening) + ending

    def encode(self, rendered: Sequence[tuple[list[Message], tuple[str, str]]]) -> list[Encoded]:
        if not self.marked:
            return _encode_apart(self.tokenizer, [texts for _, texts in rendered])
        encoded: Any = self.tokenizer.apply_chat_template(
            [messages for messages, _ in rendered],
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False},
        )
        return [
            Encoded(np.array(ids, np.int32), np.array(mask, bool))
            for ids, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        ]


def learns_to_stop(encoded: Encoded, end_of_turn: int) -> bool:
    """Whether the last run of learned tokens has the id `end_of_turn` in it. A model without it would never stop."""
    learned = np.flatnonzero(encoded.learned)
    if learned.size == 0:
        return False
    breaks = np.flatnonzero(np.diff(learned) != 1)
    last = learned[breaks[-1] + 1 if breaks.size else 0 :]
    return bool((encoded.token_ids[last] == end_of_turn).any())


def _encode_apart(tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, str]]) -> list[Encoded]:
    flat = [text for pair in texts for text in pair]
    # verbose: a sample longer than `model_max_length` is no news here, `max_tokens` decides.
    ids = tokenizer(flat, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    encoded = []
    for prompt, completion in zip(ids[::2], ids[1::2], strict=True):
        learned = np.ones(len(prompt) + len(completion), bool)
        learned[: len(prompt)] = False
        encoded.append(Encoded(np.array(prompt + completion, np.int32), learned))
    return encoded


def _required(columns: Columns, field: str, row: Row) -> str:
    column = columns.resolve(field, row)
    if column is None:
        raise ValueError(
            f"{row.place}: no column for the {field} among {', '.join(row.cells) or 'none'}; name it by columns.{field}"
        )
    return column


def _refuse(row: Row, column: str, text: str, tokens: Sequence[str]) -> None:
    """A control token in the middle of a text would end the turn there, or open another."""
    for token in tokens:
        if token in text:
            raise row.error(column, f"the text contains the control token {token}; take it out, or remove the row")


def _squeezed(text: str) -> str:
    return "".join(text.split())
