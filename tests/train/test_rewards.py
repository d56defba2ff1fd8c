"""Rewards against the papers' equations worked by hand, the authors' code of the first release, and its later bugs."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s1engine import LLM, SamplingParams, ThinkingBudget
from s1engine.outputs import CompletionOutput, ThinkingOutput
from s1engine.train.rewards import (
    ALPHAS,
    Alphas,
    Overlong,
    RewardConfig,
    Rewards,
    batch_rewards,
    counted_tokens,
    lcpo_exact,
    lcpo_max,
    overlong_penalty,
)

TINY = Path(__file__).resolve().parents[2] / "train" / "tiny" / "model"
RELEASE = ALPHAS["first-release"]
TOKENS = st.integers(0, 30_000)
TARGETS = st.integers(1, 30_000)
ALPHA = st.floats(1e-6, 1.0)


def one(config: RewardConfig, correct: bool | None, length: int, target: int | None, mode: Any) -> float:
    """The reward of a batch of one."""
    got = batch_rewards(config, correct=[correct], lengths=[length], targets=[target], modes=[mode], groups=[0])
    return float(got.total[0])


def exact(correct: bool, length: int, target: int, alphas: Alphas = ALPHAS["paper"]) -> float:
    return one(RewardConfig(objective="exact", alphas=alphas), correct, length, target, "exact")


def limited(correct: bool, length: int, limit: int, alphas: Alphas = ALPHAS["paper"], delta: float = 0.5) -> float:
    return one(RewardConfig(objective="max", alphas=alphas, delta=delta), correct, length, limit, "max")


@pytest.mark.parametrize(
    ("correct", "length", "target", "reward"),
    [
        (True, 1000, 1000, 1.0),
        (True, 600, 1000, 0.88),  # 400 * 0.0003 = 0.12
        (True, 1400, 1000, 0.88),
        (True, 4000, 100, -0.17),  # right, and worse than a wrong answer of the right length
        (False, 1000, 1000, 0.0),
        (False, 600, 1000, -0.12),
        (False, 4000, 100, -1.17),
    ],
)
def test_exact_by_hand(correct: bool, length: int, target: int, reward: float) -> None:
    """Eq. 1 with the paper's alpha of 0.0003."""
    assert exact(correct, length, target) == pytest.approx(reward, abs=1e-12)


@pytest.mark.parametrize(
    ("length", "paper", "release"),
    [
        (2000, 0.5, 0.5),  # at the limit, delta
        (1500, 0.65, 1.0),  # 500 below
        (1400, 0.68, 1.0),
        (333, 1.0, 1.0),  # 1,667 below: 0.5001 + 0.5
        (2250, 0.425, 0.25),
        (2500, 0.35, 0.0),
        (3666, 0.0002, 0.0),
        (3667, 0.0, 0.0),
        (20000, 0.0, 0.0),
    ],
)
def test_max_by_hand(length: int, paper: float, release: float) -> None:
    """Eq. 2 for a limit of 2,000 tokens, with both published alphas; a wrong answer has 0 under each."""
    assert limited(True, length, 2000) == pytest.approx(paper, abs=1e-12)
    assert limited(True, length, 2000, RELEASE) == pytest.approx(release, abs=1e-12)
    assert limited(False, length, 2000) == limited(False, length, 2000, RELEASE) == 0.0


def test_the_published_alphas() -> None:
    assert list(ALPHAS) == ["paper", "first-release"]
    assert ALPHAS["paper"] == Alphas(exact=0.0003, max=0.0003)
    assert ALPHAS["first-release"] == Alphas(exact=1 / 3000, max=1 / 1000)


@given(st.booleans(), TOKENS, TARGETS)
def test_the_first_release(correct: bool, length: int, target: int) -> None:
    """cmu-l3/l1 at 86948fe, deepscaler_reward_fn: a positive num_tokens is Exact, a negative one Max."""
    delta = 1 - abs(length - target) / 3000
    assert exact(correct, length, target, RELEASE) == pytest.approx(delta if correct else delta - 1, abs=1e-9)
    score = max(-1, min(1, -(length - target) / 500))
    assert limited(correct, length, target, RELEASE) == pytest.approx(max(0, (score + 1) / 2) * correct, abs=1e-9)


