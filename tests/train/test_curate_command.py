"""`s1engine curate`: each stage from file to file, the chain from a config, the same bytes twice on the real data."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conditions import data_folder

from s1engine.train.curate import command, engine_model, stages
from s1engine.train.curate.labels import UNLABELLED
from s1engine.train.curate.msc import MSC
from s1engine.train.curate.replies import Conversation, Reply
from s1engine.train.curate.rows import question_key, read_rows, write_rows
from s1engine.train.tiny import MODEL_DIR, problems


def curate(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(argv))


class Labels:
    """In the place of an endpoint: a code by the question's hash; counts what it is asked."""

    asked = 0

    def __init__(self, url: str, model: str, **settings: Any) -> None:
        pass

    def __call__(
        self, conversations: Sequence[Conversation], seeds: Sequence[int], temperature: float
    ) -> Iterator[tuple[int, Reply]]:
        for index, conversation in enumerate(conversations):
            Labels.asked += 1
            code = list(MSC)[int(question_key(conversation[-1]["content"]), 16) % len(MSC)]
            yield index, Reply(code, 1, "stop")


@pytest.fixture
def labels(monkeypatch: pytest.MonkeyPatch) -> type[Labels]:
    monkeypatch.setattr(stages, "Endpoint", Labels)
    Labels.asked = 0
    return Labels


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """60 problems of the tiny reasoner with traces, and a few bad ones."""
    path = tmp_path / "pool.jsonl"
    rows: list[dict[str, Any]] = []
    for i, problem in enumerate(problems("test", 60)):
        attempt = problem.answer if i % 3 else "nothing"
        source = ("AIME", "gpqa", "other")[i % 3]
        rows.append({"problem": problem.question, "answer": problem.answer, "attempt": f"\\boxed{{{attempt}}}"})
        rows[-1] |= {"thinking": "a:1+1=2\n" * (i + 1), "source": source, "id": i}
    rows += [{**rows[0], "id": 60}, {**rows[1], "id": 61, "thinking": ""}]
    rows += [{**rows[2], "id": 62, "error": "429"}, {**rows[3], "id": 63, "problem": "See ![Image]"}]
    write_rows(path, rows)
    return path


