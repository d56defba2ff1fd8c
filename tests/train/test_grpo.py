"""`s1engine grpo` as it is started, on the tiny reasoner: parity, resuming, ranks, and what it refuses."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from conditions import needs_csrc
from grpo_runs import ROOT, command, environment, grpo, metrics, write_config

from s1engine.train.grpo_config import GrpoConfig
from s1engine.train.sft_config import read_settings

pytest.importorskip("deepspeed", reason="training is an extra: pip install 's1engine[train]'")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return grpo(write_config(tmp_path_factory.mktemp("grpo")))


@needs_csrc
def test_engine_and_trainer_agree_to_the_last_bit_on_every_token(undisturbed: list[dict[str, Any]]) -> None:
    assert [step["step"] for step in undisturbed] == [1, 2, 3]
    for step in undisturbed:
        assert step["tokens"] > 100 and step["mismatch_unequal"] == 0 and step["mismatch_max"] == 0
        assert step["grad_norm"] > 0 and step["groups"] == 4
    assert len({step["loss"] for step in undisturbed}) == 3


@needs_csrc
def test_a_run_that_is_killed_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, undisturbed: list[dict[str, Any]]
) -> None:
    """Once while it rolls out, so that some groups of a step are there and others not, and once after a checkpoint."""
    config = write_config(tmp_path)
    rollouts = config.parent / "out" / "rollouts"
    for until in (lambda: len(metrics(config)) >= 1, lambda: (rollouts / "step-3-rank-0.jsonl").exists()):
        process = subprocess.Popen(
            command(config), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        while process.poll() is None and not until() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert grpo(config) == undisturbed


def test_two_ranks_learn_what_one_does(tmp_path: Path, undisturbed: list[dict[str, Any]]) -> None:
    both = grpo(write_config(tmp_path), ranks=2)
    # Sums in another order move the weights by an ulp, and a later rollout may turn at one.
    for name in ("reward", "length", "accuracy", "tokens", "draws"):
        assert both[0][name] == undisturbed[0][name]
    assert both[0]["loss"] == pytest.approx(undisturbed[0]["loss"], rel=1e-5, abs=1e-7)
    assert both[0]["grad_norm"] == pytest.approx(undisturbed[0]["grad_norm"], rel=1e-4)


def test_a_reference_holds_the_policy(tmp_path: Path) -> None:
    """Its KL is 0 at the first step, and not at later ones; an entropy bonus is reported with it."""
    steps = grpo(write_config(tmp_path, kl_coefficient=0.1, entropy_coefficient=0.01, updates=1, steps=2))
    assert abs(steps[0]["reference_kl"]) < 1e-9 < steps[1]["reference_kl"] and steps[0]["entropy"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group": 1}, "group=1: must be at least 2"),
        ({"updates": 3}, "updates=3: must divide prompts=4"),
        ({"temperature": 0.0}, "temperature=0.0: must be above 0"),
        ({"objective": "short"}, "objective='short'"),
        ({"targets": ["uniform", 90, 20]}, "targets.high=20"),
        ({"evaluate_every": 2}, "needs evaluation_targets and hold_out"),
        ({"alphas": "mine"}, "alphas='mine': must be paper, first-release"),
        ({"steps": "many"}, "steps='many': must be of type int"),
        ({"loss": "ppo"}, "loss='ppo': must be one of dapo"),
    ],
)
def test_what_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        read_settings(GrpoConfig, write_config(tmp_path, **changes))


@pytest.mark.parametrize("name", ["l1-exact.toml", "l1-max.toml", "tiny-l1-exact.toml", "tiny-l1-max.toml"])
def test_the_configurations_that_ship_are_valid(name: str) -> None:
    config = read_settings(GrpoConfig, ROOT / "train" / "configs" / name)
    assert config.prompting.objective == config.rewarding.objective
