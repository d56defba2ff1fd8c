"""The settings of `s1engine grpo`: one flat TOML file, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, cast, get_args, get_type_hints

from s1engine.train.advantages import Baseline
from s1engine.train.length_prompts import INSTRUCTION, UNIFORM, LengthPrompts, Targets
from s1engine.train.losses import Estimator, Loss, LossConfig
from s1engine.train.rewards import ALPHAS, Alphas, Count, Objective, Overlong, RewardConfig
from s1engine.train.sft_config import DTYPES, check_types

KINDS = ("math", "integer", "choice")


@dataclass(frozen=True, kw_only=True)
class GrpoConfig:
    """A run of GRPO. The defaults are L1-Exact's (arXiv 2503.04697, section 4; cmu-l3/l1, `run_l1_exact.sh`).

    model, output, dtype, deepspeed, checkpointing, clip, save_every, keep   as in SftConfig
    data, split, question_column, answer_column, skip_unanswered   problems: see problems.py; kind: how they are graded
    hold_out           share of the problems, by their words, that is evaluated on and not trained on
    objective          "exact", "max", "dual" (both, in one batch) or "correctness"; it writes prompts and gives rewards
    instruction        stands after the problem and a space, before the length that is asked
    targets            [distribution, low, high]: "uniform" or "log-uniform"
    max_share          of "dual": Max prompts
    alphas             "paper" or "first-release", see rewards.ALPHAS; or [exact, max]
    delta, violation, count   see RewardConfig
    overlong           [max_tokens, cache] of DAPO's penalty, objective "correctness"; []: none
    steps              rounds of rollouts; a run may go on with another number of them
    prompts            groups that teach something, a step; groups without variance are replaced by others, as long as
                       there are fewer than `most_draws` times as many
    group              rollouts of each
    updates            optimizer steps a round, each on its share of the groups
    max_response       tokens of a rollout at most: far above the targets, or the cap teaches instead of the reward
    temperature        of rollouts
    row_tokens         rollouts are packed into rows of at most so many tokens, one a micro-batch
    loss, clip_low, clip_high, kl, kl_coefficient, entropy_coefficient, truncation   see LossConfig; negative clips: the
                       loss's own; truncation 0: none
    baseline           of advantages: "grpo", "dr_grpo" or "rloo"
    learning_rate      constant after `warmup` steps
    max_num_seqs       rollouts that decode at a time
    evaluate_every     steps between evaluations of length control, 0: none; on evaluation_problems held-out problems,
                       each asked for all evaluation_targets
    """

    model: str
    output: str
    data: str
    split: str = "train"
    question_column: str = ""
    answer_column: str = "answer"
    skip_unanswered: bool = False
    kind: str = "math"
    hold_out: float = 0.0
    objective: str = "exact"
    instruction: str = INSTRUCTION
    targets: list[Any] = dataclasses.field(default_factory=lambda: ["uniform", UNIFORM.low, UNIFORM.high])
    max_share: float = 0.5
    alphas: Any = "paper"
    delta: float = 0.5
    violation: float = 0.0
    count: str = "response"
    overlong: list[int] = dataclasses.field(default_factory=list)
    steps: int = 700
    prompts: int = 128
    group: int = 16
    most_draws: int = 4
    updates: int = 2
    max_response: int = 4096
    temperature: float = 0.6
    seed: int = 0
    row_tokens: int = 16384
    loss: str = "dapo"
    clip_low: float = -1.0
    clip_high: float = -1.0
    kl: str = "k3"
    kl_coefficient: float = 0.0
    entropy_coefficient: float = 0.0
    truncation: float = 0.0
    baseline: str = "grpo"
    dtype: str = "bfloat16"
    learning_rate: float = 1e-6
    warmup: int = 0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    checkpointing: bool = True
    deepspeed: str = ""
    max_num_seqs: int = 256
    save_every: int = 20
    keep: int = 2
    evaluate_every: int = 0
    evaluation_problems: int = 100
    evaluation_targets: list[int] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        check_types(self, get_type_hints(type(self)))
        for name, choices in (("dtype", DTYPES), ("kind", KINDS), ("baseline", get_args(Baseline))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(choices)}")
        counts = ("steps", "prompts", "most_draws", "updates", "max_response", "row_tokens", "max_num_seqs", "keep")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("save_every", "evaluate_every", "warmup", "learning_rate", "weight_decay", "clip", "truncation"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must not be negative")
        if self.group < 2:
            raise ValueError(f"group={self.group}: must be at least 2, to compare rollouts of one prompt")
        if self.prompts % self.updates:
            raise ValueError(f"updates={self.updates}: must divide prompts={self.prompts}")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}: must be above 0; greedy rollouts are all the same")
        if self.evaluate_every and not (self.evaluation_targets and self.hold_out):
            raise ValueError(f"evaluate_every={self.evaluate_every}: needs evaluation_targets and hold_out above 0")
        _ = self.prompting, self.rewarding, self.losing  # what they are made of checks the rest

    @property
    def batch_size(self) -> int:
        """Rollouts of an optimizer step, as deepspeed_config wants to know it."""
        return self.prompts // self.updates * self.group

    @property
    def prompting(self) -> LengthPrompts:
        targets: dict[str, Any] = {}
        if self.objective != "correctness":
            if len(self.targets) != 3:
                raise ValueError(f"targets={self.targets}: must be [distribution, low, high]")
            targets = {"targets": Targets(*self.targets)}
        return LengthPrompts(
            objective=cast(Objective, self.objective),
            **targets,
            max_share=self.max_share,
            instruction=self.instruction,
            seed=self.seed,
        )

    @property
    def rewarding(self) -> RewardConfig:
        alphas = ALPHAS.get(self.alphas) if isinstance(self.alphas, str) else Alphas(*self.alphas)
        if alphas is None:
            raise ValueError(f"alphas={self.alphas!r}: must be {', '.join(ALPHAS)} or [exact, max]")
        return RewardConfig(
            objective=cast(Objective, self.objective),
            alphas=alphas,
            delta=self.delta,
            violation=self.violation,
            count=cast(Count, self.count),
            overlong=Overlong(*self.overlong) if self.overlong else None,
        )

    @property
    def losing(self) -> LossConfig:
        return LossConfig(
            loss=cast(Loss, self.loss),
            clip_low=None if self.clip_low < 0 else self.clip_low,
            clip_high=None if self.clip_high < 0 else self.clip_high,
            kl=cast(Estimator, self.kl),
            kl_coefficient=self.kl_coefficient,
            entropy_coefficient=self.entropy_coefficient,
            truncation=self.truncation or None,
            max_tokens=self.max_response if self.loss == "dr_grpo" else None,
        )
