"""Delimiters as text: what the state machine needs of a tokenizer, and nothing else.

Tokenizers are Hugging Face's; nothing here imports transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary


def encode(tokenizer: Any, text: str, field: str) -> tuple[int, ...]:
    """The ids of `text` alone, without the tokens that a tokenizer puts around a document.

    Text that the tokenizer holds as a special or added token becomes that token, any other its ordinary tokens.

    Raises:
        ValueError: naming `field`, for what is not a string and where no token comes out.
    """
    if not isinstance(text, str):
        raise ValueError(f"{field}={text!r} is not valid: give a string")
    ids = tuple(int(token) for token in tokenizer.encode(text, add_special_tokens=False))
    if not ids:
        raise ValueError(f"{field}={text!r} is not valid: the tokenizer makes no token of it")
    return ids


def holds(tokenizer: Any, text: str) -> bool:
    """Whether `text` is one of the tokenizer's special or added tokens."""
    return text in tokenizer.get_added_vocab() or text in tokenizer.all_special_tokens


@dataclass(frozen=True)
class Vocabulary:
    """The text of every token, and what follows from it.

    Args:
        texts: by id, special and added tokens included; a token that is part of a character decodes to U+FFFD.
        added: ids of special and added tokens.
    """

    texts: dict[int, str]
    added: frozenset[int]

    @cached_property
    def newline_ids(self) -> tuple[int, ...]:
        """All ids whose text ends a line, ascending: not only "\\n" but ".\\n\\n" and, with Qwen's, 2176 more."""
        return tuple(sorted(token for token, text in self.texts.items() if text.endswith("\n")))

    def spellings(self, ids: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Other ways in which a text writes a delimiter of several ordinary tokens.

        A tokenizer merges over the delimiter's edges: for Qwen2.5 `</think>` is `</` `think` `>` alone, but `.</`
        `think` `>\\n\\n` after a full stop and before an empty line. Given are all combinations of tokens that end with
        the first one's text, and tokens that are the last one's text and whitespace. A last token that goes on with
        other text is not among them, since the answer would lose it. An edge that is a special or added token is never
        merged.
        """
        if len(ids) < 2:
            return []
        first, last = self.texts[ids[0]], self.texts[ids[-1]]
        firsts, lasts = [ids[0]], [ids[-1]]
        for token, text in self.texts.items():
            if token in self.added:
                continue
            if ids[0] not in self.added and text.endswith(first):
                firsts.append(token)
            if ids[-1] not in self.added and text.startswith(last) and not text[len(last) :].strip():
                lasts.append(token)
        edges = product(sorted(set(firsts)), sorted(set(lasts)))
        return [(a, *ids[1:-1], b) for a, b in edges if (a, b) != (ids[0], ids[-1])]


_vocabularies: WeakKeyDictionary[Any, Vocabulary] = WeakKeyDictionary()


def vocabulary(tokenizer: Any) -> Vocabulary:
    """The tokenizer's vocabulary, decoded once (half a second for 150 thousand tokens) and kept as long as it lives."""
    found = _vocabularies.get(tokenizer)
    if found is None:
        added = {int(token) for token in tokenizer.get_added_vocab().values()} | set(tokenizer.all_special_ids)
        ids = sorted({*tokenizer.get_vocab().values(), *added})
        texts = {
            token: str(tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))
            for token in ids
        }
        found = _vocabularies[tokenizer] = Vocabulary(texts, frozenset(added))
    return found
