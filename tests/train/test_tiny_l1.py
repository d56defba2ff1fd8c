"""The tiny L1's commands fit together, and its summary says what its rows say."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from s1engine.train.grpo_config import GrpoConfig
from s1engine.train.sft_config import SftConfig, read_settings
from s1engine.train.tiny import MODEL_DIR, l1, l1_summary

Row = dict[str, Any]


def test_each_stage_reads_what_the_one_before_wrote(tmp_path: Path) -> None:
    stages = {stage.name: stage for stage in l1.stages(tmp_path, seed=3, limit=300)}
    assert list(stages) == ["lengths", "start", "exact", "max", "eval"]
    model, data = MODEL_DIR, stages["lengths"].result
    for name, kind in (("start", SftConfig), ("exact", GrpoConfig), ("max", GrpoConfig)):
        _, command, _, file, *changes = stages[name].arguments
        config = read_settings(kind, Path(file), [change.removeprefix("--set=") for change in changes])
        assert command == ("sft" if kind is SftConfig else "grpo")
        assert (config.model, config.data, config.seed) == (str(model), str(data), 3)
        assert stages[name].result == Path(config.output) / "model"
        model, data = stages[name].result, tmp_path / "problems.jsonl"
    labels = [argument for argument in stages["eval"].arguments if argument.endswith("model") and "=" in argument]
    assert labels == [f"reasoner={MODEL_DIR}", *(f"{n}={stages[n].result}" for n in ("start", "exact", "max"))]


def test_what_is_there_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: ran.append(command[2:]))
    for name in ("lengths", "start", "exact"):
        result = next(stage.result for stage in l1.stages(tmp_path, 0, 500) if stage.name == name)
        result.parent.mkdir(exist_ok=True)
        result.touch()
    assert l1.main(["--out", str(tmp_path)]) == 0
    assert [command[1] for command in ran] == ["grpo", "eval"]
    assert "exact: " in capsys.readouterr().err and (tmp_path / "problems.jsonl").exists()


def setting(model: str, value: int, length: float, off: float, above: float, right: float) -> Row:
    row = {"kind": "setting", "model": model, "strategy": f"l1-{model}", "value": value, "output_tokens": length}
    return row | {"accuracy": right, "deviation": {"absolute": off, "hard": above}}


def gain(value: int, by: str, accuracy: float, low: float) -> Row:
    row = {"kind": "matched", "model": "exact", "strategy": "l1-exact", "value": value, "by": by}
    return row | {"accuracy": accuracy, "low": low}


ROWS = [
    setting("exact", 20, 21.0, 0.1, 0.4, 0.5),
    setting("exact", 40, 39.0, 0.05, 0.2, 0.75),
    gain(20, "budget", 0.02, -0.01),
    gain(40, "budget", 0.1, 0.05),
    gain(40, "mean", -0.2, -0.3),
    setting("max", 20, 15.0, 0.2, 0.0, 0.25),
    setting("max", 40, 30.0, 0.25, 0.06, 0.5),
    setting("start", 20, 30.0, 0.9, 0.9, 0.1),
]


def test_a_table_of_two_seeds() -> None:
    other = [row | {"output_tokens": row["output_tokens"] + 1} if "output_tokens" in row else row for row in ROWS]
    *_, first, second = l1_summary.table([ROWS, other], "exact", "l1-exact")
    assert first == (
        "| 20 | 21.5 [21.0, 22.0] | 10.0 [10.0, 10.0] | 40.0 [40.0, 40.0] | 50.0 [50.0, 50.0] "
        "| +2.0 [+2.0, +2.0], low -1.0 |  |"
    )
    assert second.endswith("| -20.0 [-20.0, -20.0], low -30.0 |")
    assert l1_summary.table([ROWS], "max", "l1-max")[-1] == "| 40 | 30.0 | 25.0 | 6.0 | 50.0 |  |  |"


def test_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two problems of three steps, one of four: within the former the mean does not rise."""
    difficulty = {row["id"]: row["problem"].count(":") for row in l1_summary.read(l1_summary.TEST)}
    three = [name for name, steps in difficulty.items() if steps == 3][:2]
    four = next(name for name, steps in difficulty.items() if steps == 4)
    lengths = {20: {three[0]: 10, three[1]: 20, four: 15}, 40: {three[0]: 12, three[1]: 18, four: 30}}
    samples = [
        {"model": "max", "strategy": "l1-max", "value": limit, "problem": name, "output_tokens": tokens}
        for limit, its in lengths.items()
        for name, tokens in its.items()
    ]
    samples.append(samples[0] | {"model": "exact", "output_tokens": 99})
    (tmp_path / "eval").mkdir()
    for name, rows in (("results", ROWS), ("samples", samples)):
        (tmp_path / "eval" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    l1_summary.main([str(tmp_path), str(tmp_path)])
    printed = capsys.readouterr().out
    values = [line.rpartition(": ")[2] for line in printed.splitlines() if line.startswith("- ")]
    assert values == ["7.5, 7.5 %", "10.0, 10.0 %", "-1.0, -1.0 %", "3.0, 3.0 %", "6.0, 6.0 %", "50.0, 50.0 %"]
