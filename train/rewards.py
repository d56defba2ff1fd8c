"""Rewards of a step's rollouts: correctness, LCPO's two length rewards, and DAPO's penalty of overlong responses.

LCPO is L1's (Aggarwal and Welleck, arXiv 2503.04697, section 3). Which of its equations rewards a rollout follows from
what its prompt asks, its `mode`, and from nothing else: `length_prompts` writes the prompts by the same modes. A target
is always positive. In the authors' code its sign names the mode and -1 means none, so that a maximum of one token is
no length at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any, Literal, get_args

import numpy as np

from s1engine.outputs import CompletionOutput

Mode = Literal["none", "exact", "max"]
"""What a prompt asks: no length, a length to meet, a length not to exceed."""
Objective = Literal["correctness", "exact", "max", "dual"]
Count = Literal["response", "thinking"]

MODES: dict[str, tuple[Mode, ...]] = {
    "correctness": ("none",),
    "exact": ("exact",),
    "max": ("max",),
    "dual": ("exact", "max"),
}
"""The modes of the prompts of each objective. "dual" is what L1-Max was trained with."""


@dataclass(frozen=True)
class Alphas:
    """What a token of deviation costs, of Exact prompts (Eq. 1) and of Max prompts (Eq. 2)."""

    exact: float
    max: float

    def __post_init__(self) -> None:
        for name, alpha in (("exact", self.exact), ("max", self.max)):
            if not 0 < alpha < math.inf:
                raise ValueError(f"alphas.{name}={alpha}: must be above 0; it is a cost, whichever way a length is off")


ALPHAS = {"paper": Alphas(exact=0.0003, max=0.0003), "first-release": Alphas(exact=1 / 3000, max=1 / 1000)}
"""The published values. The paper names 0.0003 for Eq. 1 and no other for Eq. 2. The code that was public when the
models were released (cmu-l3/l1 at 86948fe, `deepscaler/rewards/math_reward.py`) has 1/3000 and 1/1000. With delta = 0.5
Max then has its full reward from 500 tokens below the limit on and none from 500 above; with 0.0003 it is 1,667."""


@dataclass(frozen=True)
class Overlong:
    """DAPO's soft overlong punishment (Yu et al., arXiv 2503.14476, section 3.4), which had 20,480 and 4,096 tokens.

    max_tokens  L_max, from which on the penalty is full
    cache       L_cache, the tokens before that over which it grows from 0
    weight      times the penalty is added to the correctness. DAPO's answers are worth 1 and -1, ours 1 and 0: with 0.5
                the reward is DAPO's, halved and moved by a half, so advantages over a group's deviation are the same
    """

    max_tokens: int
    cache: int
    weight: float = 0.5

    def __post_init__(self) -> None:
        if not _is_count(self.max_tokens) or self.max_tokens < 1:
            raise ValueError(f"overlong.max_tokens={self.max_tokens!r}: must be a number of tokens, at least 1")
        if not _is_count(self.cache) or not 1 <= self.cache <= self.max_tokens:
            raise ValueError(f"overlong.cache={self.cache!r}: must be from 1 to overlong.max_tokens={self.max_tokens}")
        if not 0 < self.weight < math.inf:
            raise ValueError(f"overlong.weight={self.weight}: must be above 0; leave overlong out to have no penalty")


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """How rollouts are rewarded.

    objective  "correctness", "exact", "max" or "dual", Exact and Max prompts in the same batch
    alphas     one of ALPHAS, or of one's own: a deviation of 1 / alpha.exact tokens outweighs a correct answer
    delta      of Eq. 2: the reward of a correct answer that is exactly as long as the limit
    violation  what a response above the limit of a Max prompt pays, right or wrong; 0 in the paper. Without it a policy
               that is above a limit under which hardly any answer is right has nothing to gain by keeping to it
    count      the length that a target speaks of: "response", thinking, answer and end of turn, as in the paper, or
               "thinking" alone
    overlong   of objective "correctness" only, a penalty on the length of the whole response

    Raises ValueError naming the field; also for a field that the objective does not read.
    """

    objective: Objective
    alphas: Alphas = ALPHAS["paper"]
    delta: float = 0.5
    violation: float = 0.0
    count: Count = "response"
    overlong: Overlong | None = None

    def __post_init__(self) -> None:
        if self.objective not in MODES:
            raise ValueError(f"objective={self.objective!r}: must be one of {', '.join(MODES)}")
        for field in fields(self):
            if field.name in _UNREAD[self.objective] and getattr(self, field.name) != field.default:
                raise ValueError(
                    f"{field.name}={getattr(self, field.name)!r}: objective={self.objective!r} does not read it; "
                    "leave it out, or choose another objective"
                )
        if not 0 <= self.delta <= 1:
            raise ValueError(f"delta={self.delta}: must be between 0 and 1")
        if not 0 <= self.violation < math.inf:
            raise ValueError(f"violation={self.violation}: must be at least 0, which is the paper's; it is a cost")
        if self.count not in get_args(Count):
            raise ValueError(f"count={self.count!r}: must be one of {', '.join(get_args(Count))}")


# A length objective takes no penalty on top: a length that is priced by addition is what made L1-Max collapse (A.7).
# `violation` is none of a length: within the limit it is 0, so that being still shorter gains nothing.
_UNREAD = {
    "correctness": ("alphas", "delta", "violation", "count"),
    "exact": ("delta", "violation", "overlong"),
    "max": ("overlong",),
    "dual": ("overlong",),
}


@dataclass(frozen=True)
class Rewards:
    """Of n rollouts.

    total  float64 [n]; NaN where the rollout is not kept, so that it cannot pass for a reward
    kept   bool [n]: False for every rollout of a group in which a grade is None. A gold answer that cannot be read says
           nothing of any response to its question: counted as wrong it would punish the right ones
    """

    total: np.ndarray
    kept: np.ndarray


def lcpo_exact(correct: np.ndarray, lengths: np.ndarray, targets: np.ndarray, alpha: float) -> np.ndarray:
    """LCPO-Exact, L1's Eq. 1: `r = 1[y = y_gold] - alpha * |n_gold - n_y|`.

    correct  bool [n]
    lengths  int [n], n_y, tokens
    targets  int [n], n_gold, tokens

    Returns float64 [n], at most 1 and without a lower bound: a wrong answer, too, is to have the length that was asked.
    """
    return correct.astype(np.float64) - alpha * np.abs(targets - lengths)


def lcpo_max(
    correct: np.ndarray, lengths: np.ndarray, targets: np.ndarray, alpha: float, delta: float = 0.5
) -> np.ndarray:
    """LCPO-Max, L1's Eq. 2: `r = 1[y = y_gold] * clip(alpha * (n_gold - n_y) + delta, 0, 1)`.

    Arguments as of lcpo_exact; delta is the reward at n_y = n_gold. Returns float64 [n], within [0, 1]. A wrong answer
    has 0 whatever its length, so that nothing is to be had by being short alone.
    """
    return correct.astype(np.float64) * np.clip(alpha * (targets - lengths) + delta, 0.0, 1.0)


def overlong_penalty(lengths: np.ndarray, max_tokens: int, cache: int) -> np.ndarray:
    """DAPO's R_length: 0 up to `L_max - L_cache`, -1 above L_max, between them `(L_max - L_cache - |y|) / L_cache`.

    lengths  int [n], tokens of the whole response

    Returns float64 [n].
    """
    return np.clip((max_tokens - cache - lengths) / cache, -1.0, 0.0)


def counted_tokens(output: CompletionOutput, count: Count) -> int:
    """The length n_y of a rollout.

    "response" is all of its tokens, the end of turn and those that the engine wrote included. "thinking" is the tokens
    inside its thinking, without the delimiters. Raises ValueError where its request did not count thinking.
    """
    if count == "response":
        return len(output.token_ids)
    if output.thinking is None:
        raise ValueError("count='thinking': the rollout's thinking was not counted; give its request a ThinkingBudget")
    return output.thinking.num_tokens


def batch_rewards(
    config: RewardConfig,
    *,
    correct: Sequence[bool | None],
    lengths: Sequence[int],
    targets: Sequence[int | None],
    modes: Sequence[Mode],
    groups: Sequence[int],
) -> Rewards:
    """The rewards of n rollouts, each by the equation of its mode.

    correct  of `Grade`: None where the gold answer could not be read; its group is then left out
    lengths  counted_tokens of each, as config.count says; of the whole response for objective "correctness"
    targets  at least 1; None where the mode is "none"
    modes    what each prompt asks
    groups   any integers: rollouts of one prompt have the same

    Raises ValueError that names argument and index; for a mode that is not of the objective, and for a group whose
    prompts ask for different lengths, which would be compared with each other.
    """
    n = len(correct)
    for name, values in (("lengths", lengths), ("targets", targets), ("modes", modes), ("groups", groups)):
        if len(values) != n:
            raise ValueError(f"{name} has {len(values)} entries, correct has {n}: give one each")
    asked: dict[int, tuple[str, int | None]] = {}
    for i in range(n):
        _check_rollout(config, i, correct[i], lengths[i], targets[i], modes[i])
        first = asked.setdefault(groups[i], (modes[i], targets[i]))
        if first != (modes[i], targets[i]):
            raise ValueError(
                f"groups[{i}]={groups[i]}: asks {modes[i]} {targets[i]}, but the group asks {first[0]} {first[1]}; "
                "rollouts of one prompt share its mode and target"
            )
    unread = {group for group, grade in zip(groups, correct, strict=True) if grade is None}
    kept = np.array([group not in unread for group in groups], dtype=bool)
    right = np.array([bool(grade) for grade in correct], dtype=bool)
    length = np.array(lengths, dtype=np.int64)
    target = np.array([0 if value is None else value for value in targets], dtype=np.int64)
    total = right.astype(np.float64)
    exact, limited = (np.array([m == mode for m in modes], dtype=bool) for mode in ("exact", "max"))
    total[exact] = lcpo_exact(right[exact], length[exact], target[exact], config.alphas.exact)
    total[limited] = lcpo_max(right[limited], length[limited], target[limited], config.alphas.max, config.delta)
    total[limited] -= config.violation * (length[limited] > target[limited])
    if config.overlong is not None:
        penalty = overlong_penalty(length, config.overlong.max_tokens, config.overlong.cache)
        total += config.overlong.weight * penalty
    return Rewards(np.where(kept, total, np.nan), kept)


def _check_rollout(config: RewardConfig, i: int, correct: Any, length: Any, target: Any, mode: Any) -> None:
    if correct is not None and not isinstance(correct, bool | np.bool_):
        raise ValueError(f"correct[{i}]={correct!r}: give True, False, or None where the gold answer cannot be read")
    if not _is_count(length):
        raise ValueError(f"lengths[{i}]={length!r}: give a number of tokens, 0 or more")
    if mode not in MODES[config.objective]:
        raise ValueError(
            f"modes[{i}]={mode!r}: objective={config.objective!r} rewards prompts of mode "
            f"{' and '.join(MODES[config.objective])}; write the prompts for this objective, or reward by theirs"
        )
    if mode == "none":
        if target is not None:
            raise ValueError(f"targets[{i}]={target!r}: mode 'none' asks no length; give None")
    elif not _is_count(target) or target < 1:
        raise ValueError(f"targets[{i}]={target!r}: give at least 1; the mode says what it means, not the sign")


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0
