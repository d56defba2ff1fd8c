"""Processes that grade, each item within a hard deadline.

math-verify's own limits use `signal.alarm`, which only a main thread may call and which ends no loop inside C code. So
an item that overruns costs its process: it is killed, the item is judged "timeout", and another process takes the rest.
The deadline is the parent's clock. Processes are started afresh (no fork: the caller may hold CUDA and threads), by
`subprocess` rather than `multiprocessing`, whose spawned children import the caller's main module once more.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import Pipe, wait
from pathlib import Path

WORKER = Path(__file__).with_name("grading_worker.py")
MEMORY_BYTES = 2 << 30  # address space of a worker; math-verify's imports take some 0.1 GiB of it
START_SECONDS = 120.0  # for Python and sympy to load, from a cold disk
MAX_FAILED_STARTS = 3


class Worker:
    """A process that judges one pair of gold answer and answer at a time; at first one that is still starting."""

    def __init__(self, timeout: float) -> None:
        self.ready = False
        self.item: int | None = None  # the number of the pair in hand
        self.gold_read = False
        self.deadline = time.monotonic() + START_SECONDS
        self.connection, theirs = Pipe()
        processor_seconds = math.ceil(timeout) + 1  # of an item: ends a worker whose parent is gone
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(WORKER)]
                + [str(number) for number in (theirs.fileno(), MEMORY_BYTES, processor_seconds, os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                # sympy's order of terms depends on it, and with that the way it takes to a result.
                env={**os.environ, "PYTHONHASHSEED": "0"},
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def busy(self) -> bool:
        return self.item is not None or not self.ready

    def give(self, item: int, pair: tuple[str, str], timeout: float) -> None:
        """Raises OSError where the process has died."""
        self.item, self.gold_read, self.deadline = item, False, time.monotonic() + timeout
        self.connection.send_bytes(json.dumps(pair).encode())

    def message(self) -> str | None:
        """What it has sent; None where it has died."""
        try:
            return self.connection.recv_bytes().decode()
        except (EOFError, OSError):
            return None

    def kill(self, grace: float = 0.0) -> int:
        """Ends it, in `grace` seconds where it is about to end by itself. Its exit status, negative for a signal."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(grace)
        self._process.kill()
        self.connection.close()
        return self._process.wait()


class Pool:
    """Up to `processes` workers, each started when an item first needs it.

    Args:
        timeout: seconds that an item may take.
    """

    def __init__(self, processes: int, timeout: float) -> None:
        self._processes = processes
        self._timeout = timeout
        self._workers: list[Worker] = []
        self._failed_starts = 0  # in a row
        self._owner = os.getpid()
        weakref.finalize(self, _kill_all, self._workers)  # when it is collected, or at exit

    @property
    def pids(self) -> list[int]:
        return [worker.pid for worker in self._workers]

    def close(self) -> None:
        _kill_all(self._workers)

    def judge(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        """The verdicts on pairs (gold answer, answer), in their order.

        One of `grading_worker.VERDICTS`, "timeout" or "crash"; "bad_gold" also where the gold answer alone takes too
        long or crashes. A pair whose process dies is tried once more: the system may have ended that process for
        memory that others use.

        Raises:
            RuntimeError: a process cannot start; or this process is a fork of the one that made the pool.
        """
        if self._owner != os.getpid():
            raise RuntimeError("this Grader was made before a fork, by the parent process: make another after the fork")
        verdicts: dict[int, str] = {}
        waiting = deque(range(len(pairs)))
        crashed: set[int] = set()
        try:
            while len(verdicts) < len(pairs):
                self._hand_out(waiting, pairs)
                for worker in self._reporting():
                    message = worker.message()
                    if not worker.ready:
                        self._check_start(worker, message)
                        continue
                    item = worker.item
                    assert item is not None
                    if message == "gold":
                        worker.gold_read = True
                    elif message is not None:
                        verdicts[item] = message
                        worker.item = None
                    elif item in crashed:
                        self._abandon(worker, "crash", verdicts)
                    else:
                        crashed.add(item)
                        waiting.append(item)
                        self._remove(worker)
                for worker in [worker for worker in self._workers if worker.busy]:
                    if time.monotonic() > worker.deadline:
                        self._abandon(worker, "timeout", verdicts)
        finally:
            # After an error or Ctrl-C. Its answer would be taken for one of the next call.
            for worker in [worker for worker in self._workers if worker.item is not None]:
                self._remove(worker)
        return [verdicts[item] for item in range(len(pairs))]

    def _hand_out(self, waiting: deque[int], pairs: Sequence[tuple[str, str]]) -> None:
        for worker in [worker for worker in self._workers if not worker.busy]:
            if waiting:
                try:
                    worker.give(waiting[0], pairs[waiting[0]], self._timeout)
                    waiting.popleft()
                except OSError:
                    self._remove(worker)  # it died while it had nothing to do
        starting = sum(not worker.ready for worker in self._workers)
        for _ in range(min(self._processes - len(self._workers), len(waiting) - starting)):
            self._workers.append(Worker(self._timeout))

    def _reporting(self) -> list[Worker]:
        """The workers that have something to say, waited for until the next deadline."""
        busy = [worker for worker in self._workers if worker.busy]
        left = min(worker.deadline for worker in busy) - time.monotonic()
        heard = wait([worker.connection for worker in busy], max(0.0, left))
        return [worker for worker in busy if worker.connection in heard]

    def _check_start(self, worker: Worker, message: str | None) -> None:
        if message == "ready":
            worker.ready, self._failed_starts = True, 0
            return
        self._workers.remove(worker)
        status = worker.kill(grace=1.0)
        self._failed_starts += 1  # the system may have ended one for memory that others use
        if message is not None or self._failed_starts == MAX_FAILED_STARTS:
            raise RuntimeError(f"a grading process did not start: {message or f'it ended with status {status}'}")

    def _abandon(self, worker: Worker, verdict: str, verdicts: dict[int, str]) -> None:
        self._remove(worker)
        if worker.item is None:
            raise RuntimeError(f"a grading process did not start within {START_SECONDS:.0f} s")
        verdicts[worker.item] = verdict if worker.gold_read else "bad_gold"

    def _remove(self, worker: Worker) -> None:
        worker.kill()
        self._workers.remove(worker)


def _kill_all(workers: list[Worker]) -> None:
    for worker in workers:
        worker.kill()
    workers.clear()
