"""`s1engine bench latency`: when tokens come, the percentiles of what lies between them, floors, memory."""

from __future__ import annotations

import argparse
import json
from types import SimpleNamespace
from typing import Any

import pytest

from s1engine.bench.speed import latency
from s1engine.bench.speed.floor import model_sizes
from s1engine.bench.speed.workloads import uniform

BANDWIDTH, OPERATIONS = 1e10, 1e11
MIB = 1 << 20


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates that take no time to measure."""
    monkeypatch.setattr("s1engine.bench.speed.machine.read_bandwidth", lambda device: BANDWIDTH)
    monkeypatch.setattr("s1engine.bench.speed.machine.matmul_rate", lambda dtype, device: OPERATIONS)


def arguments(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    latency.add_arguments(parser)
    return parser.parse_args(["--device", "cpu", "--dtype", "float32", *argv])


class Scripted:
    """An engine whose steps take the seconds and show the numbers of tokens of `script`."""

    def __init__(self, script: list[tuple[float, dict[str, int]]]) -> None:
        self.now = 100.0
        self.added: list[tuple[str, int, int]] = []
        self._script = script

    def add_request(self, request_id: str, prompt: list[int], params: Any, *, stream: bool) -> None:
        assert stream and params.ignore_eos and params.temperature == 0
        self.added.append((request_id, len(prompt), params.max_tokens))

    def has_unfinished_requests(self) -> bool:
        return bool(self._script)

    def step(self) -> list[Any]:
        seconds, shown = self._script.pop(0)
        self.now += seconds
        return [
            SimpleNamespace(request_id=request_id, outputs=[SimpleNamespace(token_ids=[0] * count)])
            for request_id, count in shown.items()
        ]


def test_tokens_are_timed_when_they_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second request's prompt is in late; two tokens that come together came at the same time."""
    engine: Any = Scripted([(1, {"0": 1}), (2, {"0": 2, "1": 1}), (4, {}), (8, {"1": 3}), (16, {"0": 3})])
    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: engine.now))
    workload = uniform(2, 5, 3, vocab=10, seed=0)
    assert latency.token_times(engine, workload) == [[1, 3, 31], [3, 15, 15]]
    assert engine.added == [("0", 5, 3), ("1", 5, 3)]


def test_a_request_that_ends_early_is_no_measurement() -> None:
    engine: Any = Scripted([(1, {"0": 1})])
    with pytest.raises(RuntimeError, match="a request of 3 tokens has 1"):
        latency.token_times(engine, uniform(1, 5, 3, vocab=10, seed=0))


def test_percentiles_and_shares() -> None:
    row = latency.between_tokens_row(4, [float(i) for i in range(101, 0, -1)], floor=25.5)
    assert row["gap_seconds"] == {"median": 51, "p90": 91, "p99": 100, "max": 101}
    assert row["share_of_floor"]["median"] == 0.5 and row["share_of_floor"]["max"] == 25.5 / 101
    first = latency.first_token_row(300, [3.0, 1.0, 2.0], floor=0.5)
    assert (first["first_token_seconds"], first["worst_seconds"]) == (2, 3)
    assert (first["prompt_tokens_per_second"], first["share_of_floor"]) == (150, 0.25)


@pytest.mark.usefixtures("rates")
def test_every_setting_is_timed(
    make_model: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "_memory", lambda *args: None)
    model = str(make_model("qwen2"))
    sizes = ["--prompt-len", "5", "40", "--batch", "1", "3", "--context", "7", "--new-tokens", "6", "--repeats", "2"]
    assert latency.run(arguments("--model", model, *sizes, "--json")) == 0
    *table, last = capsys.readouterr().out.splitlines()
    report = json.loads(last)
    size = model_sizes(model)
    assert [row["prompt_len"] for row in report["first_token"]] == [5, 40]
    for row in report["first_token"]:
        floor = max(4 * size.weights / BANDWIDTH, 2 * size.body * row["prompt_len"] / OPERATIONS)
        assert len(row["seconds"]) == 2 and row["floor_seconds"] == pytest.approx(floor)
    assert [(row["batch"], row["gaps"]) for row in report["between_tokens"]] == [(1, 2 * 5), (3, 2 * 3 * 5)]
    for row in report["between_tokens"]:
        tokens = row["batch"] * (7 + 3)
        floor = max(4 * (size.weights + tokens * size.kv) / BANDWIDTH, 2 * size.weights * row["batch"] / OPERATIONS)
        assert row["floor_seconds"] == pytest.approx(floor)
        gaps = row["gap_seconds"]
        assert 0 < gaps["median"] <= gaps["p90"] <= gaps["p99"] <= gaps["max"]
    assert report["machine"]["torch"] and report["memory"] is None
    assert [line.split()[0] for line in table if line[:6].strip().isdigit()] == ["5", "40", "1", "3"]
    assert any("read at 10.0 GB/s, operations at 100 GFLOP/s" in line for line in table)


@pytest.mark.usefixtures("rates")
def test_memory_is_that_of_the_engine(make_model: Any) -> None:
    """Of a model of 51 MiB in float32, in processes of their own."""
    model = str(make_model("qwen2", vocab_size=70_000, tie_word_embeddings=False))
    sizes = ["--prompt-len", "3", "--batch", "2", "--context", "3", "--new-tokens", "2", "--repeats", "1"]
    report = latency.measure(arguments("--model", model, *sizes))["memory"]
    assert 51 * MIB < report["weight_bytes"] < 53 * MIB
    assert report["kv_bytes"] == 2 * 5 * model_sizes(model).kv * 4
    load, run = report["rows"]
    assert (load["phase"], run["phase"]) == ("load", "run")
    assert all(row["own"] == row["anonymous"] - report["imported"]["anonymous"] for row in (load, run))
    assert load["own"] > report["weight_bytes"] // 2 and report["imported"]["anonymous"] > 20 * MIB


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batch", "4", "0"], "--batch 0: must be at least 1"),
        (["--prompt-len", "0"], "--prompt-len 0: must be at least 1"),
        (["--new-tokens", "1"], "--new-tokens 1: must be at least 2"),
    ],
)
def test_arguments_are_checked(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        latency.measure(arguments(*argv))