@given(st.booleans(), TOKENS, TARGETS, ALPHA, st.floats(0, 1))
def test_both_equations_in_exact_arithmetic(
    correct: bool, length: int, target: int, alpha: float, delta: float
) -> None:
    alphas = Alphas(alpha, alpha)
    wanted = int(correct) - Fraction(alpha) * abs(target - length)
    assert exact(correct, length, target, alphas) == pytest.approx(float(wanted), rel=1e-9, abs=1e-9)
    wanted = int(correct) * min(Fraction(1), max(Fraction(0), Fraction(alpha) * (target - length) + Fraction(delta)))
    assert limited(correct, length, target, alphas, delta) == pytest.approx(float(wanted), rel=1e-9, abs=1e-9)


@given(st.booleans(), TARGETS, TOKENS, TOKENS, ALPHA)
def test_exact_falls_with_deviation(correct: bool, target: int, first: int, second: int, alpha: float) -> None:
    """Strictly, on either side of the target, and a correct answer is worth 1 more at every length."""
    alphas = Alphas(alpha, 1.0)
    near, far = sorted((first, second), key=lambda length: abs(length - target))
    rewards = exact(correct, near, target, alphas), exact(correct, far, target, alphas)
    if abs(near - target) == abs(far - target):
        assert rewards[0] == rewards[1]
    else:
        assert rewards[0] > rewards[1]
    assert rewards[0] <= float(correct)
    assert exact(True, first, target, alphas) - exact(False, first, target, alphas) == pytest.approx(1)


@given(TARGETS, TOKENS, TOKENS, ALPHA, st.floats(0, 1))
def test_max_falls_with_length(limit: int, first: int, second: int, alpha: float, delta: float) -> None:
    """Never rises, stays within 0 and 1, and is delta at the limit; a correct answer is never below a wrong one."""
    alphas = Alphas(1.0, alpha)
    short, long = sorted((first, second))
    rewards = limited(True, short, limit, alphas, delta), limited(True, long, limit, alphas, delta)
    assert 1 >= rewards[0] >= rewards[1] >= 0 == limited(False, first, limit, alphas, delta)
    assert limited(True, limit, limit, alphas, delta) == delta


@pytest.mark.parametrize(
    ("correct", "length", "mode", "reward"),
    [
        (True, 30, "max", 0.25),  # delta: at the limit nothing is paid
        (False, 30, "max", 0.0),
        (False, 3, "max", 0.0),  # nor is anything gained by being shorter
        (True, 31, "max", -0.5),  # clip(-0.25 + 0.25) = 0
        (False, 31, "max", -0.5),
        (False, 300, "max", -0.5),
        (True, 31, "exact", 0.75),  # 1 - 0.25: Eq. 1 as it is
    ],
)
def test_a_response_above_its_limit_pays_for_the_violation(
    correct: bool, length: int, mode: str, reward: float
) -> None:
    config = RewardConfig(objective="dual", alphas=Alphas(0.25, 0.25), delta=0.25, violation=0.5)
    assert one(config, correct, length, 30, mode) == reward


