"""Where things lie in the two integer rows of a sequence slot: its program and its state.

A program row is a header (`Header`) of sizes and offsets into the row, followed by the tables that `program.py` fills:

- trigger automaton (Aho-Corasick): `next[node][symbol]`, dense. The alphabet holds all trigger tokens, ascending, and
  after them the symbol of each; tokens that no trigger tells apart share one, and any other token has symbol 0. An
  entry -(i + 1) says that a trigger with record i is complete. That needs no node: the automaton starts anew after
  each. `depth[node]` is the length of what was matched.
- `TriggerRecord`s: what an end does; triggers that do the same share one.
- start marker, forced close, second forced close (Knuth-Morris-Pratt): n tokens, then n + 1 fail entries, one for each
  number of matched tokens. The separator stands right before each of the two closes.
- extensions: offset and length of each.
- newline ids, thousands in a large vocabulary, in two levels: the low bytes of all ids, ascending, four to an integer,
  and for each page `id >> 8` (and one past the last) its first place among them, two to an integer.

`csrc/include/s1engine/thinking_layout.h` has the same constants: a change here is a change there, and of the layout
version in both.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

LAYOUT_VERSION = 1
PROGRAM_WIDTH = 2048
STATE_WIDTH = 32
OUT_WIDTH = 4


class Header(IntEnum):
    """The first integers of a program row. `..._AT` are offsets into the row."""

    VERSION = 0
    SEGMENT = 1  # 1: max_tokens counts since the last extension
    TRUNCATE = 2  # 1: the request ends where the budget does
    ALPHABET_AT = 3
    ALPHABET_SIZE = 4
    SYMBOL_COUNT = 5  # with symbol 0: the width of a node
    TRIGGER_NEXT_AT = 6
    TRIGGER_DEPTH_AT = 7
    TRIGGERS_AT = 8
    START_AT = 9
    START_SIZE = 10
    SEPARATOR_SIZE = 11
    FORCED_CLOSE_AT = 12
    FORCED_CLOSE_SIZE = 13
    SECOND_CLOSE_AT = 14
    SECOND_CLOSE_SIZE = 15
    EXTENSIONS_AT = 16
    EXTENSION_COUNT = 17
    NEWLINE_PAGES_AT = 18
    NEWLINE_PAGES = 19
    NEWLINE_BYTES_AT = 20
    EOS_AT = 21
    EOS_SIZE = 22
    BANNED_TRIGGERS_AT = 23
    BANNED_TRIGGERS_SIZE = 24
    WIDTH = 25


class TriggerRecord(IntEnum):
    """The integers of one record."""

    LENGTH = 0
    IGNORABLE = 1
    COMMON = 2  # tokens that trigger and close have in common at their start
    REST_AT = 3  # the close after those
    REST_SIZE = 4
    WIDTH = 5


class State(IntEnum):
    """The columns of a state row; the rest up to `STATE_WIDTH` is zero."""

    PHASE = 0  # a Phase
    THINKING_TOKENS = 1
    SEGMENT_TOKENS = 2  # thinking tokens sampled since the last extension
    EXTENSIONS_USED = 3
    STOP_REASON = 4  # a StopReason, of the last close
    FINISHED = 5  # 1: by EOS or truncation; further steps change nothing
    BAN = 6  # a Ban, for the next position
    HELD = 7  # how many of the last emitted tokens a later rewind may take back
    PENDING = 8  # queued tokens not yet written
    QUEUE_AT = 9  # where in the program row the next of them lies
    QUEUE_KIND = 10  # a Queue; means nothing while PENDING is 0
    START_STATE = 11
    TRIGGER_STATE = 12
    FORCED_CLOSE_STATE = 13
    SECOND_CLOSE_STATE = 14
    FORCED_CLOSES = 15
    LAST_TOKEN = 16  # of the current thinking block; -1 while that is empty
    MAX_TOKENS = 17  # -1: no limit. 0, set between two steps, closes the thinking at the next position
    MIN_TOKENS = 18
    IGNORE_END = 19
    GRACE_TOKENS = 20


class Phase(IntEnum):
    BEFORE = 0
    THINKING = 1
    ANSWER = 2


class StopReason(IntEnum):
    NONE = 0
    NATURAL = 1
    BUDGET = 2


class Ban(IntEnum):
    """What is banned in the logits of one position."""

    NOTHING = 0
    TRIGGERS = 1  # the ignorable triggers of one token, after an extension
    EOS = 2  # after a close


class Queue(IntEnum):
    """What the queued tokens are; the ban that follows their last one has the same number."""

    EXTENSION = 1
    CLOSE = 2


class Out(IntEnum):
    """The columns of a step's result."""

    REWIND = 0  # how many emitted tokens to take back first
    TOKEN = 1  # the token at this position; -1: none was written (truncated, or finished before)
    FLAGS = 2  # a Flag
    HELD = 3  # as in State


class Flag(IntFlag):
    """What happened at one step."""

    FORCED = 1  # the token was written by the engine
    FINISHED = 2  # the request has ended, by EOS or truncation
    TRUNCATED = 4  # the budget was used up and ended the request
    CLOSED_NATURAL = 8  # an end was taken
    CLOSED_BUDGET = 16  # a forced close began
    IGNORED = 32  # an end was ignored, an extension began
    STARTED = 64  # this token completed the start marker
