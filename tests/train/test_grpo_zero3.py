"""`s1engine grpo` on two ranks under ZeRO 3, where the engine decodes with a copy of the partitioned weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from grpo_runs import grpo, write_config

from s1engine.train.tiny import MODEL_DIR

pytest.importorskip("deepspeed", reason="training is an extra: pip install 's1engine[train]'")

# No parameter is small enough to stay whole. A reference, evaluations on one rank, and in the first step a row for one
# rank that the other has nothing for.
ZERO = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
SETTINGS: dict[str, Any] = {
    "kl_coefficient": 0.1, "kl": "k1", "hold_out": 0.2, "evaluate_every": 2, "evaluation_problems": 2,
    "evaluation_targets": [30, 60], "row_tokens": 220,
}  # fmt: skip


def steps(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def partitioned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """(The configuration of a run of three steps, its metrics)."""
    folder = tmp_path_factory.mktemp("zero3")
    (folder / "zero.json").write_text(json.dumps(ZERO))
    config = write_config(folder, deepspeed=str(folder / "zero.json"), **SETTINGS)
    return config, grpo(config, ranks=2)


def test_it_learns_what_one_rank_learns_without_zero(
    tmp_path: Path, partitioned: tuple[Path, list[dict[str, Any]]]
) -> None:
    whole = steps(grpo(write_config(tmp_path, **SETTINGS | {"steps": 1, "evaluate_every": 0})))[0]
    first = steps(partitioned[1])[0]
    for name in ("reward", "length", "accuracy", "tokens", "draws"):
        assert first[name] == whole[name]
    assert first["loss"] == pytest.approx(whole["loss"], rel=1e-5, abs=1e-7)
    # The mean over both updates: the second one's is of weights that the first one changed.
    assert first["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)


def test_the_engine_has_the_newest_weights(partitioned: tuple[Path, list[dict[str, Any]]]) -> None:
    """Its log-probabilities are the trainer's but for rounding, while the policy leaves the first model."""
    lines = steps(partitioned[1])
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["mismatch"] < 1e-5 and line["mismatch_max"] < 1e-3 for line in lines)  # of older weights: 0.1, 8
    assert abs(lines[0]["reference_kl"]) < 1e-7 and all(abs(line["reference_kl"]) > 1e-3 for line in lines[1:])
    assert len([line for line in partitioned[1] if "exact_spread" in line]) == 2
    matrices = (MODEL_DIR / "model.safetensors").stat().st_size
    assert lines[0]["bytes_weights"] == pytest.approx(matrices, rel=0.05)


def test_a_run_goes_on_with_the_weights_of_its_checkpoint(
    tmp_path: Path, partitioned: tuple[Path, list[dict[str, Any]]]
) -> None:
    config, undisturbed = partitioned
    out = tmp_path / "out"
    shutil.copytree(config.parent / "out", out)
    (out / "checkpoints" / "latest").write_text("step-2")
    for rollouts in (out / "rollouts").glob("step-3-*"):
        rollouts.unlink()
    (tmp_path / "config.toml").write_text(config.read_text().replace(str(config.parent / "out"), str(out)))
    assert grpo(tmp_path / "config.toml", ranks=2) == undisturbed
