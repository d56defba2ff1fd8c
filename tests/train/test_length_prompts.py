"""Prompts that ask for a length: the authors' words, targets and modes drawn without state, agreement with rewards."""

from __future__ import annotations

import json
from collections import Counter
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from conditions import data_folder
from hypothesis import given
from hypothesis import strategies as st

from s1engine.bench.reasoning import prompts as evaluated
from s1engine.train.length_prompts import (
    INSTRUCTION,
    LOG_UNIFORM,
    UNIFORM,
    LengthPrompts,
    Targets,
    check_agreement,
    read_suffix,
    suffix,
)
from s1engine.train.rewards import ALPHAS, MODES, RewardConfig, batch_rewards


def theirs(question: str, num_tokens: int) -> str:
    """cmu-l3/l1, scripts/data/deepscaler_dataset.py: a negative number is a maximum."""
    instruction = "Let's think step by step and output the final answer within \\boxed{}."
    if num_tokens < 0:
        instruction = f"{instruction} Think for maximum {abs(num_tokens)} tokens."
    else:
        instruction = f"{instruction} Think for {num_tokens} tokens."
    return f"{question} {instruction}"


@pytest.mark.parametrize("target", [1, 512, 3600, 23170])
def test_the_wording_is_the_authors_and_the_evaluations(target: int) -> None:
    assert f"Find $x$. {INSTRUCTION}{suffix('exact', target)}" == theirs("Find $x$.", target)
    assert f"Find $x$. {INSTRUCTION}{suffix('max', target)}" == theirs("Find $x$.", -target)
    assert evaluated.l1_exact(target) == suffix("exact", target)
    assert evaluated.l1_max(target) == suffix("max", target)


@pytest.mark.parametrize("objective", ["correctness", "exact", "max", "dual"])
def test_a_prompt_is_the_question_then_the_instruction_then_the_length(objective: Any) -> None:
    for index in range(20):
        asked = LengthPrompts(objective=objective).ask("Find $x$.", 0, index)
        if asked.mode == "none":
            assert asked.target is None and asked.text == f"Find $x$. {INSTRUCTION}"
        else:
            assert asked.target is not None and asked.mode in MODES[objective]
            assert asked.text == theirs("Find $x$.", asked.target if asked.mode == "exact" else -asked.target)
        plain = LengthPrompts(objective=objective, instruction="").ask("Find $x$.", 0, index)
        assert plain.text == "Find $x$." + suffix(asked.mode, asked.target)


@given(st.text(), st.sampled_from(["exact", "max"]), st.integers(1, 10**9))
def test_what_is_asked_can_be_read_back(question: str, mode: Any, target: int) -> None:
    assert read_suffix(question + suffix(mode, target)) == (mode, target)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Think for 5 tokens.",  # no space before it: the whole of a question, not its ending
        "x Think for 0 tokens.",
        "x Think for -5 tokens.",
        "x Think for 05 tokens.",
        "x Think for up to 5 tokens.",
        "x Think for 5 tokens. And then?",
        "x Think for 5 tokens.\n",
    ],
)
def test_other_words_ask_for_no_length(text: str) -> None:
    assert read_suffix(text) == ("none", None)


def test_uniform_targets_have_both_ends_and_one_share_each() -> None:
    """randint(100, 4000): 3,901 values, each the image of an equal part of [0, 1)."""
    assert [UNIFORM.at((i + 0.5) / 3901) for i in range(3901)] == list(range(100, 4001))
    assert UNIFORM.at(0.0) == 100 and UNIFORM.at(1 - 2**-53) == 4000
    assert Targets("uniform", 7, 7).at(0.9) == 7


def test_log_uniform_targets_are_the_authors() -> None:
    """int(2**random.uniform(8, 14.5)): the same support, and values that differ by one token at most."""
    assert (LOG_UNIFORM.low, LOG_UNIFORM.high) == (2**8, int(2**14.5))
    assert LOG_UNIFORM.at(0.0) == 256 and LOG_UNIFORM.at(1 - 2**-53) == 23170
    for share in np.linspace(0, 1, 5001)[:-1].tolist():
        assert abs(LOG_UNIFORM.at(share) - int(2 ** (8 + 6.5 * share))) <= 1


@given(
    st.sampled_from(["uniform", "log-uniform"]),
    st.integers(1, 10**6),
    st.integers(0, 10**6),
    st.floats(0, 1, exclude_max=True),
)
def test_every_target_is_in_range(distribution: Any, low: int, more: int, share: float) -> None:
    assert low <= Targets(distribution, low, low + more).at(share) <= low + more


def draws(prompts: LengthPrompts, count: int, epoch: int = 0) -> list[tuple[str, int | None]]:
    asked = [prompts.ask("q", epoch, index) for index in range(count)]
    return [(each.mode, each.target) for each in asked]


@pytest.mark.parametrize("targets", [UNIFORM, LOG_UNIFORM, Targets("uniform", 4, 11)])
def test_drawn_targets_have_their_distribution(targets: Targets) -> None:
    """Kolmogorov-Smirnov against the distribution's own values: below 1.63 / sqrt(n), its bound at 1 %; seeded."""
    n = 4000
    drawn = [target for _, target in draws(LengthPrompts(objective="exact", targets=targets), n) if target]
    wanted = np.array([targets.at((i + 0.5) / 100_000) for i in range(100_000)])
    support = np.unique(wanted)
    cumulative = [np.searchsorted(np.sort(values), support, side="right") / len(values) for values in (drawn, wanted)]
    assert len(drawn) == n and np.abs(cumulative[0] - cumulative[1]).max() < 1.63 / n**0.5


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_dual_prompts_ask_both(share: float) -> None:
    """Max at its share (within 4 standard deviations; seeded), whatever the target."""
    asked = draws(LengthPrompts(objective="dual", max_share=share), 4000)
    count = Counter(mode for mode, _ in asked)
    assert abs(count["max"] - 4000 * share) < 4 * (4000 * share * (1 - share)) ** 0.5
    means = [np.mean([target for mode, target in asked if target and mode == wanted]) for wanted in ("exact", "max")]
    assert abs(means[0] - means[1]) < 4 * 1126 * (1 / count["exact"] + 1 / count["max"]) ** 0.5


