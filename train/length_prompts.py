r"""Prompts that ask for a length, and which lengths they ask for: L1's training prompts (arXiv 2503.04697, section 3).

A prompt's mode, target and wording are made together, and its reward is chosen by that mode (`rewards`). A reproduction
of L1 failed with prompts that said "maximum" and a reward that was Exact's, so every prompt is read back as it is made,
and `check_agreement` compares the two settings before a run.

What is asked is a pure function of (seed, epoch, index of the problem): a run resumes with no state but its position.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Literal, get_args

from s1engine.bench.reasoning.l1_wording import EXACT, INSTRUCTION, MAX
from s1engine.train.rewards import MODES, Mode, Objective, RewardConfig

SUFFIXES: dict[str, str] = {"none": "", "exact": EXACT, "max": MAX}
_ASKS = re.compile(r" Think for (maximum )?([1-9][0-9]*) tokens\.\Z")

Distribution = Literal["uniform", "log-uniform"]


@dataclass(frozen=True)
class Targets:
    """The lengths that are asked for: whole numbers of tokens from `low` to `high`, both included.

    "uniform" has them all alike; "log-uniform" has each doubling alike, int(2^U) of a uniform U.

    Let them straddle the lengths that the model has of itself. A model that ignores them all pays alpha times the mean
    deviation, for uniform targets (high - low) / 4 at best: too little to learn from where the range is narrow, and
    nothing under Max where every target is above what it writes anyway.
    """

    distribution: Distribution
    low: int
    high: int

    def __post_init__(self) -> None:
        if self.distribution not in get_args(Distribution):
            raise ValueError(
                f"targets.distribution={self.distribution!r}: must be one of {', '.join(get_args(Distribution))}"
            )
        for name in ("low", "high"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"targets.{name}={value!r}: must be a number of tokens, at least 1")
        if self.high < self.low:
            raise ValueError(f"targets.high={self.high}: must be at least targets.low={self.low}")

    def at(self, share: float) -> int:
        """The target at `share`, in [0, 1), of the distribution."""
        if self.distribution == "uniform":
            return self.low + int(share * (self.high - self.low + 1))
        return min(self.high, int(self.low * ((self.high + 1) / self.low) ** share))


UNIFORM = Targets("uniform", 100, 4000)
"""Of L1-Exact and L1-Max."""
LOG_UNIFORM = Targets("log-uniform", 2**8, 23170)
"""The authors' `--use_log`, int(2^U(8, 14.5))."""


@dataclass(frozen=True)
class Asked:
    """One prompt: the text of the user's turn, and what it asks. `target` is None for mode "none"."""

    text: str
    mode: Mode
    target: int | None


@dataclass(frozen=True, kw_only=True)
class LengthPrompts:
    """How problems become prompts.

    objective    that of the rewards: "correctness" asks no length, "dual" asks each prompt one of the two
    targets      the lengths that are asked
    max_share    of "dual": the share of Max prompts
    instruction  stands after the problem and a space, before the length; "" for models with a format of their own
    seed         0 or more
    """

    objective: Objective
    targets: Targets = UNIFORM
    max_share: float = 0.5
    instruction: str = INSTRUCTION
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in MODES:
            raise ValueError(f"objective={self.objective!r}: must be one of {', '.join(MODES)}")
        if not 0 < self.max_share < 1:
            raise ValueError(
                f"max_share={self.max_share}: must be between 0 and 1, which are objectives 'exact' and 'max'"
            )
        if self.objective != "dual" and self.max_share != 0.5:
            raise ValueError(f"max_share={self.max_share}: objective={self.objective!r} has one mode; leave it out")
        if self.objective == "correctness" and self.targets != UNIFORM:
            raise ValueError(f"targets={self.targets}: objective='correctness' asks no length; leave it out")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: must be at least 0")

    def ask(self, question: str, epoch: int, index: int) -> Asked:
        """The prompt of problem `index` in pass `epoch` over the data. All rollouts of its group share it.

        Raises ValueError where the question itself ends in words that ask for a length.
        """
        if epoch < 0 or index < 0:
            raise ValueError(f"epoch={epoch}, index={index}: both must be at least 0")
        try:
            return self.ask_for(question, *self._draw(epoch, index))
        except ValueError as error:
            raise ValueError(f"problem {index} {error}") from None

    def ask_for(self, question: str, mode: Mode, target: int | None) -> Asked:
        """The prompt that asks for this length. Raises ValueError where the question itself asks for one."""
        text = f"{question} {self.instruction}" if self.instruction else question
        if read_suffix(text) != ("none", None):
            raise ValueError(f"asks for a length itself: {text[-60:]!r}; remove it from the data")
        asked = Asked(text + suffix(mode, target), mode, target)
        if read_suffix(asked.text) != (mode, target):
            raise RuntimeError(f"{asked.text[-60:]!r} does not ask {mode} {target}")
        return asked

    def _draw(self, epoch: int, index: int) -> tuple[Mode, int | None]:
        if self.objective == "correctness":
            return "none", None
        # A hash is the same everywhere and for good; random generators are only as stable as their library.
        digest = hashlib.sha256(f"length {self.seed} {epoch} {index}".encode()).digest()
        share, coin = ((int.from_bytes(digest[i : i + 8], "big") >> 11) / 2**53 for i in (0, 8))
        modes = MODES[self.objective]
        mode = modes[0] if len(modes) == 1 else ("max" if coin < self.max_share else "exact")
        return mode, self.targets.at(share)


def suffix(mode: Mode, target: int | None) -> str:
    """The words that ask for a length, with the space before them; "" for mode "none" and target None."""
    if mode not in SUFFIXES:
        raise ValueError(f"mode={mode!r}: must be one of {', '.join(SUFFIXES)}")
    if (target is None) != (mode == "none") or (target is not None and target < 1):
        raise ValueError(f"target={target!r}: mode {mode!r} takes {'None' if mode == 'none' else 'at least 1'}")
    return SUFFIXES[mode].format(target=target)


def read_suffix(text: str) -> tuple[Mode, int | None]:
    """What the text of a user's turn asks at its end: the reverse of `suffix`."""
    found = _ASKS.search(text)
    if found is None:
        return "none", None
    return "max" if found[1] else "exact", int(found[2])


def check_agreement(prompts: LengthPrompts, rewards: RewardConfig) -> None:
    """Raises ValueError where prompts ask for one thing and rewards are given for another. Call it at the start."""
    if prompts.objective != rewards.objective:
        raise ValueError(
            f"prompts are written for objective={prompts.objective!r}, rewards are given for {rewards.objective!r}: "
            "set both to the same"
        )
