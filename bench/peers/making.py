"""Makes what the engines need, once: their virtual environments, and the model in their formats."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from s1engine.bench.peers.engines import WORKERS, Environment

LAST_LINES = 4


class Failed(RuntimeError):
    """Something that an engine needs could not be made, or an engine has failed; the message is the reason."""


def once(folder: Path, recipe: dict[str, Any], what: str, make: Callable[[Path], object]) -> Path:
    """`folder`, made by make(folder) unless it was made by the same recipe before.

    The recipe is written beside the result when all is done, so that a half-made folder counts for nothing.
    """
    stamp = folder / "made-by.json"
    wanted = json.dumps(recipe, indent=1, sort_keys=True)
    if stamp.is_file() and stamp.read_text() == wanted:
        return folder
    print(f"making {what} in {folder} …", file=sys.stderr)
    begun = time.perf_counter()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    make(folder)
    stamp.write_text(wanted)
    print(f"made {what} in {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    return folder


def make_environment(environment: Environment, root: Path) -> Path:
    """The environment's folder below `root`. Raises Failed.

    `packages.txt` in it lists every version it holds; what was done stands in a log beside it.
    """
    folder = root / environment.name

    def make(folder: Path) -> None:
        pip = [str(python_of(folder)), "-m", "pip"]
        commands = [
            [sys.executable, "-m", "venv", str(folder)],
            [*pip, "install", *environment.requirements],
        ]
        if environment.removed:
            commands.append([*pip, "uninstall", "--yes", *environment.removed])
        log = root / f"{environment.name}.log"
        log.unlink(missing_ok=True)
        for command in commands:
            execute(command, log, environment.making)
        frozen = subprocess.run([*pip, "list", "--format=freeze"], capture_output=True, text=True, check=True)
        (folder / "packages.txt").write_text(frozen.stdout)

    recipe = {
        "requirements": environment.requirements,
        "removed": environment.removed,
        "making": dict(environment.making),
        "python": sys.version,
    }
    return once(folder, recipe, f"the environment of {environment.name} ({environment.effort})", make)


def convert(environment: Environment, folder: Path, model: Path, root: Path) -> Path:
    """The model as the environment's engines read it, below `root`. folder: the environment's. Raises Failed."""
    if environment.converter is None:
        return model
    converter = WORKERS / environment.converter

    def make(out: Path) -> None:
        log = root / f"{environment.name}.conversion.log"
        log.unlink(missing_ok=True)
        execute([str(python_of(folder)), "-P", str(converter), str(model), str(out)], log, environment.making)

    recipe = {
        "converter": hashlib.sha256(converter.read_bytes()).hexdigest(),
        "requirements": environment.requirements,
    }
    return once(root / environment.name, recipe, f"the model for {environment.name}", make)


def packages(folder: Path) -> list[str]:
    """Every package of a made environment, as `name==version`."""
    return (folder / "packages.txt").read_text().splitlines()


def python_of(folder: Path) -> Path:
    return folder / "bin" / "python"


def execute(command: Sequence[str], log: Path, variables: Mapping[str, str]) -> None:
    """Run it with its output at the log's end. Raises Failed with the last lines."""
    environment = {**os.environ, **variables}
    with open(log, "a") as out:
        status = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment).returncode
    if status:
        raise Failed(f"exit status {status} of {' '.join(command[:4])} …: {last_lines(log)} (all of it in {log})")


def last_lines(log: Path) -> str:
    """The end of what a process said, in a line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-LAST_LINES:])[-600:]