def config(tmp_path: Path, pool: Path) -> Path:
    (tmp_path / "eval.jsonl").write_text(json.dumps({"question": problems("test", 60)[5].question}) + "\n")
    path = tmp_path / "curate.toml"
    path.write_text(
        f"""
        input = ["{pool}"]
        seed = 3
        [decontaminate]
        against = ["{tmp_path / "eval.jsonl"}"]
        add-accepted = true
        [difficulty]
        model = ["{MODEL_DIR}"]
        tokenizer = "{MODEL_DIR}"
        suffix = ""
        max_tokens = 320
        device = "cpu"
        [label]
        endpoint = "http://localhost:1/v1"
        label_model = "stand-in"
        [select]
        size = 20
        uniform-until = 14
        """
    )
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_and_its_funnel(
    tmp_path: Path,
    pool: Path,
    labels: type[Labels],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    assert curate("run", "--config", str(config(tmp_path, pool)), "--output", str(out)) == 0
    table = capsys.readouterr().out
    assert table == (out / "funnel.md").read_text()
    assert "| input | 64 |" in table and "| selected | 20 |" in table and "59,029" in table
    assert "| missing | 62 | API error 1, no trace 1 |" in table
    assert "| format | 61 | ![Image] 1 |" in table
    assert "| contamination | 59 | repeated 1, shared run 1 |" in table
    selected = read_rows([str(out / "5-select.jsonl")])
    assert all(row["domain"] in MSC and row["trace_tokens"] and "correct" in row for row in selected)
    # What is kept first is right, and of AIME or GPQA; the ids at multiples of 3 have a wrong attempt.
    hard = read_rows([str(out / "3-difficulty.jsonl")])
    assert {row["id"] for row in hard if row["id"] % 3 == 1} <= {row["id"] for row in selected}
    assert all(row["correct"] == (row["id"] % 3 > 0) for row in hard)
    reports = json.loads((out / "report.json").read_text())
    assert [report["stage"] for report in reports] == ["quality", "decontaminate", "difficulty", "label", "select"]
    for before, after in pairwise(reports):
        assert before["rows_out"] == after["rows_in"]
    for number, report in enumerate(reports, 1):
        removed = (out / f"{number}-{report['stage']}.removed.jsonl").read_text().splitlines()
        assert len(removed) == report["rows_in"] - report["rows_out"]

    first, asked = files(out), labels.asked

    def refuse(*args: Any, **settings: Any) -> None:
        raise AssertionError("a model was loaded for nothing")

    with monkeypatch.context() as patch:
        patch.setattr(engine_model, "LLM", refuse)
        assert curate("run", "--config", str(config(tmp_path, pool)), "--output", str(out)) == 0
    assert files(out) == first and labels.asked == asked
    assert curate("run", "--config", str(config(tmp_path, pool)), "--output", str(tmp_path / "again")) == 0
    assert files(tmp_path / "again") == first


def test_stages_one_by_one_give_the_same(tmp_path: Path, pool: Path, labels: type[Labels]) -> None:
    out = tmp_path / "out"
    settings = config(tmp_path, pool)
    curate("run", "--config", str(settings), "--output", str(out))
    steps = {
        "quality": [],
        "decontaminate": ["--against", str(tmp_path / "eval.jsonl")],
        "difficulty": ["--model", str(MODEL_DIR), "--tokenizer", str(MODEL_DIR), "--suffix", "", "--max-tokens", "320"],
        "label": ["--endpoint", "http://localhost:1/v1", "--label-model", "stand-in", "--seed", "3"],
        "select": ["--size", "20", "--uniform-until", "14", "--seed", "3"],
    }
    steps["difficulty"] += ["--seed", "3", "--device", "cpu"]
    source = pool
    for number, (stage, options) in enumerate(steps.items(), 1):
        target = tmp_path / f"{number}-{stage}.jsonl"
        assert curate(stage, "--input", str(source), "--output", str(target), *options) == 0
        assert target.read_bytes() == (out / target.name).read_bytes()
        assert target.with_suffix(".report.json").is_file() and target.with_suffix(".removed.jsonl").is_file()
        source = target


def test_an_option_that_changes_replies_asks_anew(tmp_path: Path, pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []

    class Stub:
        def __init__(self, model: str, **settings: Any) -> None:
            made.append(settings)

        def __call__(self, conversations: Sequence[Conversation], *_: Any) -> Iterator[tuple[int, Reply]]:
            return ((index, Reply("no answer", 1, "stop")) for index in range(len(conversations)))

    monkeypatch.setattr(engine_model, "EngineModel", Stub)
    files = ["--input", str(pool), "--output", str(tmp_path / "hard.jsonl")]
    changes = ["--seed 1", "--max-tokens 9", "--ignore-end 1", "--thinking-tokens 5", "--min-answer-tokens 3"]
    changes += ["--dtype float32", "--quantization int8", "--max-model-len 99", "--thinking-format s1", "--suffix !"]
    changes += ["--temperature 0.5", "--model n"]
    for number, change in enumerate(["", *changes], 1):
        assert curate("difficulty", *files, "--model", "m", *change.split()) == 0
        assert len(made) == number, change
    budget = made[3]["thinking"]
    assert (budget.ignore_end, made[0]["thinking"], made[4]["thinking"].max_tokens) == (1, None, 5)
    for change in ("--max-num-seqs 7", "--device cpu", "--kind integer", "--drop-unreadable"):
        assert curate("difficulty", *files, "--model", "m", *change.split()) == 0
        assert len(made) == 1 + len(changes), change


def test_parquet_in_and_out(tmp_path: Path, pool: Path) -> None:
    pytest.importorskip("datasets")
    write_rows(tmp_path / "pool.parquet", read_rows([str(pool)]))
    for suffix in ("parquet", "jsonl"):
        out = tmp_path / f"clean.{suffix}"
        assert curate("quality", "--input", str(tmp_path / "pool.parquet"), "--output", str(out)) == 0
    from_parquet, from_lines = (read_rows([str(tmp_path / f"clean.{suffix}")]) for suffix in ("parquet", "jsonl"))
    assert from_parquet == from_lines and len(from_lines) == 61


def test_labels_can_be_a_column_and_stages_left_out(tmp_path: Path) -> None:
    pool = tmp_path / "pool.jsonl"
    write_rows(pool, [{"q": f"question {i}", "topic": "ab"[i % 2], "n": i} for i in range(9)] + [{"q": "x", "n": 0}])
    options = ["--question-column", "q", "--domain-column", "topic", "--length-column", "n"]
    chain = ["--stages", "label", "select", "--size", "4", "--uniform-until", "4"]
    assert curate("run", "--input", str(pool), "--output", str(tmp_path / "out"), *options, *chain) == 0
    assert sorted(p.name for p in (tmp_path / "out").glob("?-*.jsonl") if "removed" not in p.name) == [
        "1-label.jsonl",
        "2-select.jsonl",
    ]
    assert read_rows([str(tmp_path / "out" / "1-label.jsonl")], "q")[-1]["topic"] == UNLABELLED
    assert len(read_rows([str(tmp_path / "out" / "2-select.jsonl")], "q")) == 4


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["quality", "--input", "{pool}"], "--output: name a file"),
        (["quality", "--output", "x.jsonl"], "--input: name at least one"),
        (["quality", "--input", "{pool}", "--output", "{pool}"], "also an input"),
        (["quality", "--input", "{pool}", "--output", "x.txt"], "unknown suffix"),
        (["decontaminate", "--input", "{pool}", "--output", "x.jsonl"], "--against: name the evaluation sets"),
        (["difficulty", "--input", "{bare}", "--output", "x.jsonl"], "nothing to do; give --model"),
        (["difficulty", "--input", "{bare}", "--output", "x.jsonl", "--model", "m"], "no column for the answer"),
        (["difficulty", "--input", "{bare}", "--output", "x.jsonl", "--tokenizer", "t"], "no column for the trace"),
        (
            ["difficulty", "--input", "{pool}", "--output", "x.jsonl", "--model", "m", "--max-tokens", "0"],
            "max_tokens=0",
        ),
        (["label", "--input", "{bare}", "--output", "x.jsonl"], "give --label-model"),
        (["label", "--input", "{bare}", "--output", "x.jsonl", "--endpoint", "http://x"], "give --label-model as well"),
        (["select", "--input", "{bare}", "--output", "x.jsonl"], "no column for the domain"),
        (["run", "--input", "{pool}"], "--output: name the folder"),
        (["run", "--input", "{pool}", "--output", "x", "--model", "m"], "give --label-model"),
        (
            ["run", "--input", "{pool}", "--output", "x", "--model", "m", "--label-model", "m"],
            "draws by the length of traces; give --tok",
        ),
        (["run", "--input", "{pool}", "--output", "x", "--tokenizer", "t", "--label-model", "m"], "--against"),
        (
            ["run", "--input", "{pool}", "--output", "x", "--tokenizer", "t", "--label-model", "m", "--size", "0"],
            "--size 0",
        ),
    ],
)
def test_errors_come_before_any_model(
    tmp_path: Path, pool: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"problem": "q"}\n')
    with pytest.raises(ValueError, match=message):
        curate(*(word.format(pool=pool, bare=bare) for word in argv))
    assert not (tmp_path / "x.jsonl").exists() and not (tmp_path / "x").exists()


