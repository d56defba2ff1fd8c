"""Models that are asked for a length, against caps on a model that is not: accuracy at the same lengths (L1, figure 2).

"The same" can mean two things, and both are reported. By budget: both may spend so much on every problem, so that the
cap is the largest under which 99 of 100 outputs are no longer than what was asked for: an answer that never ends, once
in a thousand, is none of the cap's. By mean: both spend as much on average. A cap then spends more on problems that
take the model longer, which a model that is asked for one length cannot.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from s1engine.bench.reasoning.bootstrap import difference


class Outcome(NamedTuple):
    """Of a setting: mean accuracy and mean output tokens of each problem, and the tokens of all of its outputs."""

    accuracy: Mapping[str, float]
    tokens: Mapping[str, float]
    lengths: Sequence[int]

    @property
    def percentile_99(self) -> int:
        """Tokens that 99 of 100 outputs do not exceed."""
        return sorted(self.lengths)[math.ceil(0.99 * len(self.lengths)) - 1]


Caps = Mapping[int | None, Outcome]
"""By the cap on thinking tokens; None: without one."""


def matched(asked: int, outcome: Outcome, caps: Caps) -> list[dict[str, Any]]:
    """The comparisons of a setting that asks for `asked` tokens, none where no cap fits.

    Each has "by" ("budget" or "mean"), "caps" (one, or two that are mixed so that their mean length is the setting's),
    "problems", "output_tokens" and "cap_accuracy" of the caps, and "accuracy", "low" and "high": of the difference, the
    setting less the caps, over the same problems. By mean, where no cap is as long, the longest is taken.
    """
    problems = sorted(set(outcome.accuracy).intersection(*(cap.accuracy for cap in caps.values())))
    if not problems:
        return []
    own = _column(outcome.accuracy, problems)
    within = [cap for cap, its in caps.items() if cap is not None and its.percentile_99 <= asked]
    mixes: dict[str, dict[int | None, float]] = {"budget": {max(within): 1.0}} if within else {}
    mixes["mean"] = _mixed(_mean(outcome.tokens, problems), {cap: _mean(caps[cap].tokens, problems) for cap in caps})
    found = []
    for by, mix in mixes.items():
        theirs = sum(share * _column(caps[cap].accuracy, problems) for cap, share in mix.items())
        gain = difference(own, theirs)
        found.append(
            {
                "by": by,
                "caps": list(mix),
                "problems": len(problems),
                "output_tokens": sum(share * _mean(caps[cap].tokens, problems) for cap, share in mix.items()),
                "cap_accuracy": float(np.mean(theirs)),
                "accuracy": gain.mean,
                "low": gain.low,
                "high": gain.high,
            }
        )
    return found


def _mixed(length: float, lengths: Mapping[int | None, float]) -> dict[int | None, float]:
    """Shares of the two caps whose mean lengths enclose `length`, so that together they have it."""
    ordered = sorted(lengths, key=lambda cap: (lengths[cap], cap is None, cap or 0))
    below = [cap for cap in ordered if lengths[cap] <= length]
    above = [cap for cap in ordered if lengths[cap] > length]
    if not below or not above:
        return {(below or ordered[:1])[-1]: 1.0}
    low, high = below[-1], above[0]
    share = (lengths[high] - length) / (lengths[high] - lengths[low])
    return {low: share, high: 1 - share} if share < 1 else {low: 1.0}


def _column(values: Mapping[str, float], problems: list[str]) -> np.ndarray:
    return np.array([values[problem] for problem in problems])


def _mean(values: Mapping[str, float], problems: list[str]) -> float:
    return float(_column(values, problems).mean())
