"""What the comparisons of trainers share: TRL's environment, models of few layers, processes, the report's end."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from s1engine.bench.peers.engines import Environment
from s1engine.bench.peers.making import packages
from s1engine.bench.speed import machine
from s1engine.bench.speed.shapes import SHAPES, make_model

TRL = Environment(
    name="trl", requirements=("torch==2.13.0", "transformers==5.23.0", "trl==1.16.0", "datasets==5.2.0", "numpy==2.4.6")
)
LOOK_SECONDS = 0.1  # between two looks at whether a process has done enough
Name = TypeVar("Name")


def add_running(parser: argparse.ArgumentParser) -> None:
    """Arguments of every comparison."""
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    parser.add_argument("--venvs", type=Path, default=Path("~/.cache/s1engine/venvs").expanduser())
    parser.add_argument("--output", type=Path, help="write the JSON there")


def rotated(names: Sequence[Name], turn: int) -> list[Name]:
    """Their order in a turn: each of them begins equally often."""
    first = turn % len(names)
    return [*names[first:], *names[:first]]


def write_shape(shape: str, layers: int, dtype: str, folder: Path) -> Path:
    """A model of the shape's width and vocabulary with so many layers and random weights; 0: all of its layers."""
    name = f"{shape}, {layers} layers" if layers else shape
    SHAPES[name] = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    return make_model(name, folder, getattr(torch, dtype))


def execute(command: list[str], log: Path, until: Callable[[], bool] = lambda: False) -> int:
    """Run it to its end, or until it has done enough. Returns the most anonymous memory that it held, in bytes.

    Raises RuntimeError with its last words.
    """
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "TOKENIZERS_PARALLELISM": "false"}
    enough = False
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | threads)
        with machine.PeakMemory(process.pid) as memory:
            while process.poll() is None:
                if until():
                    enough = True
                    process.terminate()
                    process.wait()
                else:
                    _wait(process)
    if process.returncode and not enough:
        raise RuntimeError(f"{' '.join(command[:4])} …: {log.read_text()[-1500:]}")
    return memory.peak.anonymous


def _wait(process: subprocess.Popen[bytes]) -> None:
    with suppress(subprocess.TimeoutExpired):
        process.wait(LOOK_SECONDS)


def conclude(report: dict[str, Any], args: argparse.Namespace, environment: Path) -> int:
    """Print and write the report, with what it was measured with and on. Paths are told by their last name only."""
    told: dict[str, Any] = {
        key: [path.name for path in value] if isinstance(value, list) else getattr(value, "name", value)
        for key, value in vars(args).items()
        if key not in ("output", "venvs")
    }
    report = report | {"args": told, "packages": packages(environment), "machine": machine.describe()}
    print(machine.in_words(report["machine"]))
    text = json.dumps(report)
    if args.output is not None:
        args.output.write_text(text + "\n")
    print(text)
    return 0
