"""Compiles delimiters and extensions to a program row, and a budget and a prompt to the state row they start from.

A device holds one row of each per sequence slot, int32, at fixed addresses (`layout.py` has the layout). A program is
made once per distinct format, extensions, scope and `on_budget`, and never changes. All that changes is in the state,
the limits included, so that budgets which differ in numbers only share a program and a host may lower a limit between
two steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from s1engine.thinking.automata import TriggerAutomaton, advance, failures
from s1engine.thinking.budget import ThinkingBudget
from s1engine.thinking.formats import ThinkingFormat
from s1engine.thinking.layout import (
    LAYOUT_VERSION,
    PROGRAM_WIDTH,
    STATE_WIDTH,
    Ban,
    Header,
    Phase,
    State,
)
from s1engine.thinking.machine import marker_tail, opens_thinking

Row = npt.NDArray[np.int32]


@lru_cache(maxsize=256)
def compile_program(
    format: ThinkingFormat,
    extensions: tuple[tuple[int, ...], ...] = (),
    scope: str = "total",
    on_budget: str = "force_end",
) -> Row:
    """The program row of a format and a kind of budget.

    Args:
        extensions: token ids, as `resolve_extensions` gives them; empty where no end is ever ignored.
        scope, on_budget: of the `ThinkingBudget`.

    Returns:
        int32 [PROGRAM_WIDTH], read-only; the same array for the same arguments.

    Raises:
        ValueError: where it does not fit, with the size of each part.
    """
    parts = _Parts()
    parts.header(Header.VERSION, LAYOUT_VERSION)
    parts.header(Header.SEGMENT, int(scope == "segment"))
    parts.header(Header.TRUNCATE, int(on_budget == "truncate"))

    automaton = TriggerAutomaton.build(format.triggers)
    parts.add("triggers", list(automaton.symbols), Header.ALPHABET_AT, Header.ALPHABET_SIZE)
    parts.add("triggers", list(automaton.symbols.values()))
    parts.header(Header.SYMBOL_COUNT, len(automaton.transitions[0]))
    parts.add("triggers", [entry for node in automaton.transitions for entry in node], Header.TRIGGER_NEXT_AT)
    parts.add("triggers", automaton.depths, Header.TRIGGER_DEPTH_AT)
    records: list[int] = []
    for length, ignorable, common, rest in automaton.records:
        records += [length, int(ignorable), common, parts.add("triggers", rest), len(rest)]
    parts.add("triggers", records, Header.TRIGGERS_AT)

    parts.add_pattern("start", format.start, Header.START_AT, Header.START_SIZE)
    parts.header(Header.SEPARATOR_SIZE, len(format.separator))
    parts.add("separator", format.separator)
    parts.add_pattern("forced_close", format.forced_close, Header.FORCED_CLOSE_AT, Header.FORCED_CLOSE_SIZE)
    parts.add("separator", format.separator)
    parts.add_pattern("triggers[0].close", format.triggers[0].close, Header.SECOND_CLOSE_AT, Header.SECOND_CLOSE_SIZE)

    places = [number for extension in extensions for number in (parts.add("extensions", extension), len(extension))]
    parts.add("extensions", places, Header.EXTENSIONS_AT)
    parts.header(Header.EXTENSION_COUNT, len(extensions))

    pages, low_bytes = _newline_pages(format.newline_ids)
    parts.add("newline_ids", _pack(pages, 16), Header.NEWLINE_PAGES_AT)
    parts.header(Header.NEWLINE_PAGES, len(pages) - 1)
    parts.add("newline_ids", _pack(low_bytes, 8), Header.NEWLINE_BYTES_AT)
    parts.add("eos_ids", sorted(set(format.eos_ids)), Header.EOS_AT, Header.EOS_SIZE)
    single = sorted(trigger.tokens[0] for trigger in format.triggers if len(trigger.tokens) == 1 and trigger.ignorable)
    parts.add("triggers", single, Header.BANNED_TRIGGERS_AT, Header.BANNED_TRIGGERS_SIZE)
    return parts.build()


def initial_state(program: Row, format: ThinkingFormat, budget: ThinkingBudget, prompt_ids: Sequence[int]) -> Row:
    """The state row of a request that has sampled nothing yet.

    Looks at the end of the prompt only: at as many tokens as the start marker has, and the newlines before its end.

    Args:
        program: what `compile_program` made of the format and of this budget's extensions.

    Returns:
        int32 [STATE_WIDTH].

    Raises:
        ValueError: where the budget may ignore ends and the program has no extension.
    """
    if budget.needs_extensions and program[Header.EXTENSION_COUNT] == 0:
        raise ValueError(
            f"a budget with min_tokens={budget.min_tokens} and ignore_end={budget.ignore_end} needs a program that was "
            "compiled with its extensions (resolve_extensions)"
        )
    state = np.zeros(STATE_WIDTH, dtype=np.int32)
    state[State.LAST_TOKEN] = -1
    state[State.MAX_TOKENS] = -1 if budget.max_tokens is None else budget.max_tokens
    state[State.MIN_TOKENS] = budget.min_tokens
    state[State.IGNORE_END] = budget.ignore_end
    state[State.GRACE_TOKENS] = budget.grace_tokens
    if opens_thinking(format, prompt_ids):
        state[State.PHASE] = Phase.THINKING
    else:
        matched, fail = 0, failures(format.start)
        for token in marker_tail(format, prompt_ids):
            matched = advance(format.start, fail, matched, token)
        state[State.START_STATE] = matched
    return state


def banned_ids(program: Row, ban: int) -> tuple[int, ...]:
    """The token ids that `state[State.BAN]` bans at the next position, ascending."""
    if ban == Ban.TRIGGERS:
        at, size = program[Header.BANNED_TRIGGERS_AT], program[Header.BANNED_TRIGGERS_SIZE]
    elif ban == Ban.EOS:
        at, size = program[Header.EOS_AT], program[Header.EOS_SIZE]
    else:
        return ()
    return tuple(program[at : at + size].tolist())


def _newline_pages(newline_ids: Sequence[int]) -> tuple[list[int], list[int]]:
    ids = sorted(set(newline_ids))
    if len(ids) >= 1 << 16:
        raise ValueError(f"ThinkingFormat.newline_ids has {len(ids)} ids: a program row holds at most {(1 << 16) - 1}")
    page_count = (ids[-1] >> 8) + 1 if ids else 0
    pages = np.searchsorted(ids, [page << 8 for page in range(page_count + 1)]).tolist()
    return pages, [token & 255 for token in ids]


def _pack(numbers: Sequence[int], bits: int) -> list[int]:
    """Unsigned numbers, several to a 32-bit integer, the first in the lowest bits."""
    per_word = 32 // bits
    words = [0] * -(-len(numbers) // per_word)
    for i, number in enumerate(numbers):
        words[i // per_word] |= number << (bits * (i % per_word))
    return np.array(words, dtype=np.uint32).view(np.int32).tolist()


class _Parts:
    """A program row that grows part by part and knows their sizes."""

    def __init__(self) -> None:
        self.numbers = [0] * Header.WIDTH
        self.sizes: dict[str, int] = {}

    def header(self, field: Header, value: int) -> None:
        self.numbers[field] = value

    def add(self, part: str, numbers: Sequence[int], at: Header | None = None, size: Header | None = None) -> int:
        """Appends; writes offset and length into the header where asked to, and returns the offset."""
        offset = len(self.numbers)
        self.numbers.extend(numbers)
        self.sizes[part] = self.sizes.get(part, 0) + len(numbers)
        if at is not None:
            self.header(at, offset)
        if size is not None:
            self.header(size, len(numbers))
        return offset

    def add_pattern(self, part: str, tokens: Sequence[int], at: Header, size: Header) -> None:
        self.add(part, tokens, at, size)
        self.add(part, failures(tokens))

    def build(self) -> Row:
        excess = len(self.numbers) - PROGRAM_WIDTH
        if excess > 0:
            parts = ", ".join(f"{part} {size}" for part, size in sorted(self.sizes.items(), key=lambda item: -item[1]))
            raise ValueError(
                f"this ThinkingFormat with its extensions needs {len(self.numbers)} integers, {excess} more than the "
                f"{PROGRAM_WIDTH} of a program row: shorten its largest parts ({parts})"
            )
        row = np.zeros(PROGRAM_WIDTH, dtype=np.int32)
        row[: len(self.numbers)] = self.numbers
        row.setflags(write=False)
        return row