class TestPublishedBugs:
    """Of the authors' repository at 93dd330, `math_reward.py`: each beside what it did."""

    def test_the_sigmoid_exact_reward_rose_with_deviation(self) -> None:
        def theirs(off: int) -> float:
            return 1 / (1 + math.exp(-0.01 * abs(off)))

        assert theirs(0) == 0.5 and theirs(600) > 0.997
        for off in (-600, -1, 1, 600):
            assert exact(True, 1000 + off, 1000) < exact(True, 1000, 1000) == 1.0
            assert exact(False, 1000 + off, 1000) < exact(False, 1000, 1000) == 0.0

    def test_the_multiplier_gave_every_exact_prompt_nothing(self) -> None:
        for length in (0, 900, 1000, 1100):
            delta_score = (1 - abs(length - 1000) / 3000) - 1  # get_delta_score_linear
            assert max(0, delta_score) * 1 == 0
        assert exact(True, 1000, 1000) == 1.0 and exact(True, 900, 1000) == pytest.approx(0.97)

    def test_a_prompt_without_a_length_returned_a_bare_bool(self) -> None:
        """Where the caller unpacked two values: num_tokens = -1, and any prompt where no flag was set."""
        for objective, mode, target in (("correctness", "none", None), ("exact", "exact", 5), ("max", "max", 5)):
            got = batch_rewards(
                RewardConfig(objective=objective),
                correct=[True, False],
                lengths=[5, 5],
                targets=[target] * 2,
                modes=[mode] * 2,
                groups=[0, 0],
            )
            assert isinstance(got, Rewards)
            assert got.total.dtype == np.float64 and got.total.shape == (2,) and got.kept.dtype == np.bool_

    def test_the_sign_of_a_target_means_nothing(self) -> None:
        """-512 was a maximum, and -1 no length: a maximum of one token could not be asked."""
        assert limited(True, 1, 1) == 0.5 and limited(True, 1001, 1) == pytest.approx(0.2)
        for target in (-512, -1, 0):
            for objective in ("exact", "max"):
                with pytest.raises(ValueError, match=rf"targets\[0\]={target}: give at least 1; the mode says"):
                    one(RewardConfig(objective=objective), True, 100, target, objective)

    def test_one_alpha_served_both_modes(self) -> None:
        """A dual batch: each prompt by its own equation with its own alpha, in the order of the batch."""
        got = batch_rewards(
            RewardConfig(objective="dual", alphas=RELEASE),
            correct=[True, True, False, False],
            lengths=[1300, 1300, 1300, 1300],
            targets=[1000, 1000, 1000, 1000],
            modes=["max", "exact", "max", "exact"],
            groups=[0, 1, 2, 3],
        )
        assert got.total == pytest.approx([0.2, 0.9, 0.0, -0.1])
        alphas = Alphas(exact=0.5, max=0.125)
        assert exact(True, 3, 1, alphas) == 0.0 and limited(True, 3, 1, alphas) == 0.25

    def test_the_linear_max_reward_had_half_its_alpha(self) -> None:
        """linear_both clips alpha * (n_gold - n_y) to [-1, 1] before it halves it: Eq. 2 with alpha / 2."""

        def theirs(length: int, alpha: float) -> float:
            return (max(-1, min(1, alpha * (1000 - length))) + 1) / 2

        for length in (700, 1000, 1200):
            assert theirs(length, 0.002) == pytest.approx(limited(True, length, 1000, Alphas(1.0, 0.001)))
        assert limited(True, 1100, 1000, Alphas(1.0, 0.002)) == pytest.approx(0.3)

    def test_the_additive_max_reward_paid_for_being_short(self) -> None:
        """delta_score + correctness: a wrong answer of one token had as much as a right one far above the limit.

        Training by it collapsed to very short answers (the paper, A.7).
        """

        def additive(correct: bool, length: int) -> float:
            return (max(-1, min(1, (1000 - length) / 500)) + 1) / 2 + correct

        assert additive(False, 1) == additive(True, 1500) == 1.0
        assert [limited(False, length, 1000, RELEASE) for length in (1, 500, 1000, 1500)] == [0.0] * 4
        assert limited(True, 1499, 1000, RELEASE) > 0

    def test_every_sample_was_printed(self, capfd: pytest.CaptureFixture[str]) -> None:
        exact(True, 3, 1)
        assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("length", "penalty"),
    [(1, 0.0), (16384, 0.0), (17408, -0.25), (18432, -0.5), (20480, -1.0), (20481, -1.0), (40000, -1.0)],
)
def test_dapos_penalty_by_hand(length: int, penalty: float) -> None:
    """L_max = 20480, L_cache = 4096: from 16,384 tokens on."""
    assert overlong_penalty(np.array([length]), 20480, 4096).tolist() == [penalty]