def test_a_config_is_checked_like_a_command_line(
    tmp_path: Path, pool: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.json"
    for content, message in (
        ('{"select": {"sizes": 5}}', "unrecognized arguments: --sizes=5"),
        ('{"size": "many"}', "invalid int value: 'many'"),
        ('["size"]', "it has to hold one JSON object"),
        ("{", "--config"),
    ):
        path.write_text(content)
        with pytest.raises(SystemExit):
            curate("run", "--config", str(path), "--output", "x")
        assert message in capsys.readouterr().err
    path.write_text('{"size": 5}')
    with pytest.raises(SystemExit):
        curate("run", "--size", "7", "--config", str(path))
    assert "--config has to come first, before --size" in capsys.readouterr().err
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    path.write_text('{"a": {"size": 5, "add-accepted": false}, "stages": ["label", "select"], "seed": 4}')
    args = parser.parse_args(["run", "--config", str(path), "--seed", "9"])
    assert (args.size, args.add_accepted, args.stages, args.seed) == (5, False, ["label", "select"], 9)


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for stage in ("quality", "decontaminate", "difficulty", "label", "select", "run"):
        with pytest.raises(SystemExit):
            curate(stage, "--help")
        assert f"example: s1engine curate {stage} " in capsys.readouterr().out


def test_a_stage_that_leaves_nothing_stops_the_chain(tmp_path: Path, labels: type[Labels]) -> None:
    pool = tmp_path / "pool.jsonl"
    write_rows(pool, [{"problem": "![Image]", "trace_tokens": 1}])
    options = ["--require", "question", "--endpoint", "http://x", "--label-model", "m", "--stages", "quality", "label"]
    with pytest.raises(ValueError, match=r"quality removed every row; .*1-quality\.removed\.jsonl says why"):
        curate("run", "--input", str(pool), "--output", str(tmp_path / "out"), *options)


@pytest.mark.slow
def test_the_real_files_give_the_same_bytes_twice(
    tmp_path: Path, labels: type[Labels], capsys: pytest.CaptureFixture[str]
) -> None:
    """s1K's questions and DeepScaleR's sample against every evaluation set. They have no traces: the question's length
    stands in for the trace's, and the tiny reasoner, who knows no mathematics, for the models that try.
    """
    data = data_folder()
    inputs = [str(data / "train" / name) for name in ("s1k_questions.jsonl", "deepscaler_sample.jsonl")]
    options = ["--input", *inputs, "--against", *map(str, sorted((data / "eval").glob("*.jsonl")))]
    options += ["--require", "question", "--trace-column", "problem", "--tokenizer", str(data / "tokenizers" / "qwen2")]
    options += ["--model", str(MODEL_DIR), "--suffix", "", "--max-tokens", "64", "--device", "cpu"]
    options += ["--endpoint", "http://localhost:1/v1", "--label-model", "stand-in", "--math-source", "train/math"]
    tables = []
    for name in ("first", "second"):
        assert curate("run", "--output", str(tmp_path / name), *options) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1] and files(tmp_path / "first") == files(tmp_path / "second")
    with capsys.disabled():
        print(tables[0])
    assert "| input | 2,908 |" in tables[0] and "| selected | 1,000 |" in tables[0]
    dropped = {row["id"]: row for row in read_rows([str(tmp_path / "first" / "2-decontaminate.removed.jsonl")])}
    for known, name in (("s1k-0081", "math500"), ("s1k-0181", "math500"), ("s1k-0124", "math500")):
        assert name in dropped[known]["sets"]
    for known in ("s1k-0631", "s1k-0255"):
        assert "olympiadbench_maths_en" in dropped[known]["sets"]
