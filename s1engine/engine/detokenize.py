"""Token ids to text, a token at a time, never half a character."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Enough prompt for a tokenizer that decodes a first token differently (a leading space, say) to see that it is not.
PROMPT_TAIL = 6
REPLACEMENT = "\ufffd"


def decode(tokenizer: Any, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
    """Text of `token_ids`, as the tokenizer has it."""
    return tokenizer.decode(
        list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )


def decode_after(tokenizer: Any, before: Sequence[int], token_ids: Sequence[int], skip_special_tokens: bool) -> str:
    """Text that `token_ids` adds when it follows `before`."""
    tail = list(before[-PROMPT_TAIL:])
    prefix = decode(tokenizer, tail, skip_special_tokens)
    return decode(tokenizer, tail + list(token_ids), skip_special_tokens)[len(prefix) :]


class Detokenizer:
    """Grows `text` as tokens come. `ends[i]` is the length of the text once token i was pushed.

    A token that ends inside a character adds nothing until the character is complete; `flush` gives up waiting. Each
    push decodes only the tokens since the last complete character and the few before them: O(1) a token.
    """

    def __init__(self, tokenizer: Any, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self.text = ""
        self.ends: list[int] = []
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._shown = list(prompt_token_ids[-PROMPT_TAIL:])  # decoded context of what comes
        self._pending: list[int] = []
        self._shown_text = decode(tokenizer, self._shown, skip_special_tokens)

    def push(self, token: int) -> None:
        self._pending.append(token)
        text = decode(self._tokenizer, self._shown + self._pending, self._skip_special)
        if not text.endswith(REPLACEMENT):
            self._show(text)
        self.ends.append(len(self.text))

    def flush(self) -> None:
        """Show an unfinished character as the tokenizer shows it."""
        if self._pending:
            self._show(decode(self._tokenizer, self._shown + self._pending, self._skip_special))
            if self.ends:
                self.ends[-1] = len(self.text)

    def _show(self, text: str) -> None:
        self.text += text[len(self._shown_text) :]
        self._shown, self._pending = self._pending, []
        self._shown_text = decode(self._tokenizer, self._shown, self._skip_special)

    def cut(self, length: int) -> None:
        """Drop the text from `length` on; nothing follows."""
        self.text = self.text[:length]
        self.ends = [min(end, length) for end in self.ends]
        self._pending = []