@given(st.lists(st.tuples(st.booleans(), TOKENS), min_size=2, max_size=16))
def test_the_overlong_reward_is_dapos_up_to_scale(rollouts: list[tuple[bool, int]]) -> None:
    """Theirs is 1 or -1 for the answer, plus the penalty. Ours is that, halved, plus a half."""
    config = RewardConfig(objective="correctness", overlong=Overlong(20480, 4096))
    for correct, length in rollouts:
        over = min(max(length - 16384, 0), 4096) / 4096
        theirs = (1 if correct else -1) - over
        assert one(config, correct, length, None, "none") == pytest.approx((theirs + 1) / 2)
        assert one(RewardConfig(objective="correctness"), correct, length, None, "none") == float(correct)


def test_a_group_with_a_gold_answer_that_cannot_be_read_is_left_out() -> None:
    """All of it, also where other grades were found; the rest of the batch is untouched."""
    got = batch_rewards(
        RewardConfig(objective="exact"),
        correct=[True, None, False, True, None, False],
        lengths=[100] * 6,
        targets=[100, 200, 200, 100, 300, 100],
        modes=["exact"] * 6,
        groups=[7, 3, 3, 7, 0, 7],
    )
    assert got.kept.tolist() == [True, False, False, True, False, True]
    assert got.total[got.kept].tolist() == [1.0, 1.0, 0.0] and np.isnan(got.total[~got.kept]).all()
    nothing = batch_rewards(RewardConfig(objective="exact"), correct=[], lengths=[], targets=[], modes=[], groups=[])
    assert nothing.total.shape == nothing.kept.shape == (0,)


@given(st.permutations(range(12)))
def test_the_order_of_the_batch_does_not_matter(order: list[int]) -> None:
    batch: dict[str, list[Any]] = {
        "correct": [True, False, None, True] * 3,
        "lengths": [100 * i for i in range(12)],
        "targets": [500, 300, 700, 900] * 3,
        "modes": ["exact", "max", "max", "exact"] * 3,
        "groups": [0, 1, 2, 3] * 3,
    }
    config = RewardConfig(objective="dual", alphas=RELEASE)
    straight = batch_rewards(config, **batch)
    mixed = batch_rewards(config, **{name: [values[i] for i in order] for name, values in batch.items()})
    np.testing.assert_array_equal(mixed.total, straight.total[order])
    np.testing.assert_array_equal(mixed.kept, straight.kept[order])


def test_arrays_are_read_like_lists() -> None:
    got = batch_rewards(
        RewardConfig(objective="exact"),
        correct=np.array([True, False]),
        lengths=np.array([3, 4], dtype=np.int32),
        targets=np.array([3, 3]),
        modes=["exact"] * 2,
        groups=np.array([1, 1]),
    )
    assert got.total == pytest.approx([1.0, -0.0003])
    ones = np.ones(1, dtype=bool)
    assert lcpo_exact(ones, np.array([3]), np.array([1]), 0.25).tolist() == [0.5]
    assert lcpo_max(ones, np.array([3]), np.array([1]), 0.125).tolist() == [0.25]


GOOD: dict[str, Any] = {
    "correct": [True, False],
    "lengths": [10, 20],
    "targets": [30, 30],
    "modes": ["exact", "exact"],
    "groups": [0, 0],
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": [10]}, "lengths has 1 entries, correct has 2"),
        ({"correct": [True, 1]}, r"correct\[1\]=1: give True, False, or None"),
        ({"correct": [True, (True, 0.5)]}, r"correct\[1\]=\(True, 0.5\)"),
        ({"lengths": [10, -1]}, r"lengths\[1\]=-1: give a number of tokens"),
        ({"lengths": [10, 2.5]}, r"lengths\[1\]=2.5"),
        ({"lengths": [10, True]}, r"lengths\[1\]=True"),
        ({"targets": [30, None]}, r"targets\[1\]=None: give at least 1"),
        ({"targets": [30, 30.0]}, r"targets\[1\]=30.0"),
        ({"modes": ["exact", "maximum"]}, r"modes\[1\]='maximum': objective='exact' rewards prompts of mode exact"),
        (
            {"modes": ["max", "max"]},
            r"modes\[0\]='max': objective='exact' rewards prompts of mode exact; write the prompts",
        ),
        ({"modes": ["none", "none"], "targets": [None, None]}, r"modes\[0\]='none'"),
        ({"targets": [30, 31]}, r"groups\[1\]=0: asks exact 31, but the group asks exact 30"),
    ],
)
def test_a_bad_batch_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batch_rewards(RewardConfig(objective="exact"), **(GOOD | changes))


