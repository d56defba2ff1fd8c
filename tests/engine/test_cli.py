"""The command line, as a user types it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from s1engine.cli import main


def test_generate(model_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(model_folder("qwen2"))
    command = ["generate", folder, "so <think>", "--thinking-tokens", "3", "--max-tokens", "20", "-n", "2", "--json"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "--- sample 1" in out
    report = json.loads(out.splitlines()[-1])
    completion = report["outputs"][0]
    assert completion["thinking"]["num_tokens"] <= 3
    assert any(completion["forced_mask"]) and completion["text"] in out


def test_chat_template_and_standard_input(
    model_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(model_folder("qwen2"))
    monkeypatch.setattr("sys.stdin.read", lambda: "so?", raising=False)
    assert main(["generate", folder, "--chat", "-", "--max-tokens", "4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["prompt"].endswith("so?<|im_end|>\n<|im_start|>assistant\n") and len(report["prompt_token_ids"]) > 10


def test_chat(
    model_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["hello", "again", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert main(["chat", str(model_folder("qwen2")), "--max-tokens", "5"]) == 0
    assert len(capsys.readouterr().out) > 5


def test_errors_are_one_line(model_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(model_folder("qwen2"))
    for command, message in (
        (["generate", folder, "a", "--temperature", "-1"], "temperature"),
        (["generate", folder, "a", "--extension", "Hmm"], "--ignore-end"),
        (["generate", folder, "a" * 2000], "leave no room"),
        (["generate", "no/such/folder/at-all", "a"], "no/such/folder"),
    ):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert message in error.splitlines()[-1] and error.splitlines()[-1].startswith("s1engine: error: ")
        assert "Traceback" not in error


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"] == "cpu" and found["thinking machine"] in ("native", "table")


def test_throughput_bench(model_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--prompt-len", "8", "--new-tokens", "4", "--repeats", "2", "--batch", "1", "3", "--dtype", "float32"]
    folder = str(model_folder("qwen2", eos_token_id=5))  # an EOS that both engines have to ignore
    assert main(["bench", "throughput", "--model", folder, *sizes, "--json"]) == 0
    out = capsys.readouterr().out.splitlines()
    rows = json.loads(out[-1])["rows"]
    assert [(r["batch"], r["engine"]) for r in rows] == [
        (b, name) for b in (1, 3) for name in ("s1engine", "transformers")
    ]
    assert all(r["tokens_per_second"] > 0 and r["share_of_floor"] > 0 for r in rows)
    assert "of floor" in out[0]


@pytest.mark.parametrize("command", ["", "generate", "chat", "env", "bench", "bench throughput"])
def test_help_has_an_example(command: str) -> None:
    run = [sys.executable, "-m", "s1engine.cli", *command.split(), "--help"]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if command not in ("", "bench"):
        assert "example: s1engine " + command in done.stdout


def test_the_example_of_generate(capsys: pytest.CaptureFixture[str]) -> None:
    """The command that `--help` and the README show, with the shipped model."""
    from s1engine.train.tiny import MODEL_DIR

    assert main(["generate", str(MODEL_DIR), "--chat", "3 a:+5 b:*9 c:-7", "--ignore-end", "1"]) == 0
    out = capsys.readouterr().out
    assert "Wait" in out and "Final Answer: 5" in out
