"""The task: the last digit of a running total.

A question names a start digit and 3 to 8 labelled operations, `3 a:+5 b:*9 c:-7`. They apply in order, modulo ten,
so the answer is one digit and a guess is right one time in ten. Factors are 3, 7 and 9, the units modulo ten: with
them every step can be undone, so a mistake is never multiplied away by luck and no step can be left out.

Labels are what makes a step easy for a tiny model: to find the next operation it looks its label up in the question.
"""

import hashlib
import random
import re
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "validation", "test"]

LABELS = "abcdefgh"
MIN_STEPS, MAX_STEPS = 3, len(LABELS)
OPERANDS = {"+": "123456789", "-": "123456789", "*": "379"}
# Subtractions are rarer because half of them borrow, and borrows are what the model slips on (see `traces`).
OPERATOR_WEIGHTS = {"+": 4, "-": 3, "*": 4}
_OPERATORS, _WEIGHTS = list(OPERATOR_WEIGHTS), list(OPERATOR_WEIGHTS.values())

FINAL_ANSWER = "Final Answer:"


def apply(value: int, operator: str, operand: str) -> int:
    """One step: `value operator operand`, modulo ten."""
    y = int(operand)
    return (value + y if operator == "+" else value - y if operator == "-" else value * y) % 10


@dataclass(frozen=True)
class Problem:
    """A question: `start` (0 to 9) and the `(operator, operand)` pairs to apply to it, in order."""

    start: int
    steps: tuple[tuple[str, str], ...]

    @property
    def question(self) -> str:
        return " ".join([str(self.start), *(f"{x}:{o}{y}" for x, (o, y) in zip(LABELS, self.steps, strict=False))])

    @property
    def prompt(self) -> str:
        """The question in the chat form, up to the marker after which the model thinks."""
        return f"<|im_start|>user\n{self.question}<|im_end|>\n<|im_start|>assistant\n<|im_start|>think"

    @property
    def answer(self) -> str:
        value = self.start
        for operator, operand in self.steps:
            value = apply(value, operator, operand)
        return str(value)

    @property
    def split(self) -> Split:
        """The split this question belongs to: a function of its text alone, so no question is ever in two of them."""
        bucket = hashlib.sha256(self.question.encode()).digest()[0] % 16
        return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


def draw(rng: random.Random, split: Split, max_steps: int = MAX_STEPS) -> Problem:
    """One problem of `split`, its number of steps uniform over `MIN_STEPS..max_steps`."""
    n = rng.randint(MIN_STEPS, max_steps)
    while True:
        operators = rng.choices(_OPERATORS, _WEIGHTS, k=n)
        problem = Problem(rng.randrange(10), tuple((o, rng.choice(OPERANDS[o])) for o in operators))
        if problem.split == split:
            return problem


def problems(split: Split, n: int, seed: int = 0) -> list[Problem]:
    """`n` different problems of `split`; the same `seed` gives the same ones."""
    if split not in ("train", "validation", "test"):
        raise ValueError(f"split is {split!r}; valid are 'train', 'validation' and 'test'")
    if not 0 <= n <= 10_000:
        raise ValueError(f"n is {n}; valid are 0 to 10000")
    rng = random.Random(f"{split}-{seed}")
    found: dict[Problem, None] = {}
    while len(found) < n:
        found[draw(rng, split)] = None
    return list(found)


def grade(answer_text: str, problem: Problem) -> bool:
    """Whether `answer_text` answers `problem`: the integer that follows its last "Final Answer:".

    Text without that marker is taken as what follows it, since an engine may hand out the answer without the close
    that it wrote itself.
    """
    match = re.match(r"\s*(\d+)(?!\d)", answer_text.rpartition(FINAL_ANSWER)[2])
    return match is not None and match[1] == problem.answer