def test_a_target_that_nobody_asked_is_refused() -> None:
    with pytest.raises(ValueError, match=r"targets\[0\]=30: mode 'none' asks no length; give None"):
        one(RewardConfig(objective="correctness"), True, 10, 30, "none")
    with pytest.raises(ValueError, match=r"groups\[1\]=0: asks max 30, but the group asks exact 30"):
        batch_rewards(RewardConfig(objective="dual"), **(GOOD | {"modes": ["exact", "max"]}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "lcpo"}, "objective='lcpo': must be one of correctness, exact, max, dual"),
        ({"objective": "max", "delta": 1.5}, "delta=1.5: must be between 0 and 1"),
        ({"objective": "max", "delta": float("nan")}, "delta=nan"),
        ({"objective": "exact", "count": "answer"}, "count='answer': must be one of response, thinking"),
        ({"objective": "exact", "delta": 0.4}, "delta=0.4: objective='exact' does not read it"),
        ({"objective": "max", "violation": -0.1}, "violation=-0.1: must be at least 0"),
        ({"objective": "max", "violation": float("nan")}, "violation=nan"),
        ({"objective": "exact", "violation": 0.1}, "violation=0.1: objective='exact' does not read it"),
        ({"objective": "correctness", "alphas": RELEASE}, "objective='correctness' does not read it"),
        ({"objective": "correctness", "count": "thinking"}, "count='thinking': objective='correctness'"),
        ({"objective": "dual", "overlong": Overlong(100, 10)}, "overlong=.*objective='dual' does not read it"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardConfig(**settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Alphas(-0.0003, 0.001), r"alphas.exact=-0.0003: must be above 0"),
        (lambda: Alphas(0.0003, float("inf")), r"alphas.max=inf"),
        (lambda: Overlong(0, 0), r"overlong.max_tokens=0"),
        (lambda: Overlong(100, 0), r"overlong.cache=0: must be from 1 to overlong.max_tokens=100"),
        (lambda: Overlong(100, 101), r"overlong.cache=101"),
        (lambda: Overlong(100, 10, 0.0), r"overlong.weight=0.0"),
    ],
)
def test_bad_numbers_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def completion(num_tokens: int, thinking: ThinkingOutput | None) -> CompletionOutput:
    mask = [False] * num_tokens
    return CompletionOutput(0, "", list(range(num_tokens)), None, None, "stop", None, mask, mask, thinking, "")


def test_what_counts_as_length() -> None:
    assert counted_tokens(completion(9, None), "response") == 9
    assert counted_tokens(completion(9, ThinkingOutput("", 4, "natural")), "thinking") == 4
    with pytest.raises(ValueError, match=r"count='thinking': .*give its request a ThinkingBudget"):
        counted_tokens(completion(9, None), "thinking")


def test_a_real_response_is_counted_with_its_end_of_turn() -> None:
    """The paper's n_y is the mask of the response: thinking, answer and EOS."""
    llm = LLM(str(TINY))
    prompt = "<|im_start|>user\n4 a:+3 b:*3 c:+5 d:+4<|im_end|>\n<|im_start|>assistant\n<|im_start|>think"
    params = SamplingParams(max_tokens=200, temperature=0, thinking=ThinkingBudget(max_tokens=150))
    output = llm.generate(prompt, params, use_tqdm=False)[0].outputs[0]
    thinking = counted_tokens(output, "thinking")
    answer = output.token_ids[thinking:]
    assert llm.get_tokenizer().decode(answer) == "<|im_start|>answer\nFinal Answer: 0<|im_end|>"
    assert counted_tokens(output, "response") == thinking + len(answer)
