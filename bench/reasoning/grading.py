"""Whether an answer is right: the one grading module of the project.

    with Grader() as grader:
        grades = grader.grade(responses, gold_answers)

An answer is read from its response (`answers`), compared as strings and exact numbers where that decides (`exact`), and
else by math-verify in a pool of processes, with a hard deadline for each answer (`grading_pool`): no expression, be it
9^9^9^9 or a megabyte of braces, can hang or crash the caller.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple

from s1engine.bench.reasoning.answers import Kind, choice_letter, extract_answer, read_letter
from s1engine.bench.reasoning.exact import compare, normalise, read_number, right_sides
from s1engine.bench.reasoning.grading_pool import Pool

__all__ = ["Grade", "Grader", "Kind", "extract_answer"]

MAX_CHARACTERS = 2000  # of an answer that is read; the longest of the benchmarks' gold answers has 160
MAX_CACHED = 100_000
KINDS = ("math", "choice", "integer")


@dataclass(frozen=True)
class Grade:
    """What was found of one response.

    Args:
        correct: None where the gold answer is missing or cannot be read. Leave such a response out, never count it as
            wrong; where several responses to one question are compared, leave out the question.
        extracted: the answer as it stands in the response, for "choice" its letter; None where it states none.
        reason: what decided. "exact", equal as strings or words, or letters compared; "numeric", as exact numbers;
            "symbolic", by math-verify; "no_answer", the response states none; "parse_fail", the answer cannot be read
            as what the kind asks for; "too_long"; "timeout", its comparison overran; "crash", it ended its process;
            "bad_gold", always with `correct` None.
    """

    correct: bool | None
    extracted: str | None
    reason: str


class Grader:
    """Grades responses. A context manager; else it closes when it is collected, or at exit.

    It may be called from any thread. No process is started before an answer needs math-verify.

    Args:
        processes: at most so many at a time; None for one a processor, at most four.
        timeout: seconds that one comparison may take, by the wall clock.

    Raises:
        ValueError: naming the argument.
    """

    def __init__(self, processes: int | None = None, timeout: float = 5.0) -> None:
        if processes is not None and processes < 1:
            raise ValueError(f"processes={processes}: give at least 1, or None")
        if not 0 < timeout < math.inf:
            raise ValueError(f"timeout={timeout}: give a number of seconds above 0")
        if processes is None:
            processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            processes = min(4, processors)
        self._pool = Pool(processes, timeout)
        self._verdicts: dict[tuple[str, str], str] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Grader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """The ids of the processes that there are now."""
        return self._pool.pids

    def close(self) -> None:
        """Ends the processes; a later call would start others."""
        self._pool.close()

    def grade(
        self,
        responses: Sequence[str],
        answers: Sequence[str | None],
        kind: Kind | Sequence[Kind] = "math",
        choices: Sequence[Sequence[str] | None] | None = None,
    ) -> list[Grade]:
        """The grades of responses, in their order.

        Args:
            answers: the gold answer of each. "math": LaTeX or plain text, several values, sets and intervals included;
                it is what math-verify calls gold (`verify` is not symmetric). "integer": an integer, as AIME has; the
                answer must be a number, no expression. "choice": a letter, or the text of a choice.
            kind: one for all, or one each.
            choices: the texts of the choices of each; None where it has none or they are not known. Only of use to
                "choice", for answers that give a choice's text, and to refuse a letter beyond the last choice.

        Raises:
            ValueError: naming the argument.
            RuntimeError: a process cannot be started, as where math-verify is not installed.
        """
        kinds = [kind] * len(responses) if isinstance(kind, str) else list(kind)
        options = [None] * len(responses) if choices is None else list(choices)
        for name, values in [("answers", answers), ("kind", kinds), ("choices", options)]:
            if len(values) != len(responses):
                raise ValueError(f"{name} has {len(values)} entries, responses has {len(responses)}: give one each")
        for name, texts in [
            ("responses", responses),
            ("answers", ["" if answer is None else answer for answer in answers]),
        ]:
            for i, text in enumerate(texts):
                if not isinstance(text, str):
                    raise ValueError(f"{name}[{i}]={text!r}: give a string")
        for unknown in set(kinds) - set(KINDS):
            raise ValueError(f"kind={unknown!r}: give one of {', '.join(KINDS)}")
        found = [_without_process(*each) for each in zip(responses, answers, kinds, options, strict=True)]
        pairs = dict.fromkeys(each.pair for each in found if isinstance(each, Undecided))
        verdicts = self._verdicts_on(list(pairs)) if pairs else {}
        return [_grade(verdicts[each.pair], each.extracted) if isinstance(each, Undecided) else each for each in found]

    def _verdicts_on(self, pairs: list[tuple[str, str]]) -> dict[tuple[str, str], str]:
        """math-verify's verdicts on different pairs of gold answer and answer."""
        with self._lock:
            new = [pair for pair in pairs if pair not in self._verdicts]
            self._verdicts.update(zip(new, self._pool.judge(new), strict=True))
            verdicts = {pair: self._verdicts[pair] for pair in pairs}
            while len(self._verdicts) > MAX_CACHED:
                del self._verdicts[next(iter(self._verdicts))]  # the oldest
        return verdicts


class Undecided(NamedTuple):
    """What math-verify must decide: a pair of gold answer and answer, and the answer as it was extracted."""

    pair: tuple[str, str]
    extracted: str


def _without_process(response: str, gold: str | None, kind: Kind, choices: Sequence[str] | None) -> Grade | Undecided:
    answer = extract_answer(response, kind)
    if gold is None or not gold.strip() or len(gold) > MAX_CHARACTERS:
        return Grade(None, answer, "bad_gold")
    if answer is None:
        return Grade(False, None, "no_answer")
    if len(answer) > MAX_CHARACTERS:
        return Grade(False, answer, "too_long")
    if kind == "choice":
        return _grade_choice(gold, answer, choices or ())
    if kind == "integer":
        return _grade_integer(gold, answer)
    pair = right_sides(gold, answer)
    correct, reason = compare(*pair)
    return Undecided(pair, answer) if reason == "undecided" else Grade(correct, answer, reason)


def _grade_choice(gold: str, answer: str, choices: Sequence[str]) -> Grade:
    wanted, given = _letter(gold, choices), _letter(answer, choices)
    if wanted is None:
        return Grade(None, answer, "bad_gold")
    if given is None:
        return Grade(False, answer, "parse_fail")
    return Grade(given == wanted, given, "exact")


def _letter(text: str, choices: Sequence[str]) -> str | None:
    """The letter that a text gives, or that of the choice whose text it is; None for a letter beyond the choices."""
    letter = read_letter(text)
    beyond = letter is not None and choices and letter >= chr(ord("A") + len(choices))
    return choice_letter(text, choices) if letter is None or beyond else letter


def _grade_integer(gold: str, answer: str) -> Grade:
    wanted = read_number(normalise(gold))
    if wanted is None or wanted.value.denominator != 1:
        return Grade(None, answer, "bad_gold")
    given = read_number(normalise(answer.rpartition("=")[2]))  # "m + n = 25"
    return (
        Grade(False, answer, "parse_fail") if given is None else Grade(given.value == wanted.value, answer, "numeric")
    )


def _grade(verdict: str, answer: str) -> Grade:
    """Of a verdict of math-verify's or the pool's."""
    if verdict in ("correct", "wrong"):
        return Grade(verdict == "correct", answer, "symbolic")
    return Grade(None if verdict == "bad_gold" else False, answer, verdict)
