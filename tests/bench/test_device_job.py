"""The job for a GPU, dry: on the CPU at tiny sizes; and what becomes of parts that fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from s1engine.bench.device import decode_profile, job, parts
from s1engine.bench.speed.host import empty_engine

ROOT = Path(__file__).resolve().parents[2]


def dry_run(out: Path, *argv: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    environment = {**os.environ, "OUT": str(out), "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    environment.pop("TRITON_INTERPRET", None)
    command = ["bash", "bench/device.sh", "--dry", *argv]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert len(list(out.iterdir())) <= 8
    return ran, json.loads((out / "device.json").read_text())


def test_some_parts_dry(tmp_path: Path) -> None:
    ran, report = dry_run(tmp_path, "--only", "machine", "latency", "profile")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    machine, latency, profile = (report["parts"][name] for name in ("machine", "latency", "profile"))
    assert machine["machine"]["driver"] == "not measured: needs a GPU" and machine["machine"]["torch"]
    assert {row["engine"] for row in latency["rows"]} == {"s1engine", "transformers"}
    assert profile["replays"] == "not measured: needs a GPU"
    assert [row["replays"] for row in profile["host"]] == [8, 1]
    text = (tmp_path / "device.txt").read_text()
    assert "FAILED" not in text and all(part["text"] in text for part in report["parts"].values())
    assert "===== latency" in (tmp_path / "device.log").read_text()


@pytest.mark.slow
def test_the_whole_job_dry(tmp_path: Path) -> None:
    start = time.monotonic()
    ran, report = dry_run(tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert list(report["parts"]) == [part.name for part in job.PARTS]
    tests = report["parts"]["tests"]
    assert tests["counts"]["passed"] >= 20 and tests["failures"] == {}
    assert time.monotonic() - start < 240


def test_parts_that_fail_are_reported_and_the_rest_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some = (
        job.Part("nonsense", 5, "No such part"),
        job.Part("nano", -5, "Not in a second"),
        job.Part("machine", 60, "The machine"),
    )
    start = time.monotonic()
    assert job.run(some, tmp_path, dry=True) == 1
    assert time.monotonic() - start < 60
    found = json.loads((tmp_path / "device.json").read_text())["parts"]
    assert found["nonsense"]["error"] == "exit status 2" and "invalid choice" in found["nonsense"]["output"][-1]
    assert found["nano"]["error"] == "not over after 1 s"
    assert "error" not in found["machine"] and found["machine"]["text"]
    printed = capsys.readouterr().out
    assert "FAILED: exit status 2" in printed and printed.strip().endswith("FAILED: nonsense, nano")


def test_what_a_part_had_before_it_failed_is_kept(tmp_path: Path) -> None:
    (tmp_path / "nonsense.json").write_text(json.dumps({"text": "half of it"}))
    part = job.Part("nonsense", 5, "No such part")
    result = job.run_part(part, time.monotonic() + 30, tmp_path, True, tmp_path / "log")
    assert result["text"] == "half of it" and result["error"] == "exit status 2"


def test_the_limits_add_up_to_nine_minutes() -> None:
    assert sum(part.seconds for part in job.PARTS) <= 540


def test_test_results_are_counted(tmp_path: Path) -> None:
    """By pytest's own report, and from the output of a run that was cut off; with one process and with several."""
    cases = """
import pytest
def test_good(): pass
@pytest.mark.parametrize("x", ["a b", "c"])
def test_bad(x): assert x == "c"
def test_not(): pytest.skip("no")
def test_broken(no_such_fixture): pass
"""
    (tmp_path / "test_cases.py").write_text(cases)
    junit = tmp_path / "junit.xml"
    command = [sys.executable, "-m", "pytest", "-v", "-c", os.devnull, f"--junitxml={junit}", "test_cases.py"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    counts = {"passed": 2, "failed": 2, "skipped": 1}
    whole = parts.from_junit(junit)
    assert whole["counts"] == counts
    assert "assert 'a b' == 'c'" in whole["failures"]["test_cases::test_bad[a b]"]
    cut = parts.from_output(ran.stdout.split("====== FAILURES")[0].split("====== ERRORS")[0])
    assert cut["counts"] == counts and set(cut["failures"]) == {
        "test_cases.py::test_bad[a b]",
        "test_cases.py::test_broken",
    }
    several = "[gw1] [ 10%] PASSED tests/x.py::test_a[b c] \n[gw0] [ 20%] FAILED tests/x.py::test_b \n"
    assert parts.from_output(several) == {"counts": {"passed": 1, "failed": 1}, "failures": {"tests/x.py::test_b": ""}}


def test_replays_and_gaps_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """With events that read the clock, on an engine whose replays sleep, and its launches longer."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = time.perf_counter()

        def elapsed_time(self, end: Event) -> float:
            return 1000 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    engine = empty_engine(rows=3, max_model_len=500)
    runner: Any = engine.core.runner
    launch = runner.launch

    def slow_launch(plan: Any) -> Any:
        time.sleep(0.02)
        return launch(plan)

    def slow_replay(*args: Any) -> None:
        time.sleep(0.002)

    runner.launch, runner.graphs.replay = slow_launch, slow_replay
    decode_profile._fill(engine, 3, 20)
    found = decode_profile._replays(engine)
    assert 0.002 < found["replay"] < 0.01
    assert 0 <= found["gap_in_a_launch"] < 0.002 and 0.02 < found["gap_between_launches"] < 0.1
    assert runner.launch is slow_launch and runner.graphs.replay is slow_replay


def test_the_profile_shows_the_longest_lines() -> None:
    lines = [{"name": f"kernel {i}", "calls": 2, "seconds": 1e-6 * (40 - i)} for i in range(40)]
    table = decode_profile._table(lines).splitlines()
    assert len(table) == 1 + 25 and table[1].split() == ["0.040", "4.9%", "2", "20.00", "kernel", "0"]
