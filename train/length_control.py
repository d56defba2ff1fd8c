"""How well a policy keeps to the lengths that it is asked for, on problems that it is not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from s1engine.train.grpo_config import GrpoConfig
from s1engine.train.problems import Problem
from s1engine.train.rewards import MODES, Mode, counted_tokens
from s1engine.train.rollouts import Rollouts, readable


class LengthControl:
    """Asks each held-out problem for every target, and reports lengths and accuracy by target.

    The spread, the largest mean length over the smallest, is what tells whether the policy listens at all: in a
    reproduction of L1 that failed it stayed at 1.08 while the rewards rose.
    """

    def __init__(self, config: GrpoConfig, rollouts: Rollouts, problems: Sequence[Problem]) -> None:
        self.config, self.rollouts = config, rollouts
        self.problems = problems[: config.evaluation_problems]
        self.modes: tuple[Mode, ...] = ("exact",) if config.objective == "correctness" else MODES[config.objective]

    def run(self) -> dict[str, Any]:
        """Of each mode and target mean length, mean |n - target| / target, the share above it, accuracy; the spread."""
        return {f"{mode}_{name}": value for mode in self.modes for name, value in self._run(mode).items()}

    def _run(self, mode: Mode) -> dict[str, Any]:
        config, rollouts = self.config, self.rollouts
        asked = [(target, problem) for target in config.evaluation_targets for problem in self.problems]
        ask_for = rollouts.prompting.ask_for
        texts = [ask_for(problem.question, mode, target).text for target, problem in asked]
        params = [rollouts.single(number) for number in range(len(asked))]
        outputs = rollouts.llm.generate([rollouts.prompt(text) for text in texts], params, use_tqdm=False)
        responses = [output.outputs[0] for output in outputs]
        grades = rollouts.grade([readable(r) for r in responses], [problem.answer for _, problem in asked])
        found: dict[str, Any] = {}
        means = []
        for target in config.evaluation_targets:
            members = [i for i, (its, _) in enumerate(asked) if its == target]
            lengths = [counted_tokens(responses[i], rollouts.rewarding.count) for i in members]
            means.append(fmean(lengths))
            found[f"length_{target}"] = round(means[-1], 2)
            found[f"deviation_{target}"] = round(fmean(abs(n - target) / target for n in lengths), 4)
            found[f"above_{target}"] = round(fmean(n > target for n in lengths), 4)
            found[f"accuracy_{target}"] = round(fmean(bool(grades[i]) for i in members), 4)
        found["spread"] = round(max(means) / max(min(means), 1e-9), 4)
        return found
