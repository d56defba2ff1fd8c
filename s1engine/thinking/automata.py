"""The automata of the compiled machine: how far a delimiter has been written, one token at a time."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from s1engine.thinking.formats import Trigger, common_prefix

Record = tuple[int, bool, int, tuple[int, ...]]  # length, ignorable, tokens in common with the close, the rest of that
Symbols = tuple[int, ...]


def failures(pattern: Sequence[int]) -> list[int]:
    """Knuth, Morris and Pratt's table: for each n, the longest proper prefix of pattern[:n] that is also its suffix."""
    fail = [0, 0]
    for n in range(1, len(pattern)):
        fail.append(advance(pattern, fail, fail[n], pattern[n]))
    return fail


def advance(pattern: Sequence[int], fail: Sequence[int], matched: int, token: int) -> int:
    """How much of `pattern` is matched after one more token, where `matched` < len(pattern) of it was before."""
    while matched and pattern[matched] != token:
        matched = fail[matched]
    return matched + 1 if pattern[matched] == token else 0


@dataclass(frozen=True)
class TriggerAutomaton:
    """Aho and Corasick's automaton over all triggers (Commun. ACM 18(6), 1975), for symbols in place of tokens.

    A delimiter of ordinary tokens can have a thousand spellings that differ at their edges only. Tokens that no trigger
    tells apart share a symbol, which leaves a handful of them.

    Args:
        symbols: of each trigger token, ascending by token, from 1 up; any other token has symbol 0.
        records: what an end does.
        transitions: [node][symbol]: the next node, or -(i + 1) where a trigger with record i is complete.
        depths: [node]: how many of the last tokens are the longest proper prefix of a trigger.
    """

    symbols: dict[int, int]
    records: list[Record]
    transitions: list[list[int]]
    depths: list[int]

    @classmethod
    def build(cls, triggers: Sequence[Trigger]) -> TriggerAutomaton:
        """A prefix that completes a trigger is no node: the machine acts on it and starts anew."""
        record_of = {tuple(trigger.tokens): _record(trigger) for trigger in triggers}
        records = sorted(set(record_of.values()))
        symbols = _symbols(record_of)
        complete = {tuple(symbols[t] for t in tokens): records.index(record) for tokens, record in record_of.items()}
        prefixes = {pattern[:n] for pattern in complete for n in range(len(pattern))}
        nodes: dict[Symbols, int] = {(): 0}
        transitions: list[list[int]] = []
        todo: deque[Symbols] = deque([()])
        while todo:
            matched = todo.popleft()
            row = [0]
            for symbol in range(1, max(symbols.values()) + 1):
                # The longest suffix first: it wins.
                suffixes = [(*matched, symbol)[begin:] for begin in range(len(matched) + 1)]
                ended = next((s for s in suffixes if s in complete), None)
                if ended is not None:
                    row.append(-(complete[ended] + 1))
                    continue
                begun = next((s for s in suffixes if s in prefixes), ())
                if begun not in nodes:
                    nodes[begun] = len(nodes)
                    todo.append(begun)
                row.append(nodes[begun])
            transitions.append(row)
        return cls(symbols, records, transitions, [len(prefix) for prefix in nodes])


def _record(trigger: Trigger) -> Record:
    common = common_prefix(trigger.tokens, trigger.close)
    return len(trigger.tokens), trigger.ignorable, common, tuple(trigger.close[common:])


def _symbols(record_of: dict[tuple[int, ...], Record]) -> dict[int, int]:
    """One symbol for all tokens that can take each other's place anywhere in a trigger, with the same record."""
    places = defaultdict(set)
    for tokens, record in record_of.items():
        for i, token in enumerate(tokens):
            places[token].add((record, tokens[:i], tokens[i + 1 :]))
    numbers: dict[frozenset[object], int] = {}
    return {token: numbers.setdefault(frozenset(places[token]), len(numbers) + 1) for token in sorted(places)}
