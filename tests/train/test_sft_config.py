"""Settings of `s1engine sft`: what is refused before anything is loaded, and the learning rate."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from s1engine.train.sft_config import SftConfig, deepspeed_config, learning_rate, read_config

CONFIGS = Path(__file__).parents[2] / "train" / "configs"
REQUIRED = 'model = "m"\noutput = "o"\ndata = "d.jsonl"\n'


def config(**settings) -> SftConfig:
    return SftConfig(model="m", output="o", data="d.jsonl", **settings)


def read(tmp_path: Path, text: str, *changes: str) -> SftConfig:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return read_config(path, list(changes))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('model = "m"\n', "output is missing"),
        (REQUIRED + "batchsize = 3\n", "batchsize is not a setting; there are model"),
        (REQUIRED + "batch_size = 0\n", "batch_size=0: must be at least 1"),
        (REQUIRED + "batch_size = 1.5\n", "batch_size=1.5: must be of type int"),
        (REQUIRED + "shuffle = 1\n", "shuffle=1: must be of type bool"),
        (REQUIRED + "warmup = 3\n", "warmup=3: must be between 0 and 1"),
        (REQUIRED + 'dtype = "float16"\n', "dtype='float16': must be one of bfloat16, float32"),
        (REQUIRED + "max_tokens = 100\nrow_tokens = 50\n", "row_tokens=50 is below max_tokens=100"),
        (REQUIRED + "offload_layers = true\ncheckpointing = false\n", "set checkpointing = true"),
        (REQUIRED + "validate_every = 5\n", "set validation_data"),
        (REQUIRED + "validation_budgets = [1, 'x']\n", r"validation_budgets=.*: must be of type list\[int\]"),
        ("model = ", "run.toml: Invalid value"),
    ],
)
def test_what_cannot_be_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text)


def test_changes_and_paths_beside_the_file(tmp_path):
    (tmp_path / "d.jsonl").write_text("")
    found = read(tmp_path, REQUIRED, "learning_rate=2e-4", "template=chat", "columns={question='q'}", "shuffle=false")
    assert (found.learning_rate, found.template, found.shuffle) == (2e-4, "chat", False)
    assert found.columns == {"question": "q"}
    assert found.data == str(tmp_path / "d.jsonl")
    assert found.row_tokens == found.max_tokens
    with pytest.raises(ValueError, match="must be name=value"):
        read(tmp_path, REQUIRED, "learning_rate")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_batch_size": 32}, "train_batch_size=32, but batch_size=16: leave it out here"),
        ({"train_micro_batch_size_per_gpu": 2}, "train_micro_batch_size_per_gpu cannot be set: a micro-batch is a row"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps cannot be set"),
        ({"gradient_clipping": 0.1}, "gradient_clipping is 0.1, but this run's settings say 1.0"),
        ({"bf16": {"enabled": False}}, "bf16 is False, but this run's settings say True"),
        ({"fp16": {"enabled": True}}, "fp16 cannot be set here"),
        ({"optimizer": {"type": "Adam"}}, "optimizer cannot be set here"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler cannot be set here"),
    ],
)
def test_contradictions_of_deepspeeds_file(tmp_path, settings, message):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}} | settings))
    with pytest.raises(ValueError, match=message):
        deepspeed_config(config(deepspeed=str(path)))


def test_auto_and_own_settings_of_deepspeed(tmp_path):
    path = tmp_path / "ds.json"
    given = {
        "train_batch_size": "auto", "gradient_clipping": "auto",
        "bf16": {"enabled": "auto", "check_grad_overflow": False},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 5}, "steps_per_print": 7, "fp16": {"enabled": False},
    }  # fmt: skip
    path.write_text(json.dumps(given))
    found = deepspeed_config(config(deepspeed=str(path), clip=0.3))
    assert found["gradient_clipping"] == 0.3
    assert found["bf16"] == {"enabled": True, "check_grad_overflow": False}
    assert found["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 5}
    assert found["steps_per_print"] == 7
    path.write_text("{")
    with pytest.raises(ValueError, match=r"ds\.json"):
        deepspeed_config(config(deepspeed=str(path)))


def test_the_papers_schedule():
    """16 steps up, then half a cosine over the other 299 down to 0."""
    rates = [learning_rate(config(), step, 315) for step in range(315)]
    assert rates.index(max(rates)) in (15, 16)
    assert max(rates) == pytest.approx(1e-5, rel=1e-3)
    assert rates[0] == pytest.approx(1e-5 / 16)
    assert rates[165] == pytest.approx(0.5e-5, rel=0.02)
    assert 0 < rates[-1] < 1e-9
    assert all(a > b for a, b in pairwise(rates[16:]))


def test_a_flat_part_and_a_floor():
    settings = config(schedule="linear", decay_from=0.6, final=0.1, warmup=0.1)
    rates = [learning_rate(settings, step, 100) / 1e-5 for step in range(101)]
    assert rates[9:61] == pytest.approx([1.0] * 52)
    assert rates[80] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)


OF_GRPO = ("l1-", "tiny-l1-exact", "tiny-l1-max")
RECIPES = [path for path in sorted(CONFIGS.glob("*.toml")) if not path.stem.startswith(OF_GRPO)]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_can_be_read(path):
    found = read_config(path)
    assert deepspeed_config(found)["train_micro_batch_size_per_gpu"] == 1
