"""`s1engine sft` as it is started: by torchrun with two processes, and plainly; against a plain PyTorch loop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from s1engine.models import load_model
from s1engine.train.tiny import MODEL_DIR, prepare, problems

ROOT = Path(__file__).parents[2]
STEPS, BATCH = 6, 4

pytest.importorskip("deepspeed", reason="training is an extra: pip install 's1engine[train]'")


def write_data(path: Path, vocab: int, count: int = STEPS * BATCH, longest: int = 40) -> Path:
    """Rows of token ids: some tokens without weight, some with a target of their own."""
    random = np.random.default_rng(0)
    with path.open("w") as file:
        for _ in range(count):
            ids = random.integers(3, vocab, random.integers(2, longest)).tolist()
            weights = random.choice([0.0, 1.0, 3.0], len(ids)).tolist()
            weights[-1] = 1.0
            targets = [int(random.integers(3, vocab)) if random.random() < 0.1 else i for i in ids]
            file.write(json.dumps({"input_ids": ids, "targets": targets, "weights": weights}) + "\n")
    return path


def write_config(folder: Path, model: Path, data: Path, stage: int | None = None, **settings) -> Path:
    values = {
        "model": str(model), "data": str(data), "template": "tokens", "output": str(folder / "out"),
        "max_tokens": 48, "row_tokens": 64, "batch_size": BATCH, "epochs": 1, "dtype": "float32",
        "learning_rate": 1e-3, "warmup": 0.3, "clip": 0.5, "weight_decay": 0.1,
    }  # fmt: skip
    if stage is not None:
        (folder / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        values["deepspeed"] = str(folder / "zero.json")
    path = folder / "config.toml"
    path.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in (values | settings).items()))
    return path


def command(config: Path, ranks: int, *options: str) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launcher, "-m", "s1engine.train.sft", "--config", str(config), *options]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}


def sft(config: Path, ranks: int = 1, *options: str) -> list[dict]:
    """Runs to the end; returns the lines of its metrics."""
    ran = subprocess.run(
        command(config, ranks, *options), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return metrics(config)


def metrics(config: Path) -> list[dict]:
    file = config.parent / "out" / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def plain_losses(model: Path, data: Path) -> tuple[list[float], list[float]]:
    """The same run as ten lines of PyTorch over transformers' model, sample by sample: losses and gradient norms."""
    from s1engine.train.packing import step_samples

    net = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    matrices = [p for p in net.parameters() if p.dim() > 1]
    vectors = [p for p in net.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    losses, norms = [], []
    for step in range(STEPS):
        total = torch.zeros(())
        samples = [rows[i] for i in step_samples(len(rows), BATCH, 0, step)]
        weight = sum(sum(row["weights"][1:]) for row in samples)
        for row in samples:
            logits = net(torch.tensor([row["input_ids"]])).logits[0, :-1]
            each = torch.nn.functional.cross_entropy(logits, torch.tensor(row["targets"][1:]), reduction="none")
            total = total + each @ torch.tensor(row["weights"][1:]) / weight
        total.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)))
        warmup = 2  # 0.3 of the steps
        done = max(0.0, (step - warmup) / (STEPS - warmup))
        rate = (step + 1) / warmup if step < warmup else (1 + np.cos(np.pi * done)) / 2
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total.detach()))
    return losses, norms


