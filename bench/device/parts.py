"""The parts of the job for a GPU. Each returns its result, its table as "text", and may give it out as it grows."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from s1engine.bench.device import decode_profile
from s1engine.bench.speed import kernels as kernel_bench
from s1engine.bench.speed import machine as speed_machine
from s1engine.bench.speed import throughput
from s1engine.bench.speed.shapes import SHAPES, make_model

ROOT = Path(__file__).resolve().parents[2]
NOT_MEASURED = "not measured: needs a GPU"
DRY_TESTS = "activation or decode_inputs"  # seconds in the interpreter
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 10240,  # nano-vllm's prompts have ids up to 10000
}


@dataclass(frozen=True)
class Job:
    """How a part is to run.

    dry    on the CPU with tiny models
    work   a folder that all parts share
    until  when it must be over, on the clock that time.time reads
    keep   takes the result as far as it is there
    """

    dry: bool
    work: Path
    until: float
    keep: Callable[[dict[str, Any]], None]

    @property
    def seconds(self) -> float:
        """That are left, at least one."""
        return max(self.until - time.time(), 1.0)

    def model(self, shape: str) -> str:
        """The folder of a model of that shape, tiny in a dry run; the first part that asks writes it."""
        shape = "tiny" if self.dry else shape
        folder, done = self.work / shape, self.work / f"{shape}.done"
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make_model(shape, folder, torch.float32 if self.dry else torch.bfloat16)
            done.touch()
        return str(folder)

    def device_arguments(self) -> list[str]:
        """For the benchmarks of speed. On a CPU the device path runs with PyTorch's references as kernels."""
        if self.dry:
            return ["--device", "cpu", "--dtype", "float32"]
        return ["--device", "cuda", "--dtype", "bfloat16"]

    def throughput(self, shape: str, *argv: str) -> dict[str, Any]:
        parser = argparse.ArgumentParser()
        throughput.add_arguments(parser)
        model = self.model(shape)
        limits = ["--time-limit", str(self.seconds - 5), "--peer-limit", str(max(self.seconds / 3, 10))]
        common = [*self.device_arguments(), "--attention-backend", "triton" if self.dry else "auto"]
        args = parser.parse_args(["--model", model, *common, *limits, *argv])

        def keep(report: dict[str, Any]) -> None:
            self.keep(report | {"text": throughput.table(report)})

        report = throughput.measure(args, keep)
        return report | {"text": throughput.table(report)}


def machine(job: Job) -> dict[str, Any]:
    cuda = not job.dry
    device = torch.device("cuda" if cuda else "cpu")
    found = speed_machine.describe() | {
        "system": platform.platform(),
        "triton": version("triton"),
        "numpy": version("numpy"),
        "cuda": torch.version.cuda,
        "driver": NOT_MEASURED,
    }
    if cuda:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"]
        has_it = shutil.which("nvidia-smi") is not None
        found["driver"] = subprocess.check_output(query, text=True).strip() if has_it else "unknown: no nvidia-smi"
    job.keep({"text": _lines(found), "machine": found})
    found["bytes per second"] = speed_machine.read_bandwidth(device)
    found["operations per second"] = speed_machine.matmul_rate(torch.bfloat16 if cuda else torch.float32, device)
    return {"text": _lines(found), "machine": found}


def _lines(found: dict[str, Any]) -> str:
    return "\n".join(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}"
                     for name, value in found.items())  # fmt: skip


def tests(job: Job) -> dict[str, Any]:
    """tests/triton; in a dry run a few of them, interpreted."""
    junit, output = job.work / "junit.xml", job.work / "pytest.log"
    command = [sys.executable, "-m", "pytest", "tests/triton", "-v", "--durations=15", f"--junitxml={junit}"]
    environment = dict(os.environ)
    if job.dry:
        environment |= {"TRITON_INTERPRET": "1"}
        command += ["-k", DRY_TESTS]
    else:
        environment |= {"S1ENGINE_TEST_GPU": "1"}
        command += ["-m", ""]  # those that are slow in the interpreter as well
        if importlib.util.find_spec("xdist"):
            command += ["-n", "4"]  # most of their time is Triton's compiler's
    error = None
    with output.open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            status = process.wait(job.seconds - 5)
            if status:
                error = f"pytest's exit status is {status}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            error = "pytest was not over in time; what is counted are the tests that were"
    text = output.read_text(errors="replace")
    print(text)
    result = from_junit(junit) if junit.exists() else from_output(text)
    counts = ", ".join(f"{count} {name}" for name, count in result["counts"].items())
    lines = [counts or "no test was over", *(f"{name}: {why}" for name, why in result["failures"].items())]
    return result | {"text": "\n".join(lines)} | ({"error": error} if error else {})


