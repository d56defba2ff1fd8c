"""Rollouts of a step: what the policy says to each prompt, what it is worth, and what of it is to be learned."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from s1engine import LLM, CompletionOutput, RequestOutput, SamplingParams, ThinkingBudget
from s1engine.bench.reasoning.grading import Grader, Kind
from s1engine.train.advantages import Baseline, group_advantages
from s1engine.train.grpo_config import GrpoConfig
from s1engine.train.length_prompts import Asked
from s1engine.train.problems import Problem, drawn
from s1engine.train.rewards import batch_rewards, counted_tokens


@dataclass(frozen=True)
class Rollout:
    """One response.

    learned   of each token: the policy sampled it from its own distribution. Not so are tokens that the engine wrote,
              and the one after a close of the thinking, where the end of the text is banned.
    logprobs  of each token, at the temperature of the rollouts
    length    as rewards.counted_tokens has it
    """

    token_ids: list[int]
    learned: list[bool]
    logprobs: list[float]
    length: int
    finish_reason: str | None
    text: str
    correct: bool | None
    reward: float | None = None


@dataclass(frozen=True)
class Group:
    """The rollouts of one prompt. `draw`: its place in the run's sequence of prompts. advantages: none if `dropped`."""

    draw: int
    prompt: list[int]
    question: str
    mode: str
    target: int | None
    rollouts: list[Rollout]
    advantages: list[float] = field(default_factory=list)
    dropped: str | None = None


