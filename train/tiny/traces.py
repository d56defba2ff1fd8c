"""Reasoning traces with the faults that thinking longer can mend.

A line of thinking looks one operation up, restates it next to the running total and gives the result: `b:8*9=2`.
Two habits end a train of thought too early, as they might a person's:

- *Slips*: a subtraction that must borrow is often left undone, `c:2-7=2`. With that thinking stops.
- *Early ends*: a running total of 0 looks like a result, and thinking often stops there though operations remain.

"Wait" stands where an end was. After it a wrong last line is done again, rightly, and the chain goes on; a right one is
gone on from; with nothing left to do, thinking says `ok`. The first line after a "Wait" is careful (no slip), later
ones have the same habits again. So each "Wait" mends one fault, and a problem may need several.

An answer is always the last result, whether thinking ended by itself or was cut off anywhere.
"""

import random
from dataclasses import dataclass
from enum import IntEnum

from s1engine.train.tiny.task import LABELS, Problem, apply

SLIP_RATE = 0.6
EARLY_END_RATE = 0.6
CUT_RATE = 0.35
WAIT_RATE, IDLE_WAIT_RATE = 0.8, 0.3
"""How often an end is replaced by "Wait": while there is something left to do, and once there is nothing."""
MAX_WAITS = 6

OPENER = ("<|im_start|>", "think")
CLOSE = ("<|im_start|>", "answer", "\n", "Final", " ", "Answer", ":")


class Role(IntEnum):
    """What a token is to the training loss."""

    GIVEN = 0  # written by the user or by the engine: no loss
    TEXT = 1
    RESULT = 2  # of one step
    RECHECK = 3  # after "Wait" and a right line: the line to go on with, or `ok`
    MEND = 4  # after "Wait" and a wrong line: the same line again
    ANSWER = 5


@dataclass
class Trace:
    """Parallel lists: the `tokens` as text, what the model should have sampled there (`targets`), and their roles."""

    tokens: list[str]
    targets: list[str]
    roles: list[Role]

    def add(self, role: Role, *tokens: str) -> None:
        self.tokens += tokens
        self.targets += tokens
        self.roles += [role] * len(tokens)

    @property
    def text(self) -> str:
        return "".join(self.tokens)


def prompt_tokens(problem: Problem) -> list[str]:
    """`problem.prompt`, token by token."""
    question = [str(problem.start)]
    for label, (operator, operand) in zip(LABELS, problem.steps, strict=False):
        question += [" ", label, ":", operator, operand]
    return ["<|im_start|>", "user", "\n", *question, "<|im_end|>", "\n", "<|im_start|>", "assistant", "\n", *OPENER]


class Thinker:
    """Writes the thinking of one problem. `totals` holds the running total after each line of the chain as it stands;
    `slipped` says that the last of them is wrong.
    """

    def __init__(self, problem: Problem, rng: random.Random) -> None:
        self.problem, self.rng = problem, rng
        self.totals: list[int] = []
        self.slipped = False
        self.trace = Trace([], [], [])
        self.trace.add(Role.GIVEN, *prompt_tokens(problem))
        self.opened_at = len(self.trace.tokens)
        self.trace.add(Role.TEXT, "\n")

    @property
    def total(self) -> int:
        return self.totals[-1] if self.totals else self.problem.start

    @property
    def finished(self) -> bool:
        return len(self.totals) == len(self.problem.steps)

    def run(self, careful: bool, label_role: Role) -> None:
        """Writes lines from where the chain stands until thinking ends, rightly or early."""
        while not self.finished:
            i, before = len(self.totals), self.total
            operator, operand = self.problem.steps[i]
            borrows = operator == "-" and before < int(operand)
            self.slipped = borrows and not careful and self.rng.random() < SLIP_RATE
            result = before if self.slipped else apply(before, operator, operand)
            self.trace.add(label_role, LABELS[i])
            self.trace.add(Role.TEXT, ":", str(before), operator, operand, "=")
            self.trace.add(Role.RESULT, str(result))
            self.trace.add(Role.TEXT, "\n")
            self.totals.append(result)
            careful, label_role = False, Role.TEXT
            if self.slipped or (result == 0 and self.rng.random() < EARLY_END_RATE):
                return

    def wait(self) -> None:
        """Replaces an end by "Wait", checks the last line and goes on."""
        self.trace.add(Role.TEXT, "Wait", "\n")
        # The engine writes "Wait" over an end that the model sampled: the model learns the end.
        self.trace.targets[-2] = CLOSE[0]
        if self.slipped:
            del self.totals[-1]
            self.run(careful=True, label_role=Role.MEND)
        elif not self.finished:
            self.run(careful=True, label_role=Role.RECHECK)
        else:
            self.trace.add(Role.RECHECK, "ok")
            self.trace.add(Role.TEXT, "\n")

    def answer(self) -> None:
        """Accepts the end: the answer is what the chain has come to."""
        self.trace.add(Role.TEXT, *CLOSE, " ")
        self.trace.add(Role.ANSWER, str(self.total))
        self.trace.add(Role.TEXT, "<|im_end|>")

    def cut(self, length: int) -> None:
        """Keeps `length` thinking tokens and closes by force, as the engine does when a budget is used up."""
        trace, kept = self.trace, self.opened_at + length
        results = [
            token
            for token, role in zip(trace.tokens[self.opened_at : kept], trace.roles[self.opened_at : kept], strict=True)
            if role == Role.RESULT
        ]
        # With no result yet, the start.
        value = results[-1] if results else str(self.problem.start)
        del trace.tokens[kept:], trace.targets[kept:], trace.roles[kept:]
        if length == 0 or trace.tokens[-1] != "\n":
            trace.add(Role.GIVEN, "\n")
        trace.add(Role.GIVEN, *CLOSE)
        trace.add(Role.TEXT, " ")
        trace.add(Role.ANSWER, value)
        trace.add(Role.TEXT, "<|im_end|>")


def write_trace(problem: Problem, rng: random.Random) -> Trace:
    """One training trace of `problem`: thinking with its habits, some ends replaced by "Wait", then an answer."""
    thinker = Thinker(problem, rng)
    thinker.run(careful=False, label_role=Role.TEXT)
    for _ in range(MAX_WAITS):
        idle = thinker.finished and not thinker.slipped
        if rng.random() >= (IDLE_WAIT_RATE if idle else WAIT_RATE):
            break
        thinker.wait()
    if rng.random() < CUT_RATE:
        thinker.cut(rng.randint(0, len(thinker.trace.tokens) - thinker.opened_at))
    else:
        thinker.answer()
    return thinker.trace
