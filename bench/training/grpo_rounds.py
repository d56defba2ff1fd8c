"""A round of GRPO as two trainers ran it: seconds by phase, the tokens of their forward passes, ratios and bounds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from s1engine.bench.speed.floor import Rates, Sizes, step_seconds

OURS = "s1engine"
PHASES = ("rollouts", "logprobs", "updates", "weights")
"""What a round consists of, whole: `rollouts` with their grading, passes over old log-probabilities, forward, backward
and optimizer, and what the engine needs to decode with the new weights."""


@dataclass(frozen=True)
class Round:
    """seconds    of PHASES; TRL's have parts of them beside, as do ours: `generation`, `rewards`
    prompts    tokens of each prompt
    responses  tokens of its responses
    computed   tokens that went through the model, by phase
    grad_norm  before clipping: 0 would say that there was nothing to learn
    """

    seconds: dict[str, float]
    prompts: list[int]
    responses: list[list[int]]
    computed: dict[str, int]
    grad_norm: float

    @property
    def tokens(self) -> int:
        """That were sampled."""
        return sum(map(sum, self.responses))

    @property
    def whole(self) -> float:
        return sum(self.seconds.get(phase, 0.0) for phase in PHASES)


@dataclass(frozen=True)
class Result:
    """Of one contestant in one turn, the first round left out; anonymous: bytes of memory at most."""

    name: str
    turn: int
    rounds: list[Round]
    anonymous: int


def needed(prompts: Sequence[int], responses: Sequence[Sequence[int]]) -> dict[str, int]:
    """Tokens that must go through the model: each prompt once for all of its responses, and nothing for padding.

    A response's last token is not decoded from.
    """
    own = [length for group in responses for length in group]
    return {"rollouts": sum(prompts) + sum(own) - len(own), "updates": sum(prompts) + sum(own)}


def real(prompts: Sequence[int], responses: Sequence[Sequence[int]]) -> dict[str, int]:
    """As `needed`, but each response with a prompt of its own: what is more than that is padding."""
    again = sum(prompt * (len(group) - 1) for prompt, group in zip(prompts, responses, strict=True))
    return {phase: tokens + again for phase, tokens in needed(prompts, responses).items()}


def least_seconds(found: Round, sizes: Sizes, item_bytes: int, rates: Rates) -> dict[str, float]:
    """That the machine would need for the rollouts and for the updates of a round, by its measured rates.

    Rollouts: the prompts once, then steps of all responses that are not over, as floor.run_seconds. Updates: the
    products of the forward and the backward pass, 6 operations a parameter and token; attention and optimizer are left
    out.
    """
    lengths = [
        (prompt, length) for prompt, group in zip(found.prompts, found.responses, strict=True) for length in group
    ]
    rollouts = max(sizes.weights * item_bytes / rates.bandwidth, 2 * sizes.body * sum(found.prompts) / rates.operations)
    for step in range(1, max(length for _, length in lengths)):
        contexts = [prompt + step for prompt, length in lengths if length > step]
        rollouts += step_seconds(sizes, len(contexts), sum(contexts), item_bytes, rates)
    head = sizes.weights - sizes.body
    operations = 6 * (sizes.body * needed(found.prompts, found.responses)["updates"] + head * found.tokens)
    return {"rollouts": rollouts, "updates": operations / rates.operations}


def summary(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """Of each contestant: medians, and how many times as long it takes as ours, turn by turn, by phase and token.

    seconds   of a round, by phase and part
    ratios    of PHASES that both have, and of the whole, per sampled token
    bound     the ratio of the whole if our rollouts took no time (Amdahl): what no faster decoding can go beyond
    repeated  computed tokens over real ones' need by phase: prompts that are computed once for each response
    padding   share of the computed tokens that are padding, by phase
    memory    ratio of the peaks
    """
    ours = {result.turn: result for result in results if result.name == OURS}
    found = {}
    for name in dict.fromkeys(result.name for result in results):
        own = [result for result in results if result.name == name]
        rounds = [r for result in own for r in result.rounds]
        pairs = [(result, ours[result.turn]) for result in own]
        found[name] = {
            "seconds": {"whole": statistics.median(r.whole for r in rounds)}
            | {phase: statistics.median(r.seconds[phase] for r in rounds) for phase in rounds[0].seconds},
            "tokens": statistics.median(r.tokens for r in rounds),
            "ratios": {
                phase: statistics.median(_cost(a.rounds, [phase]) / _cost(b.rounds, [phase]) for a, b in pairs)
                for phase in PHASES
                if all(phase in r.seconds for a, b in pairs for r in (*a.rounds, *b.rounds))
            }
            | {"whole": statistics.median(_cost(a.rounds, PHASES) / _cost(b.rounds, PHASES) for a, b in pairs)},
            "bound": statistics.median(_cost(a.rounds, PHASES) / _cost(b.rounds, PHASES[1:]) for a, b in pairs),
            "computed": _share((r.computed, needed(r.prompts, r.responses)) for r in rounds),
            "padding": {
                phase: 1 - 1 / share
                for phase, share in _share((r.computed, real(r.prompts, r.responses)) for r in rounds).items()
            }
            if name != OURS
            else {phase: 0.0 for phase in rounds[0].computed},
            "anonymous": max(result.anonymous for result in own),
            "memory": statistics.median(a.anonymous / b.anonymous for a, b in pairs),
            "grad_norm": statistics.median(r.grad_norm for r in rounds),
        }
    return found


def _cost(rounds: Sequence[Round], phases: Iterable[str]) -> float:
    """Seconds per sampled token, the median of the rounds."""
    return statistics.median(sum(r.seconds.get(phase, 0.0) for phase in phases) / r.tokens for r in rounds)


def _share(pairs: Iterable[tuple[dict[str, int], dict[str, int]]]) -> dict[str, float]:
    """By phase, the first sums over the second ones."""
    both = list(pairs)
    return {phase: sum(a[phase] for a, _ in both) / sum(b[phase] for _, b in both) for phase in both[0][0]}
