"""Scaling: which steps are timed, floors, growth over context, and the whole of it at a tiny size."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from s1engine.bench.speed import scaling
from s1engine.bench.speed.floor import Rates, Sizes
from s1engine.bench.speed.scaling_points import Engines, Point, Worker, decode_seconds

SIZES = Sizes(weights=1000, body=900, kv=10, vocab=7)


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates that take no time to measure, in this process."""
    monkeypatch.setattr("s1engine.bench.speed.machine.read_bandwidth", lambda: 1e10)
    monkeypatch.setattr("s1engine.bench.speed.machine.matmul_rate", lambda dtype: 1e11)


def arguments(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    scaling.add_arguments(parser)
    return parser.parse_args(argv)


def point(sweep: str = "context", batch: int = 2, context: int = 100, threads: int = 1, steps: int = 3) -> Point:
    return Point(sweep=sweep, batch=batch, context=context, threads=threads, block_size=16, steps=steps)


class Scripted:
    """An engine whose steps take 1, 10, 100 and 1,000 seconds. spans: the steps of a request's first and last token"""

    def __init__(self, *spans: tuple[int, int]) -> None:
        self.now, self._steps, self._spans = 50.0, 0, spans
        self._metrics = [SimpleNamespace(first_token_time=None) for _ in spans]

    def add_request(self, request_id: str, prompt: list[int], params: Any) -> None:
        assert params.max_tokens == 3 and params.ignore_eos

    def has_unfinished_requests(self) -> bool:
        return self._steps <= max(last for _, last in self._spans)

    def step(self) -> list[Any]:
        self.now += 10**self._steps
        ended = []
        for metrics, (first, last) in zip(self._metrics, self._spans, strict=True):
            if self._steps == first:
                metrics.first_token_time = self.now
            if self._steps == last:
                ended.append(SimpleNamespace(metrics=metrics))
        self._steps += 1
        return ended


@pytest.mark.parametrize(
    ("spans", "seconds"),
    [
        (((0, 2), (0, 2)), (10 + 100) / 2),
        (((1, 3), (1, 3)), (100 + 1000) / 2),  # both wait for a step of prompts
        (((1, 2), (1, 2)), 100 / 2),  # two tokens in the last step
        (((0, 2), (1, 3)), None),  # they overlap in one step alone
    ],
)
def test_rows_that_decode_together_are_timed(
    spans: tuple[tuple[int, int], ...], seconds: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: Any = Scripted(*spans)
    monkeypatch.setattr(time, "monotonic", lambda: engine.now)
    assert decode_seconds(engine, [[1], [2]], steps=2) == seconds


def test_the_floor_counts_the_mean_context() -> None:
    """Rows of 100 tokens that decode three more attend to 101, 102 and 103."""
    middle = point()
    assert middle.kv_bytes(SIZES, 4) == 2 * 102 * 10 * 4
    assert middle.floor(SIZES, 4, Rates(bandwidth=2, operations=1e30)) == (1000 + 2 * 102 * 10) * 4 / 2
    assert middle.floor(SIZES, 4, Rates(bandwidth=1e30, operations=8)) == 2 * 1000 * 2 / 8


def rows(seconds: dict[int, list[float]], bandwidth: float) -> list[dict[str, Any]]:
    rates = [Rates(bandwidth=bandwidth, operations=1e30)] * 3
    return [scaling.point_row(point(context=context), SIZES, 2, its, rates) for context, its in seconds.items()]


@pytest.mark.parametrize("power", [1, 2])
def test_growth_is_told_turn_by_turn(power: int) -> None:
    """A slow turn is slow at every context, by more than the growth; and in one of the turns the growth is larger."""
    turns, contexts = [(5.0, 1), (500.0, 1), (50.0, 4)], [100, 612, 1124, 2148, 4196, 8292]
    extra = {context: 40.0 * (context - 100) for context in contexts}  # bytes: 2 rows, 10 elements, 2 bytes
    seconds = {c: [base + 1e-3 * factor * extra[c] ** power for base, factor in turns] for c in contexts}
    (found,) = scaling.growth(rows(seconds, bandwidth=4000.0))
    assert found["exponent"] == pytest.approx(power)
    assert [p["extra_bytes"] for p in found["points"]] == pytest.approx([extra[c] for c in contexts[1:]])
    if power == 1:
        assert found["bytes_per_second"] == pytest.approx(1000) and found["share_of_bandwidth"] == pytest.approx(0.25)


def test_growth_that_cannot_be_told() -> None:
    (flat,) = scaling.growth(rows({100: [2.0] * 3, 200: [1.0] * 3, 300: [3.0] * 3}, bandwidth=1.0))
    assert flat["exponent"] is None and flat["bytes_per_second"] == pytest.approx(8000)
    assert scaling.growth(rows({100: [2.0] * 3}, bandwidth=1.0)) == []


def test_the_points_of_a_full_run() -> None:
    points = scaling.plan(arguments())
    assert len(points) == len(set(points)) == 9 + 2 * 8 + 3 * 2 + 5
    assert {p.batch for p in points if p.sweep == "batch"} == {2**i for i in range(9)}
    assert {(p.batch, p.context) for p in points if p.sweep == "context"} >= {(1, 128), (8, 16384)}
    assert {p.threads for p in points if p.sweep == "threads"} == {1, 2}
    assert {p.block_size for p in points if p.sweep == "blocks"} == {8, 16, 32, 64, 128}
    only = scaling.plan(arguments("--only", "blocks", "--blocks", "4", "--steps", "7"))
    assert [(p.sweep, p.block_size, p.steps) for p in only] == [("blocks", 4, 7)]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batch", "0"], "--batch 0: must be at least 1"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--only", "threads", "--batch", "2"], "--batch: --only leaves that curve out"),
    ],
)
def test_arguments_are_checked(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scaling.plan(arguments(*argv))


def test_prompts_are_computed_once(make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest point leaves those of the shorter ones in the prefix cache, of every row its own."""
    long, short, wide = point(context=100), point(context=40), point("batch", batch=20, context=17)
    engines = Engines(str(make_model("qwen2")), "float32", [long, short, wide])
    engine, outputs = engines._engines[16], []
    step = engine.step

    def seen_step() -> list[Any]:
        made = step()
        outputs.extend(made)
        return made

    monkeypatch.setattr(engine, "step", seen_step)
    for warm in (long, wide):
        engines.warm_up(warm)
    assert [output.num_cached_tokens for output in outputs[:2]] == [0, 0]
    assert outputs[0].prompt_token_ids != outputs[1].prompt_token_ids
    outputs.clear()
    for measured in (short, long):
        assert engines.seconds(measured) > 0
    assert [output.num_cached_tokens for output in outputs] == [32, 32, 96, 96]
    assert all(len(output.outputs[0].token_ids) == 4 for output in outputs)


def test_a_worker_has_its_threads(make_model: Any) -> None:
    """One more than this process was given."""
    own = point("threads", batch=1, context=5, threads=2)
    worker = Worker(2, str(make_model("qwen2")), "float32", [own])
    try:
        worker.warm_up(own)
        assert worker.seconds(own) > 0
    finally:
        worker.close()


@pytest.mark.usefixtures("rates")
def test_a_quick_run(make_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--quick", "--model", str(make_model("qwen2")), "--dtype", "float32", "--output", str(tmp_path / "new")]
    assert scaling.main(argv) == 0
    report = json.loads((tmp_path / "new" / "scaling-cpu.json").read_text())
    assert len(report["rows"]) == 2 + 2 * 3 + 3 + 2
    for row in report["rows"]:
        assert row["tokens_per_second"] == row["batch"] / row["seconds"][0] and row["share_of_floor"] > 0
    assert [row["curves"] for row in report["rates"]] == [["batch", "context", "blocks"], ["threads"]]
    assert [row["batch"] for row in report["growth"]] == [1, 8]
    for sweep in scaling.SWEEPS:
        assert (tmp_path / "new" / f"scaling-{sweep}.png").read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(scaling.SWEEPS) for line in table) == len(report["rows"])


def test_a_context_beyond_the_model(make_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--only", "context", "--context", "9", "2040", "--model", str(make_model("qwen2")), "--dtype", "float32"]
    assert scaling.main([*argv, "--output", str(tmp_path)]) == 2
    assert "--context 2040: with 17 new tokens it is beyond the model's 2048 positions" in capsys.readouterr().err
