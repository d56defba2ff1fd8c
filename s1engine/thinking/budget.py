"""How long a request may and must think: the numbers that steer the thinking state machine.

A budget says nothing about delimiters (see `formats.py`) and holds no state (see `machine.py`): it is frozen, hashable
and can be shared by any number of requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from s1engine.thinking.formats import INT32_MAX, ThinkingFormat, as_ids
from s1engine.thinking.text import encode

SCOPES = ("total", "segment")
ON_BUDGET = ("force_end", "truncate")


@dataclass(frozen=True)
class ThinkingBudget:
    """Limits on one request's thinking.

    Args:
        max_tokens: most thinking tokens, counted over `scope`; None for no limit.
        min_tokens: an end is ignored while the whole request has fewer thinking tokens than this.
        ignore_end: how many ends are ignored whatever the count.
        extensions: what replaces an ignored end, used in rotation: strings, or lists of token ids.
        scope: "total" counts `max_tokens` over the request; "segment" starts the count anew after each extension.
        grace_tokens: once `max_tokens - grace_tokens` are used, thinking closes where a line ends.
        on_budget: "force_end" writes the format's forced close when the budget is used up, "truncate" ends the request.
        min_answer_tokens: how many of the request's tokens the engine keeps for the answer, by lowering `max_tokens`.
        format: a name, a `ThinkingFormat`, or None for the engine's own.

    Raises:
        ValueError: naming the field, its value and what would be valid.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_end: int = 0
    extensions: Sequence[str | Sequence[int]] = ("Wait",)
    scope: Literal["total", "segment"] = "total"
    grace_tokens: int = 0
    on_budget: Literal["force_end", "truncate"] = "force_end"
    min_answer_tokens: int = 0
    format: str | ThinkingFormat | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            _check_count("max_tokens", self.max_tokens, "None or ")
        for name in ("min_tokens", "ignore_end", "grace_tokens", "min_answer_tokens"):
            _check_count(name, getattr(self, name))
        _check_choice("scope", self.scope, SCOPES)
        _check_choice("on_budget", self.on_budget, ON_BUDGET)
        object.__setattr__(self, "extensions", _as_extensions(self.extensions))
        if self.needs_extensions and not self.extensions:
            field = "ignore_end" if self.ignore_end else "min_tokens"
            raise ValueError(
                f"ThinkingBudget.extensions is empty although {field}={getattr(self, field)}: an ignored end needs at "
                f'least one extension to stand in its place, e.g. ("Wait",)'
            )
        if self.format is not None and not isinstance(self.format, str | ThinkingFormat):
            raise ValueError(
                f"ThinkingBudget.format={self.format!r} is not valid: give None, a format's name or a ThinkingFormat"
            )

    @property
    def needs_extensions(self) -> bool:
        """Whether any end can be ignored at all, and so an extension be written."""
        return self.ignore_end > 0 or self.min_tokens > 0


def resolve_extensions(budget: ThinkingBudget, tokenizer: Any = None) -> tuple[tuple[int, ...], ...]:
    """The budget's extensions as token ids; empty where the budget never ignores an end.

    Leaving out extensions that cannot be used lets all plain caps share one compiled program.

    Args:
        budget: its strings are encoded, its id lists taken as they are.
        tokenizer: a Hugging Face tokenizer; needed for strings only.

    Raises:
        ValueError: for a string without a tokenizer, or one that encodes to nothing.
    """
    if not budget.needs_extensions:
        return ()
    resolved = []
    for extension in budget.extensions:
        if isinstance(extension, str):
            if tokenizer is None:
                raise ValueError(
                    f"ThinkingBudget.extensions holds the string {extension!r}, which needs a tokenizer: "
                    "without one, give lists of token ids"
                )
            resolved.append(encode(tokenizer, extension, "ThinkingBudget.extensions"))
        else:
            resolved.append(tuple(extension))
    return tuple(resolved)


def _check_count(name: str, value: Any, also: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= INT32_MAX:
        raise ValueError(f"ThinkingBudget.{name}={value!r} is not valid: give {also}an integer from 0 to {INT32_MAX}")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"ThinkingBudget.{name}={value!r} is not valid: give one of {', '.join(map(repr, choices))}")


def _as_extensions(extensions: Any) -> tuple[str | tuple[int, ...], ...]:
    valid = "give a sequence whose items are each a non-empty string or a non-empty list of token ids"
    if isinstance(extensions, str) or not isinstance(extensions, Iterable):
        raise ValueError(f"ThinkingBudget.extensions={extensions!r} is not valid: {valid}")
    checked: list[str | tuple[int, ...]] = []
    for extension in extensions:
        if not isinstance(extension, str):
            if not isinstance(extension, Iterable):
                raise ValueError(f"ThinkingBudget.extensions holds {extension!r}: {valid}")
            extension = as_ids(extension, "ThinkingBudget.extensions")
        if not extension:
            raise ValueError(f"ThinkingBudget.extensions holds an empty item: {valid}")
        checked.append(extension)
    return tuple(checked)
