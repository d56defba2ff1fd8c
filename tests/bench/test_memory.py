"""What a process holds at most: its own memory and mapped files apart, beside weights and KV cache."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from s1engine.bench.speed import memory
from s1engine.bench.speed.machine import Memory, PeakMemory, process_memory

MIB = 1 << 20
SECONDS = 60.0  # to wait for a look at most


def wait_for(peak: PeakMemory, kind: str, num_bytes: int) -> None:
    deadline = time.monotonic() + SECONDS
    while getattr(peak.peak, kind) < num_bytes and time.monotonic() < deadline:
        time.sleep(0.01)


def test_the_peak_is_kept_when_memory_is_given_back() -> None:
    before = process_memory()
    with PeakMemory() as peak:
        held = mmap.mmap(-1, 200 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        held.write(b"x" * (200 * MIB))
        wait_for(peak, "anonymous", before.anonymous + 199 * MIB)
        held.close()
    assert (
        199 * MIB <= peak.peak.anonymous - before.anonymous <= 450 * MIB
    )  # the bytes that were written, at most twice
    assert process_memory().anonymous < before.anonymous + 100 * MIB


def test_a_mapped_file_is_no_memory_of_the_process(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * (100 * MIB))
    before = process_memory()
    with PeakMemory() as peak, open(tmp_path / "file", "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        assert sum(mapped[i] for i in range(0, len(mapped), 4096)) == 100 * MIB // 4096 * ord("x")
        wait_for(peak, "file_mapped", before.file_mapped + 99 * MIB)
    assert peak.peak.file_mapped - before.file_mapped >= 99 * MIB
    assert peak.peak.anonymous - before.anonymous < 50 * MIB


def test_a_process_that_has_ended_before() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and its number is still its own
    with PeakMemory(child.pid) as peak:
        pass
    assert child.wait() == 0
    assert peak.peak == Memory(0, 0)
    with pytest.raises(OSError), PeakMemory(child.pid):
        pass


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_another_process_that_ends() -> None:
    child = subprocess.Popen([sys.executable, "-c", "held = b'x' * (100 << 20); input()"], stdin=subprocess.PIPE)
    with PeakMemory(child.pid) as peak:
        wait_for(peak, "anonymous", 100 * MIB)
        child.communicate(b"\n")
    assert 100 * MIB <= peak.peak.anonymous <= 250 * MIB


@pytest.mark.parametrize(("run", "within"), [(1377, True), (1379, False)])
def test_peaks_are_set_against_weights_and_cache(run: int, within: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 MiB of weights and 100 of cache allow 1.15 x 1,100 + 128 = 1,393; 16 are those of an import."""

    def fake(function: Any, *args: Any) -> Any:
        if function is process_memory:
            return Memory(16 * MIB, 5 * MIB)
        return {"load": Memory(566 * MIB, 1000 * MIB), "run": Memory((run + 32) * MIB, 7 * MIB)}

    monkeypatch.setattr(memory, "in_fresh_process", fake)
    report = memory.measure(lambda: lambda: None, weight_bytes=1000 * MIB, kv_bytes=100 * MIB)
    load = report["rows"][0]
    assert (load["phase"], load["own"], load["ratio"], load["file_mapped"]) == ("load", 550 * MIB, 0.5, 1000 * MIB)
    assert report["rows"][1]["own"] == (run + 16) * MIB
    assert report["limit_bytes"] == pytest.approx(1393 * MIB, abs=1) and report["within_limit"] is within
    lines = memory.table(report).splitlines()
    assert lines[1].split() == ["load", "566", "MiB", "550", "MiB", "0.50", "1000", "MiB"]
    assert ("within the limit" in lines[3]) is within and "= 1393 MiB" in lines[3]


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_counted_as_they_are_stored(make_model: Any, tied: bool) -> None:
    folder = make_model("qwen3", tie_word_embeddings=tied)
    elements = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    assert memory.weight_bytes(str(folder), torch.bfloat16) == 2 * elements