def from_junit(path: Path) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    failures = {}
    for case in ElementTree.parse(path).iter("testcase"):
        outcome = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        counts[{None: "passed", "failure": "failed", "error": "failed"}.get(_tag(outcome), "skipped")] += 1
        if outcome is not None and outcome.tag != "skipped":
            name = f"{case.get('classname')}::{case.get('name')}"
            failures[name] = (outcome.get("message") or "").strip()[:600]
    return {"counts": dict(counts), "failures": failures}


def _tag(element: ElementTree.Element | None) -> str | None:
    return None if element is None else element.tag


def from_output(text: str) -> dict[str, Any]:
    """Of `pytest -v` that was cut off."""
    found = re.findall(
        r"^(?:(\S+::\S.*?) )?(?:\[gw\d+\] .*?)?(PASSED|FAILED|ERROR|SKIPPED)\b(?: (\S+::\S+))?", text, re.M
    )
    counts = Counter({"ERROR": "failed"}.get(outcome, outcome.lower()) for _, outcome, _ in found)
    failures = {before or after: "" for before, outcome, after in found if outcome in ("FAILED", "ERROR")}
    return {"counts": dict(counts), "failures": failures}


def nano(job: Job) -> dict[str, Any]:
    """Beside transformers' continuous batching."""
    scale = ["--scale", "0.008", "--repeats", "1"] if job.dry else ["--repeats", "3"]
    return job.throughput("qwen3-0.6b", "--workload", "nano", "--peer", "continuous", *scale)


def nano_middle(job: Job) -> dict[str, Any]:
    return _nano_alone(job, "qwen2.5-1.5b")


def nano_large(job: Job) -> dict[str, Any]:
    return _nano_alone(job, "qwen2.5-7b")


def _nano_alone(job: Job, shape: str) -> dict[str, Any]:
    scale = ["--scale", "0.004", "--repeats", "1"] if job.dry else ["--repeats", "2"]
    return job.throughput(shape, "--workload", "nano", "--no-peer", *scale)


def latency(job: Job) -> dict[str, Any]:
    sizes = ["--prompt-len", "16", "--new-tokens", "16"] if job.dry else ["--prompt-len", "128", "--new-tokens", "128"]
    return job.throughput("qwen3-0.6b", "--batch", "1", "--peer", "generate", *sizes)


def ratios(job: Job) -> dict[str, Any]:
    sizes = ["--batch", "4", "--prompt-len", "16", "--new-tokens", "16", "--repeats", "2"]
    if not job.dry:
        sizes = ["--batch", "64", "--prompt-len", "128", "--new-tokens", "512", "--repeats", "5"]
    return job.throughput("qwen3-0.6b", "--budget", "--deterministic", "--no-peer", *sizes)


def kernels(job: Job) -> dict[str, Any]:
    """`s1engine bench kernels`, at one row and at many."""
    parser = argparse.ArgumentParser()
    kernel_bench.add_arguments(parser)
    sizes = ["--shape", "qwen3-0.6b", "--batch", "1", "256", "--context", "1024"]
    if job.dry:
        sizes = ["--shape", "tiny", "--batch", "2", "--context", "64", "--repeats", "1"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        kernel_bench.run(parser.parse_args([*job.device_arguments(), *sizes, "--json"]))
    *table, report = printed.getvalue().strip().split("\n")
    return json.loads(report) | {"text": "\n".join(table)}


def profile(job: Job) -> dict[str, Any]:
    """Of decode steps: replays and the gaps between them, kernels in them, the host's time, and the longest lines."""
    rows, prompt_len = (4, 20) if job.dry else (256, 512)
    return decode_profile.measure(job.model("qwen3-0.6b"), rows, prompt_len, job.dry, job.keep)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = (machine, tests, nano, latency, ratios, kernels, profile, nano_middle, nano_large)
    by_name = {part.__name__: part for part in parts}
    parser.add_argument("part", choices=by_name)
    parser.add_argument("--work", type=Path, required=True, help="a folder that the parts share")
    parser.add_argument("--result", type=Path, required=True, help="file for the result, JSON")
    parser.add_argument("--until", type=float, required=True, help="when the part must be over, as time.time() has it")
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    SHAPES["tiny"] = SHAPES["qwen3-0.6b"] | TINY
    if not args.dry and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --dry runs on a CPU")

    def keep(result: dict[str, Any]) -> None:
        unfinished = args.result.with_suffix(".part")
        unfinished.write_text(json.dumps(result, default=str))
        unfinished.replace(args.result)

    start = time.monotonic()
    keep(by_name[args.part](Job(args.dry, args.work, args.until, keep)))
    print(f"{args.part}: {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    main()