class Rollouts:
    """Makes the groups of steps, each rank its share; what a step has made is on disk before it is used.

    folder: rollouts/step-N.jsonl, one group a line, which a run that was killed reads again.
    """

    def __init__(
        self, config: GrpoConfig, llm: LLM, problems: Sequence[Problem], folder: Path, rank: int, ranks: int
    ) -> None:
        self.config, self.llm, self.problems = config, llm, problems
        self.folder, self.rank, self.ranks = folder, rank, ranks
        self.prompting, self.rewarding = config.prompting, config.rewarding
        self.tokenizer = llm.get_tokenizer()
        self.thinks = llm.engine.core.split_format is not None
        self.grader = Grader()

    def forget_after(self, step: int) -> None:
        """Remove this rank's rollouts of later steps: of weights that are not there any more."""
        for path in self.folder.glob(f"step-*-rank-{self.rank}.jsonl"):
            if int(path.name.split("-")[1]) > step:
                path.unlink()

    def step(self, step: int, start: int) -> tuple[list[Group], list[Group], int]:
        """(Groups to learn from, groups that teach nothing, draws used from `start` on)."""
        config = self.config
        kept: list[Group] = []
        dropped: list[Group] = []
        used = 0
        while len(kept) < config.prompts and used < config.most_draws * config.prompts:
            wanted = min(config.prompts - len(kept), config.most_draws * config.prompts - used)
            for group in self._groups(step, range(start + used, start + used + wanted)):
                (dropped if group.dropped else kept).append(group)
            used += wanted
        return kept, dropped, used

    def _groups(self, step: int, draws: range) -> list[Group]:
        """The groups of these draws, made by all ranks together, in their order."""
        path = self.folder / f"step-{step + 1}-rank-{self.rank}.jsonl"
        made = {group.draw: group for group in read_groups(path)}
        mine = [draw for draw in draws if draw % self.ranks == self.rank]
        missing = [draw for draw in mine if draw not in made]
        if missing:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                for group in self._make(missing):
                    made[group.draw] = group
                    file.write(json.dumps(vars(group), default=vars) + "\n")
        own = [made[draw] for draw in mine]
        if self.ranks == 1:
            return own
        import torch

        everyone: list[Any] = [None] * self.ranks
        torch.distributed.all_gather_object(everyone, own)
        return sorted((group for groups in everyone for group in groups), key=lambda group: group.draw)

    def _make(self, draws: list[int]) -> list[Group]:
        asked = {draw: self._ask(draw) for draw in draws}
        # Those that are asked for most begin first, so that none of them is left to the end alone.
        order = sorted(draws, key=lambda draw: -(asked[draw][1].target or 0))
        prompts = [self.prompt(asked[draw][1].text) for draw in order]
        outputs = self.llm.generate(prompts, [self.params(draw) for draw in order], use_tqdm=False)
        responses = [completion for output in outputs for completion in output.outputs]
        answers = [asked[draw][0].answer for draw in order for _ in range(self.config.group)]
        correct = iter(self.grade([readable(response) for response in responses], answers))
        groups = [self._group(draw, *asked[draw], output, correct) for draw, output in zip(order, outputs, strict=True)]
        return sorted(groups, key=lambda group: group.draw)

    def grade(self, texts: list[str], answers: list[str]) -> list[bool | None]:
        grades = self.grader.grade(texts, answers, cast(Kind, self.config.kind))
        return [grade.correct for grade in grades]

    def single(self, number: int) -> SamplingParams:
        """Of one response outside of training."""
        return replace(self.params(number), n=1, logprobs=None, logprobs_mode="raw_logprobs")

    def _ask(self, draw: int) -> tuple[Problem, Asked]:
        ((epoch, index),) = drawn(len(self.problems), self.config.seed, draw, 1)
        problem = self.problems[index]
        return problem, self.prompting.ask(problem.question, epoch, index)

    def prompt(self, text: str) -> list[int]:
        turns = [{"role": "user", "content": text}]
        ids = self.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False, add_generation_prompt=True)
        return list(ids)

    def params(self, draw: int) -> SamplingParams:
        config = self.config
        return SamplingParams(
            n=config.group,
            temperature=config.temperature,
            max_tokens=config.max_response,
            seed=config.seed * 2**40 + draw,
            logprobs=0,
            logprobs_mode="raw_logprobs" if config.temperature == 1 else "processed_logprobs",
            skip_special_tokens=False,  # the grader looks for the header of the answer
            thinking=ThinkingBudget() if self.thinks else None,
        )

    def _group(self, draw: int, problem: Problem, asked: Asked, output: RequestOutput, correct: Any) -> Group:
        rollouts = [self._rollout(completion, next(correct)) for completion in output.outputs]
        count = len(rollouts)
        rewards = batch_rewards(
            self.rewarding,
            correct=[rollout.correct for rollout in rollouts],
            lengths=[rollout.length for rollout in rollouts],
            targets=[asked.target] * count,
            modes=[asked.mode] * count,
            groups=[draw] * count,
        )
        values = [float(r) if kept else None for r, kept in zip(rewards.total, rewards.kept, strict=True)]
        advantages = group_advantages(values, cast(Baseline, self.config.baseline))
        return Group(
            draw=draw,
            prompt=output.prompt_token_ids,
            question=problem.question,
            mode=asked.mode,
            target=asked.target,
            rollouts=[
                Rollout(**{**vars(rollout), "reward": value}) for rollout, value in zip(rollouts, values, strict=True)
            ],
            advantages=list(advantages.advantages),
            dropped=advantages.dropped,
        )

    def _rollout(self, completion: CompletionOutput, correct: bool | None) -> Rollout:
        entries = completion.logprobs or []
        pairs = zip(completion.forced_mask, completion.banned_mask, strict=True)
        return Rollout(
            token_ids=completion.token_ids,
            learned=[not forced and not banned for forced, banned in pairs],
            logprobs=[entry[token].logprob for token, entry in zip(completion.token_ids, entries, strict=True)],
            length=counted_tokens(completion, self.rewarding.count),
            finish_reason=completion.finish_reason,
            text=completion.text,
            correct=correct,
        )


def readable(completion: CompletionOutput) -> str:
    """The text to read an answer from: none where the thinking is not closed, or nothing follows it."""
    return completion.text if completion.answer else ""


def read_groups(path: Path) -> list[Group]:
    """The groups of a file, but for a line that was not finished, which is dropped from it as well."""
    if not path.exists():
        return []
    groups, whole = [], 0
    data = path.read_bytes()
    for line in data.splitlines(keepends=True):
        if not line.endswith(b"\n"):
            path.write_bytes(data[:whole])
            break
        whole += len(line)
        values = json.loads(line)
        values["rollouts"] = [Rollout(**rollout) for rollout in values["rollouts"]]
        groups.append(Group(**values))
    return groups
