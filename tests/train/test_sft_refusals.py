"""What `s1engine sft` refuses: with the field and the fix, before a weight is loaded (there are none in the folder)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from s1engine.train.sft import main
from s1engine.train.tiny import MODEL_DIR

pytest.importorskip("deepspeed", reason="training is an extra: pip install 's1engine[train]'")

GOOD = {"input_ids": [5, 6, 7], "weights": [0.0, 1.0, 1.0]}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((MODEL_DIR / name).read_bytes())
    return folder


def refused(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], rows: list, **settings) -> str:
    """Runs, and returns what is said."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    values = {
        "model": str(model), "data": str(data), "output": str(tmp_path / "out"), "template": "tokens", "max_tokens": 64,
    }  # fmt: skip
    config = tmp_path / "run.toml"
    config.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in (values | settings).items()))
    assert main(["--config", str(config)]) == 2
    assert not (tmp_path / "out").exists()
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "empty; it needs at least one row"),
        ([GOOD, "{"], "line 2: not JSON"),
        ([GOOD, {"input_ids": [5, 100_000]}], "line 2, input_ids: id 100000 at 1 is outside the vocabulary"),
        ([{"input_ids": [5, 6], "weights": [1.0]}], "line 1, weights: 1 values for 2 input_ids"),
        ([{"text": "x"}], "line 1: no column 'input_ids'"),
        ([{"input_ids": list(range(70))}], "the longest has 70 tokens; raise max_tokens"),
    ],
)
def test_data(tmp_path, model, capsys, rows, message):
    assert message in refused(tmp_path, model, capsys, rows)


def test_a_tokenizer_without_the_template(tmp_path, model, capsys):
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": None}))
    (model / "chat_template.jinja").unlink()
    row = {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}
    assert "chat template" in refused(tmp_path, model, capsys, [row], template="chat")


def test_contradictory_batch_sizes(tmp_path, model, capsys):
    settings = tmp_path / "ds.json"
    settings.write_text(json.dumps({"train_batch_size": 64}))
    message = refused(tmp_path, model, capsys, [GOOD], deepspeed=str(settings), batch_size=16)
    assert "train_batch_size=64, but batch_size=16" in message


def test_an_architecture_that_only_transformers_has(tmp_path, model, capsys):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps(config | {"architectures": ["GemmaForCausalLM"], "model_type": "gemma"})
    )
    assert "GemmaForCausalLM" in refused(tmp_path, model, capsys, [GOOD])


def test_samples_longer_than_the_model(tmp_path, model, capsys):
    assert "has 1024 positions; lower it" in refused(tmp_path, model, capsys, [GOOD], max_tokens=5000)


def test_validation_data_without_answers(tmp_path, model, capsys):
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"question": "1"}) + "\n")
    message = refused(tmp_path, model, capsys, [GOOD], validate_every=1, validation_data=str(questions))
    assert "line 1: no column 'answer'" in message


def test_columns_that_no_template_knows(tmp_path, model, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(GOOD) + "\n")
    config = tmp_path / "run.toml"
    config.write_text(
        f'model = "{model}"\ndata = "{data}"\noutput = "{tmp_path}/out"\nmax_tokens = 64\ncolumns = {{trace = "x"}}\n'
    )
    assert main(["--config", str(config)]) == 2
    assert "trace" in capsys.readouterr().err
