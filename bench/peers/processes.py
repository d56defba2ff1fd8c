"""An engine in a process of its own: spoken to by JSON lines, stopped between its turns, its memory watched."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from s1engine.bench.peers.engines import WORKERS
from s1engine.bench.peers.making import Failed, last_lines

SAMPLE_SECONDS = 0.05
TICKS = os.sysconf("SC_CLK_TCK")
# Of a process's memory, as /proc names it: private, of files (weights that are mapped, libraries), both at most.
MEMORY = {"RssAnon:": "anonymous", "RssFile:": "file_mapped", "VmHWM:": "peak"}


class Worker:
    """A worker that is asked one thing at a time.

    It is stopped (SIGSTOP) but while it answers, so that no engine spins or collects its garbage in another's turn: it
    and what it started, which is its process group.
    """

    def __init__(self, python: Path, worker: str, threads: int, variables: Mapping[str, str], log: Path) -> None:
        self.memory = dict.fromkeys(MEMORY.values(), 0)
        self._log = log
        with open(log, "w") as errors:
            self._process = subprocess.Popen(
                [python, "-P", WORKERS / "serve.py", WORKERS / worker],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, "OMP_NUM_THREADS": str(threads), **variables},
                process_group=0,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, request: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """Its answer. Raises Failed where it has none in `timeout` seconds, reports an error, or dies."""
        assert self._process.stdin and self._process.stdout
        deadline = time.monotonic() + timeout
        os.killpg(self.pid, signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            while not select.select([self._process.stdout], [], [], SAMPLE_SECONDS)[0]:
                self._sample()
                if time.monotonic() > deadline:
                    raise Failed(f"no answer to {request['op']!r} in {timeout:.0f} s")
            self._sample()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            raise Failed(f"it ended with exit status {self._process.wait()}: {last_lines(self._log)}")
        os.killpg(self.pid, signal.SIGSTOP)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def generate(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, timeout: float
    ) -> tuple[float, list[list[int]]]:
        """Seconds, as the worker takes them, and new tokens. Raises Failed, for a wrong number of tokens too."""
        answer = self.ask({"op": "generate", "prompts": prompts, "new_tokens": new_tokens}, timeout)
        counts = [len(ids) for ids in answer["token_ids"]]
        if counts != [new_tokens] * len(prompts):
            raise Failed(f"asked for {new_tokens} tokens of each of {len(prompts)} prompts, it gave {counts}")
        return answer["seconds"], answer["token_ids"]

    def cpu_seconds(self) -> float:
        """That its threads have used up to now."""
        with open(f"/proc/{self.pid}/stat") as line:
            user, system = line.read().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / TICKS

    def close(self) -> None:
        if self._process.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()

    def _sample(self) -> None:
        try:
            status = Path(f"/proc/{self.pid}/status").read_text()
        except OSError:
            return  # it is dying; what it says next tells
        for line in status.splitlines():
            field, *values = line.split()
            if field in MEMORY:
                self.memory[MEMORY[field]] = max(self.memory[MEMORY[field]], 1024 * int(values[0]))


def busy_seconds() -> float:
    """Processor seconds that the machine has given to anybody, or that were taken from it, since it started."""
    with open("/proc/stat") as lines:
        user, nice, system, _idle, _wait, irq, softirq, steal = map(int, lines.readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / TICKS
