"""How a model marks its thinking: the delimiters, as token ids.

A `ThinkingFormat` is what the state machine knows of a model's language. It is built from ids, from strings with a
tokenizer (`ThinkingFormat.from_strings`), or by name (`named_formats.resolve_format`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from s1engine.thinking.text import encode, vocabulary

INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Trigger:
    """A token sequence by which the model tries to end its thinking.

    Args:
        tokens: the sequence.
        close: what stands in its place where the end is accepted, e.g. `</think>` for an EOS.
        ignorable: whether a budget may ignore it; an opener of a tool call, for example, may not be.
    """

    tokens: Sequence[int]
    close: Sequence[int]
    ignorable: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", as_ids(self.tokens, "Trigger.tokens"))
        object.__setattr__(self, "close", as_ids(self.close, "Trigger.close"))
        object.__setattr__(self, "ignorable", bool(self.ignorable))


@dataclass(frozen=True)
class ThinkingFormat:
    """The delimiters of a model's thinking, as token ids. Lists are accepted and kept as tuples.

    Args:
        start: opens a thinking block, e.g. the ids of `<think>`.
        triggers: what ends it; where two complete at once the longest wins. The first one's close is written by a
            second forced close.
        forced_close: what the engine writes when the budget is used up, e.g. `</think>` and "Final Answer:".
        separator: goes before the forced close where the thinking does not end a line; may be empty.
        newline_ids: tokens that end a line.
        eos_ids: tokens that end the request outside thinking. In thinking an EOS is an end only where it is a trigger.

    Raises:
        ValueError: naming the field, for empty or negative ids, a repeated trigger, and a close that is a proper prefix
            of its trigger (taking the end would then have to leave a position without a token).
    """

    start: Sequence[int]
    triggers: Sequence[Trigger]
    forced_close: Sequence[int]
    separator: Sequence[int] = ()
    newline_ids: Sequence[int] = ()
    eos_ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        for name in ("start", "forced_close", "separator", "newline_ids", "eos_ids"):
            object.__setattr__(self, name, as_ids(getattr(self, name), f"ThinkingFormat.{name}"))
        for name in ("start", "forced_close"):
            if not getattr(self, name):
                raise ValueError(f"ThinkingFormat.{name} is empty: give at least one token id")
        object.__setattr__(self, "triggers", tuple(self.triggers))
        if not self.triggers:
            raise ValueError("ThinkingFormat.triggers is empty: give at least one Trigger, or thinking never ends")
        seen = set()
        for i, trigger in enumerate(self.triggers):
            _check_trigger(f"ThinkingFormat.triggers[{i}]", trigger)
            if trigger.tokens in seen:
                raise ValueError(f"ThinkingFormat.triggers[{i}].tokens={list(trigger.tokens)} is there twice")
            seen.add(trigger.tokens)

    @classmethod
    def from_strings(
        cls,
        tokenizer: Any,
        *,
        start: str,
        triggers: Sequence[tuple[str, str] | tuple[str, str, bool]],
        forced_close: str,
        separator: str = "\n",
        newline_ids: Sequence[int] | None = None,
        eos_ids: Sequence[int] | None = None,
    ) -> ThinkingFormat:
        """A format from the text of its delimiters.

        A delimiter that the tokenizer does not hold as a special or added token becomes the several ordinary tokens of
        its text, and a trigger of this kind is recognised in its other spellings too (`text.Vocabulary.spellings`: the
        tokenizer merges its edges with what stands beside it); those are taken as the model wrote them. The start
        marker has one spelling only, that of `start` alone: where a template writes a line break after it, and the two
        merge, give `start` with its line break.

        Args:
            tokenizer: a Hugging Face tokenizer.
            triggers: (text, natural close) or (text, natural close, ignorable).
            newline_ids: None for all tokens of the vocabulary that end a line.
            eos_ids: None for the tokenizer's own. Each that no trigger names becomes one, closed as the first is.

        Raises:
            ValueError: naming the field.
        """
        if not triggers:
            raise ValueError("triggers is empty: give at least one (text, natural close)")
        if eos_ids is None:
            eos_ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        found: dict[tuple[int, ...], Trigger] = {}
        spellings: dict[tuple[int, ...], Trigger] = {}
        for i, (text, close_text, *ignorable) in enumerate(triggers):
            tokens = encode(tokenizer, text, f"triggers[{i}]")
            close = encode(tokenizer, close_text, f"triggers[{i}].close")
            found[tokens] = Trigger(tokens, close, *ignorable)
            for spelling in vocabulary(tokenizer).spellings(tokens):
                written = common_prefix(tokens, close) == len(tokens)  # the trigger is, or begins, its own close
                kept_close = (*spelling, *close[len(tokens) :]) if written else close
                spellings[spelling] = Trigger(spelling, kept_close, *ignorable)
        for token in eos_ids:
            found.setdefault((token,), Trigger((token,), next(iter(found.values())).close))
        return cls(
            start=encode(tokenizer, start, "start"),
            triggers=[*found.values(), *(spellings[tokens] for tokens in spellings if tokens not in found)],
            forced_close=encode(tokenizer, forced_close, "forced_close"),
            separator=encode(tokenizer, separator, "separator") if separator else (),
            newline_ids=vocabulary(tokenizer).newline_ids if newline_ids is None else newline_ids,
            eos_ids=eos_ids,
        )

    @cached_property
    def newline_set(self) -> frozenset[int]:
        """`newline_ids` for looking up: a large vocabulary has thousands."""
        return frozenset(self.newline_ids)

    @cached_property
    def trigger_of(self) -> dict[tuple[int, ...], Trigger]:
        """The triggers by their tokens."""
        return {tuple(trigger.tokens): trigger for trigger in self.triggers}

    @cached_property
    def trigger_lengths(self) -> tuple[int, ...]:
        """The lengths that triggers have, the longest first."""
        return tuple(sorted({len(trigger.tokens) for trigger in self.triggers}, reverse=True))


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def as_ids(value: Any, field: str) -> tuple[int, ...]:
    """`value` as a tuple of token ids (0 to 2**31 - 1), or a ValueError that names `field`."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ValueError(f"{field}={value!r} is not valid: give a list of token ids")
    ids = tuple(value)
    for token in ids:
        if isinstance(token, bool) or not hasattr(token, "__index__") or not 0 <= int(token) <= INT32_MAX:
            raise ValueError(f"{field} holds {token!r}: a token id is an integer from 0 to {INT32_MAX}")
    return tuple(int(token) for token in ids)


def _check_trigger(field: str, trigger: Any) -> None:
    if not isinstance(trigger, Trigger):
        raise ValueError(f"{field}={trigger!r} is not valid: give a Trigger")
    for name in ("tokens", "close"):
        if not getattr(trigger, name):
            raise ValueError(f"{field}.{name} is empty: give at least one token id")
    common = common_prefix(trigger.tokens, trigger.close)
    if common == len(trigger.close) < len(trigger.tokens):
        raise ValueError(
            f"{field}.close={list(trigger.close)} is a proper prefix of its tokens {list(trigger.tokens)}: "
            "give a close that is the trigger itself, goes beyond it, or differs from it"
        )
