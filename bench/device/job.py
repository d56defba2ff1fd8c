"""Runs the parts of the job one after the other, each in a process of its own, and reports whatever became of them."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
KEPT_LINES = 40  # of the output of a part that failed


@dataclass(frozen=True)
class Part:
    """A function of `parts` by its name. It must be over when it and all before it have had their `seconds`."""

    name: str
    seconds: float
    title: str


# In the order of their worth: what comes late may be cut.
PARTS = (
    Part("machine", 15, "The machine"),
    Part("tests", 150, "Tests of the kernels and of the engine on them"),
    Part("nano", 90, "nano-vllm's workload, Qwen3-0.6B"),
    Part("latency", 30, "Batch 1"),
    Part("ratios", 60, "Budgets and determinism, on and off"),
    Part("kernels", 60, "Kernels of a decode step"),
    Part("profile", 55, "Decode steps: gaps, host, profile"),
    Part("nano_middle", 35, "nano-vllm's workload, Qwen2.5-1.5B"),
    Part("nano_large", 45, "nano-vllm's workload, Qwen2.5-7B"),
)


def run_part(part: Part, deadline: float, work: Path, dry: bool, log: Path) -> dict[str, Any]:
    """Run one part until `deadline` on the monotonic clock. Returns its result, with what went wrong as "error".

    The part writes its result to a file as it grows, so what it had before it failed is there.
    """
    result_file, output_file = work / f"{part.name}.json", work / f"{part.name}.log"
    seconds = max(deadline - time.monotonic(), 1.0)
    command = [sys.executable, "-m", "s1engine.bench.device.parts", part.name]
    command += ["--work", str(work), "--result", str(result_file), "--until", f"{time.time() + seconds:.1f}"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if dry:  # threads that wait for each other on a busy machine take minutes
        environment.setdefault("OMP_NUM_THREADS", "1")
    start = time.monotonic()
    with output_file.open("wb") as output:
        process = subprocess.Popen(
            command + ["--dry"] * dry,
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(seconds)
            error = f"exit status {status}" if status else None
        except subprocess.TimeoutExpired:
            error = f"not over after {seconds:.0f} s"
        finally:
            _end(process)
    text = output_file.read_text(errors="replace")
    with log.open("a") as kept:
        kept.write(f"===== {part.name}\n{text}\n")
    result: dict[str, Any] = json.loads(result_file.read_text()) if result_file.exists() else {}
    result |= {"title": part.title, "wall_seconds": round(time.monotonic() - start, 1)}
    error = error or result.get("error")
    if error is not None:
        result |= {"error": error, "output": text.splitlines()[-KEPT_LINES:]}
    return result


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a part: all that it started is in its own process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def text_of(results: dict[str, dict[str, Any]]) -> str:
    lines = []
    for name, result in results.items():
        lines.append(f"== {result['title']} ({name}, {result['wall_seconds']:.0f} s)")
        if "text" in result:
            lines.append(result["text"])
        if "error" in result:
            lines += [f"FAILED: {result['error']}", *(f"  | {line}" for line in result["output"])]
        lines.append("")
    return "\n".join(lines)


def run(parts: tuple[Part, ...], out: Path, dry: bool) -> int:
    """Run parts, write device.json, device.txt and device.log to `out`. Returns 1 if any part failed, else 0."""
    out.mkdir(parents=True, exist_ok=True)
    log = out / "device.log"
    log.write_text("")
    results: dict[str, dict[str, Any]] = {}
    deadline = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="s1engine-device-") as work:
        for part in parts:
            deadline += part.seconds
            results[part.name] = run_part(part, deadline, Path(work), dry, log)
            print(text_of({part.name: results[part.name]}), flush=True)
            # After every part: whoever ends this job early has what there is.
            (out / "device.json").write_text(json.dumps({"dry": dry, "parts": results}, indent=1))
            (out / "device.txt").write_text(text_of(results))
    failed = [name for name, result in results.items() if "error" in result]
    print(f"results: {out}; " + (f"FAILED: {', '.join(failed)}" if failed else "all parts passed"))
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="bash bench/device.sh", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="on the CPU, at tiny sizes")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="these parts alone")
    args = parser.parse_args()
    out = os.environ.get("OUT") or (tempfile.mkdtemp(prefix="s1engine-dry-") if args.dry else ROOT / "bench/results")
    return run(tuple(part for part in PARTS if not args.only or part.name in args.only), Path(out), args.dry)


if __name__ == "__main__":
    sys.exit(main())