def test_what_is_asked_depends_on_seed_epoch_and_problem_alone() -> None:
    prompts = LengthPrompts(objective="dual")
    assert draws(prompts, 50) == draws(LengthPrompts(objective="dual"), 50)
    assert [prompts.ask("other words", 0, i).target for i in (9, 3)] == [draws(prompts, 10)[i][1] for i in (9, 3)]
    for others in (draws(LengthPrompts(objective="dual", seed=1), 50), draws(prompts, 50, epoch=1)):
        assert sum(a[1] == b[1] for a, b in zip(draws(prompts, 50), others, strict=True)) < 5
        assert 10 < sum(a[0] == b[0] for a, b in zip(draws(prompts, 50), others, strict=True)) < 40
    # (1, 11) and (11, 1) are other places.
    assert prompts.ask("q", 1, 11) != prompts.ask("q", 11, 1)


def test_what_is_asked_never_changes() -> None:
    """Written down: a run that was started with one version goes on with another."""
    assert draws(LengthPrompts(objective="dual"), 4) == [("exact", 3908), ("max", 3102), ("max", 1898), ("exact", 1715)]


@pytest.mark.parametrize("objective", ["correctness", "exact", "max", "dual"])
def test_rewards_follow_the_words(objective: Any) -> None:
    """The failed reproduction: prompts said "maximum", rewards were Exact's. Here from the text alone, by hand."""
    prompts, config = LengthPrompts(objective=objective), RewardConfig(objective=objective)
    check_agreement(prompts, config)
    asked = [prompts.ask(f"problem {i}", 0, i) for i in range(40)]
    got = batch_rewards(
        config,
        correct=[True] * 40,
        lengths=[1200] * 40,
        targets=[each.target for each in asked],
        modes=[each.mode for each in asked],
        groups=range(40),
    )
    alpha = ALPHAS["paper"].exact
    for each, reward in zip(asked, got.total.tolist(), strict=True):
        words = each.text.removeprefix("problem ").split(INSTRUCTION)[1].split()
        if not words:
            wanted = 1.0
        elif words[2] == "maximum":
            wanted = min(1.0, max(0.0, alpha * (int(words[3]) - 1200) + 0.5))
        else:
            wanted = 1 - alpha * abs(int(words[2]) - 1200)
        assert reward == pytest.approx(wanted)


@pytest.mark.parametrize(("prompts", "rewards"), list(permutations(MODES, 2)))
def test_prompts_and_rewards_that_disagree_are_refused(prompts: Any, rewards: Any) -> None:
    with pytest.raises(ValueError, match=f"objective='{prompts}', rewards are given for '{rewards}'"):
        check_agreement(LengthPrompts(objective=prompts), RewardConfig(objective=rewards))


@pytest.mark.parametrize("objective", ["correctness", "exact"])
def test_a_question_that_asks_for_a_length_itself_is_refused(objective: Any) -> None:
    question = "Find $x$. Think for 5 tokens."
    with pytest.raises(ValueError, match=r"problem 3 asks for a length itself: .*remove it from the data"):
        LengthPrompts(objective=objective, instruction="").ask(question, 0, 3)
    with pytest.raises(ValueError, match="asks for a length itself"):
        LengthPrompts(objective=objective, instruction="Think for maximum 9 tokens.").ask("q", 0, 0)


def test_every_problem_of_the_sample_becomes_a_prompt() -> None:
    lines = (data_folder() / "train" / "deepscaler_sample.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = LengthPrompts(objective="dual")
    for index, line in enumerate(lines):
        asked = prompts.ask(json.loads(line)["problem"], 0, index)
        assert read_suffix(asked.text) == (asked.mode, asked.target)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "minimum"}, "objective='minimum': must be one of correctness, exact, max, dual"),
        ({"objective": "dual", "max_share": 1.0}, "max_share=1.0: must be between 0 and 1"),
        ({"objective": "exact", "max_share": 0.2}, "max_share=0.2: objective='exact' has one mode"),
        ({"objective": "correctness", "targets": LOG_UNIFORM}, "objective='correctness' asks no length"),
        ({"objective": "exact", "seed": -1}, "seed=-1"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LengthPrompts(**settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("normal", 1, 2), "targets.distribution='normal': must be one of uniform, log-uniform"),
        (("uniform", 0, 2), "targets.low=0: must be a number of tokens, at least 1"),
        (("uniform", 1, 2.5), "targets.high=2.5"),
        (("uniform", 3, 2), "targets.high=2: must be at least targets.low=3"),
    ],
)
def test_bad_targets_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Targets(*arguments)


@pytest.mark.parametrize(
    ("mode", "target", "message"),
    [
        ("exact", None, "target=None: mode 'exact' takes at least 1"),
        ("max", 0, "target=0: mode 'max' takes at least 1"),
        ("none", 5, "target=5: mode 'none' takes None"),
        ("minimum", 5, "mode='minimum': must be one of none, exact, max"),
    ],
)
def test_bad_suffixes_are_refused(mode: Any, target: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        suffix(mode, target)
    with pytest.raises(ValueError, match="epoch=-1"):
        LengthPrompts(objective="exact").ask("q", -1, 0)
