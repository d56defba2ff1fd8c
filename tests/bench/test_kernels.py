"""`s1engine bench kernels`: every kernel of a step once, at a tiny shape; its table, its JSON, its checks."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from s1engine.bench.speed import decode_cases, kernels
from s1engine.bench.speed.decode_step import Case, Step
from s1engine.bench.speed.shapes import SHAPES, model_shape
from s1engine.kernels import native

TINY = {
    "model_type": "qwen3",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 1000,
}
LAYER = ["rms_norm", "qkv_proj", "attention", "o_proj", "add_rms_norm", "gate_up_proj", "down_proj"]
# The C++ operators have one for what are three of PyTorch's.
ON_CPU = ["rope_store_kv"] if native.AVAILABLE else ["rope", "store_kv", "silu_mul"]


def bench(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    kernels.add_arguments(parser)
    return kernels.run(parser.parse_args(argv))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape of that name; and rates that take no time to measure."""
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setattr("s1engine.bench.speed.machine.read_bandwidth", lambda device: 1e10)
    monkeypatch.setattr("s1engine.bench.speed.machine.matmul_rate", lambda dtype, device: 1e11)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_table_and_the_json_agree(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    how = ["--shape", "tiny", "--dtype", dtype, "--device", "cpu", "--context", "33", "--repeats", "2"]
    assert bench(*how, "--batch", "1", "3", "--json") == 0
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    rows = report["rows"]
    names = [row["kernel"] for row in rows if row["batch"] == 3]
    assert set(names) == {*LAYER, *ON_CPU, "lm_head", "sampler, greedy", "sampler, top-p"}
    assert [row["kernel"] for row in rows if row["batch"] == 1] == names and len(rows) == 2 * len(names)
    for row, line in zip(rows, lines[1:], strict=False):
        assert line.split()[0] == str(row["batch"]) and row["kernel"] in line
        assert row["floor_seconds"] == max(row["bytes"] / 1e10, row["operations"] / 1e11) > 0
        assert row["share_of_floor"] == row["floor_seconds"] / row["seconds"]
    assert "10.0 GB/s" in lines[-2] and report["args"]["context"] == 33


@pytest.mark.usefixtures("tiny")
def test_bytes_are_those_of_the_tensors_and_operations_those_of_the_products() -> None:
    """By hand, for 3 rows of 33 tokens in bfloat16: 33 * 2 * 16 keys of two bytes, and as many values, a row."""
    device = torch.device("cpu")
    step = Step(shape=model_shape("tiny"), batch=3, context=33, launches=1, dtype=torch.bfloat16, device=device)
    sizes = {case.kernel: (case.num_bytes, case.operations) for case in decode_cases.decode_cases(step)}
    assert sizes["rms_norm"] == (3 * 48 * (4 + 2) + 48 * 2, 0)
    assert sizes["add_rms_norm"] == (3 * 48 * (2 * 4 + 2 * 2) + 48 * 2, 0)
    assert sizes["qkv_proj"] == ((48 * 128 + 3 * (48 + 128)) * 2, 2 * 3 * 48 * 128)
    if native.AVAILABLE:
        assert sizes["rope_store_kv"] == (3 * (2 * (6 + 2) * 16 * 2 + 4 * 16 + 16), 0)
        assert sizes["gate_up_proj"] == ((48 * 160 + 3 * (48 + 80)) * 2, 2 * 3 * 48 * 160)
        assert sizes["lm_head"] == ((48 * 1000 + 3 * 48) * 2 + 3 * 1000 * 4, 2 * 3 * 48 * 1000)
    else:
        assert sizes["rope"] == (3 * (2 * 6 * 16 * 2 + 2 * 16 * 4), 0)
        assert sizes["store_kv"] == (3 * (2 * 4 * 16 * 2 + 8), 0)
        assert sizes["silu_mul"] == (3 * 3 * 80 * 2, 0)
        assert sizes["lm_head"] == ((48 * 1000 + 3 * 1048) * 2, 2 * 3 * 48 * 1000)
    assert sizes["attention"] == (3 * (2 * 64 * 2 + 2 * 33 * 32 * 2 + 3 * 4), 3 * 2 * 2 * 64 * 33)
    assert sizes["sampler, greedy"] == (3 * 1000 * 4, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.int64])
def test_outputs_that_are_not_written_are_found(dtype: torch.dtype) -> None:
    kept = torch.zeros(4, dtype=dtype)

    def launch() -> torch.Tensor:
        kept[:written] = 1
        return kept

    case = Case(kernel="idle", num_bytes=2 << 30, operations=0, make=lambda: launch)
    written = 4
    assert kernels._cpu_seconds(case, [case.make()], 1) > 0
    written = 3
    with pytest.raises(RuntimeError, match="idle: 1 of 4 outputs are not written"):
        kernels._cpu_seconds(case, [case.make()], 1)


@pytest.mark.parametrize("name", ["batch", "context", "repeats"])
def test_counts_must_be_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"--{name} 0: must be at least 1"):
        bench(f"--{name}", "0")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed: Linux only")
def test_the_triton_kernels_run_in_the_interpreter() -> None:
    """In a process of its own: Triton decides at import whether it interprets."""
    program = f"""
from s1engine.bench.speed import kernels, machine, shapes
import argparse
shapes.SHAPES["tiny"] = {TINY!r}
machine.read_bandwidth = machine.matmul_rate = lambda *_: 1e9
kernels.CPU_CACHE_BYTES, kernels.CPU_SECONDS = 1, 1e-9  # one set, one run
parser = argparse.ArgumentParser()
kernels.add_arguments(parser)
argv = "--shape tiny --dtype float32 --device cpu --batch 3 --context 300 --repeats 1 --json"
raise SystemExit(kernels.run(parser.parse_args(argv.split())))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    names = [row["kernel"] for row in json.loads(ran.stdout.splitlines()[-1])["rows"]]
    assert set(names) == {*LAYER, "silu_mul", "decode_inputs", "rope_store_kv", "lm_head", *decode_cases.SAMPLERS}