@pytest.fixture(scope="module")
def small(make_model) -> Path:
    folder = make_model("qwen2", vocab_size=600, tie_word_embeddings=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((MODEL_DIR / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def data(small, tmp_path_factory) -> Path:
    vocab = len(transformers.AutoTokenizer.from_pretrained(small))
    return write_data(tmp_path_factory.mktemp("data") / "rows.jsonl", vocab)


@pytest.fixture(scope="module")
def expected(small, data) -> tuple[list[float], list[float]]:
    return plain_losses(small, data)


def check(lines: list[dict], expected: tuple[list[float], list[float]], norm: float = 1e-5) -> None:
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[0]["loss"] == pytest.approx(expected[0][0], rel=1e-6)
    assert lines[0]["grad_norm"] == pytest.approx(expected[1][0], rel=norm)
    assert [line["loss"] for line in lines] == pytest.approx(expected[0], rel=1e-5)
    assert [line["grad_norm"] for line in lines] == pytest.approx(expected[1], rel=1e-4)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_train_as_a_plain_loop_does(small, data, expected, tmp_path, stage):
    config = write_config(tmp_path, small, data, stage)
    check(sft(config, 2), expected)
    exported = load_model(str(tmp_path / "out" / "model"))
    assert exported.config.hidden_size == 96
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    with torch.no_grad():
        logits = theirs(torch.tensor([rows[0]["input_ids"]])).logits
    assert torch.isfinite(logits).all()


def test_batches_split_otherwise_give_the_same_losses(small, data, expected, tmp_path):
    """One rank; rows of one sample each, and rows that hold a whole step."""
    lines = {}
    for rows in (48, 4096):
        folder = tmp_path / str(rows)
        folder.mkdir()
        lines[rows] = sft(write_config(folder, small, data, row_tokens=rows, checkpointing=rows == 48))
        check(lines[rows], expected)
    assert lines[48][0]["loss"] == pytest.approx(lines[4096][0]["loss"], rel=1e-6)
    assert lines[48][0]["grad_norm"] == pytest.approx(lines[4096][0]["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_killed_run_goes_on_with_the_same_losses(small, data, tmp_path, stage):
    settings = {"save_every": 2, "dtype": "bfloat16", "keep": 1}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), cut.mkdir()
    undisturbed = sft(write_config(whole, small, data, stage, **settings), 2)
    config = write_config(cut, small, data, stage, **settings)
    run = subprocess.Popen(
        command(config, 2), cwd=ROOT, env=environment(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while len(metrics(config)) < 3 and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert metrics(config)
    resumed = sft(config, 2)
    for line, other in zip(undisturbed, resumed, strict=True):
        assert (line["loss"], line["grad_norm"]) == (other["loss"], other["grad_norm"])
    assert [path.name for path in (cut / "out" / "checkpoints").glob("step-*")] == [f"step-{STEPS}"]


def test_a_run_with_other_settings_does_not_go_on(small, data, tmp_path):
    config = write_config(tmp_path, small, data)
    sft(config)
    ran = subprocess.run(
        command(config, 1, "--set", "learning_rate=0.5"), cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert ran.returncode == 2
    assert "learning_rate is 0.001 there and 0.5 here" in ran.stderr


def test_a_run_that_diverges_stops(small, data, tmp_path):
    config = write_config(tmp_path, small, data, 1, learning_rate=1e30, clip=1e30)
    ran = subprocess.run(command(config, 1), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    assert ran.returncode == 2
    assert "lower learning_rate=1e+30" in ran.stderr
    assert len(metrics(config)) < STEPS and not (tmp_path / "out" / "model").exists()


def test_the_tiny_recipe_learns(tmp_path):
    """Its data, model and settings, for a few steps."""
    recipe = ROOT / "train" / "configs" / "tiny.toml"
    prepared = tmp_path / "tiny"
    prepare.main(["--out", str(prepared), "--steps", "30", "--validation-problems", "8"])
    changes = {
        "model": prepared / "model", "data": prepared / "traces.parquet", "output": tmp_path / "out",
        "validation_data": prepared / "validation.jsonl", "validate_every": 0,
    }  # fmt: skip
    options = [text for name, value in changes.items() for text in ("--set", f"{name}={value}")]
    ran = subprocess.run(
        command(recipe, 1, *options), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"] - 1


@pytest.mark.parametrize("stage", [0, 3])
def test_validation_answers_through_the_engine(tmp_path, stage):
    """The shipped model, changed by nothing: its accuracy, from the trainer's own parameters and from gathered ones."""
    questions = [
        {"question": problem.question, "answer": problem.answer} for problem in problems("validation", 40)
    ]  # fmt: skip
    validation = tmp_path / "validation.jsonl"
    validation.write_text("".join(json.dumps(row) + "\n" for row in questions))
    vocab = len(transformers.AutoTokenizer.from_pretrained(MODEL_DIR))
    data = write_data(tmp_path / "rows.jsonl", vocab, count=BATCH)
    config = write_config(
        tmp_path, MODEL_DIR, data, stage, learning_rate=0.0, validate_every=1, validation_data=str(validation),
        validation_budgets=[8, 300], validation_max_tokens=400,
    )  # fmt: skip
    _, found = sft(config, 2)
    assert 0.2 < found["accuracy_300"] < 0.8  # greedy, some 43 % of them
    assert found["accuracy_8"] < 0.3
    assert found["thinking_tokens_8"] <= 8 < found["thinking_tokens_300"]
    assert ("weights_seconds" in found) == (stage == 3)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_tiny_model_from_nothing(tmp_path, stage):
    prepare.main(["--out", str(tmp_path), "--steps", "1", "--validation-problems", "1"])
    # Below the id of padding, whose embedding transformers does not train.
    data = write_data(tmp_path / "rows.jsonl", 290)
    expected = plain_losses(tmp_path / "model", data)
    check(sft(write_config(tmp_path, tmp_path / "model", data, stage), 2), expected)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_half_billion_shape_in_four_layers(tmp_path_factory, tmp_path, stage):
    """Full width and vocabulary, two ranks, against transformers."""
    model = make_half_billion(tmp_path_factory)
    data = write_data(tmp_path / "rows.jsonl", len(transformers.AutoTokenizer.from_pretrained(MODEL_DIR)))
    # Norms of 136M float32 numbers: the order of such a sum moves it by 1e-5 to 1e-3, here by 5e-5.
    check(sft(write_config(tmp_path, model, data, stage), 2), plain_losses(model, data), norm=1e-4)


def make_half_billion(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("half-billion")
    settings = transformers.Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=4, num_attention_heads=14,
        num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True, dtype=torch.float32,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(settings).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((MODEL_DIR / name).read_bytes())
    return folder
