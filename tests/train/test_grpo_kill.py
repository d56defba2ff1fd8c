"""kill -9 at chosen moments of a run, and the same command again: as if nothing had happened. On one rank and on two.

The moments are calls, not times: this file is also a program, which starts runs in forks of itself (so that imports are
paid for once) with one function replaced by one that kills its process.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from conditions import needs_csrc
from grpo_runs import ROOT, environment, grpo, metrics, write_config
from safetensors.torch import load_file

from s1engine.train import export
from s1engine.train import grpo as program
from s1engine.train.checkpoints import Checkpoints
from s1engine.train.length_control import LengthControl
from s1engine.train.packing import plan_rows
from s1engine.train.policy_rows import bundles
from s1engine.train.rollouts import Rollouts, read_groups

pytest.importorskip("deepspeed", reason="training is an extra: pip install 's1engine[train]'")
pytestmark = needs_csrc

# Two updates a step; evaluations after the second step and the last; of two checkpoints the older is removed.
SETTINGS: dict[str, Any] = {
    "max_num_seqs": 16, "keep": 1, "hold_out": 0.2,
    "evaluate_every": 2, "evaluation_problems": 2, "evaluation_targets": [30, 60],
}  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = write_config(tmp_path_factory.mktemp("undisturbed"), **SETTINGS)
    assert [line["step"] for line in grpo(config)] == [1, 2, 2, 3, 3]
    return config


def test_a_kill_in_any_phase_changes_nothing(tmp_path: Path, undisturbed: Path) -> None:
    config = write_config(tmp_path, **SETTINGS)
    start(*[(config, 1, phase) for phase in PHASES])
    grpo(config)
    same(config, undisturbed)


def test_the_kill_of_one_rank_changes_nothing(tmp_path: Path) -> None:
    config, other = (write_config(tmp_path / name, **SETTINGS, steps=2) for name in ("killed", "undisturbed"))
    start((other, 2, ""), *[(config, 2, phase) for phase in RANK_PHASES], (config, 2, ""))
    same(config, other)


def test_two_ranks_learn_from_the_same_rollouts_what_one_does(tmp_path: Path, undisturbed: Path) -> None:
    """The rollouts of a rank alone: those of two part from them where a sum in another order moved a weight."""
    config = write_config(tmp_path, **SETTINGS)
    rollouts = config.parent / "out" / "rollouts"
    rollouts.mkdir(parents=True)
    for path in (undisturbed.parent / "out" / "rollouts").iterdir():
        for rank in (0, 1):
            shutil.copy(path, rollouts / path.name.replace("rank-0", f"rank-{rank}"))
    start((config, 2, "replay"))
    ones, twos = metrics(undisturbed), metrics(config)
    assert len(ones) == len(twos) == 5
    for one, two in zip(ones, twos, strict=True):
        # "mismatch": the log-probabilities of the rollouts are those of the one rank's weights.
        exact = {name for name in one if not name.startswith("mismatch") and name not in ("loss", "grad_norm")}
        assert {name: one[name] for name in exact} == {name: two[name] for name in exact}
        if "loss" in one:
            assert two["mismatch_max"] < 1e-3
            assert two["loss"] == pytest.approx(one["loss"], rel=1e-5, abs=1e-7)
            assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    files = [path.parent / "out" / "model" / "model.safetensors" for path in (undisturbed, config)]
    torch.testing.assert_close(*map(load_file, files), rtol=1e-4, atol=1e-4)


def test_two_ranks_equal_one_to_the_last_bit_where_their_rows_are_the_same(tmp_path: Path) -> None:
    """Two rows a step, both on one rank or each on its own: of two numbers every sum is the same."""
    settings = {"max_num_seqs": 16, "steps": 4, "prompts": 2, "updates": 1, "max_response": 64, "row_tokens": 340}
    one, two = (write_config(tmp_path / name, **settings) for name in ("one", "two"))
    start((one, 1, ""), (two, 2, ""))
    for file in (one.parent / "out" / "rollouts").iterdir():
        lengths = [b.length for b in bundles([g for g in read_groups(file) if not g.dropped], settings["row_tokens"])]
        plans = [plan_rows(lengths, settings["row_tokens"], ranks) for ranks in (1, 2)]
        assert plans == [[[row for rank in plans[1] for row in rank]], plans[1]] and len(plans[0][0]) == 2
    assert metrics(one) == metrics(two) and len(metrics(one)) == 4
    files = [path.parent / "out" / "model" / "model.safetensors" for path in (one, two)]
    assert files[0].read_bytes() == files[1].read_bytes()


def start(*runs: tuple[Path, int, str]) -> None:
    """Runs one after another, as in `run`; each must end as its phase has it."""
    path = os.pathsep.join([str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        [sys.executable, __file__, *[str(value) for run in runs for value in run]],
        cwd=ROOT, env=environment() | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-4000:]


def same(config: Path, other: Path) -> None:
    """Metrics, rollouts and the exported model, to the last bit."""
    assert metrics(config) == metrics(other)
    for name in ("rollouts", "model"):
        one, two = ((path.parent / "out" / name).iterdir() for path in (config, other))
        assert {path.name: path.read_bytes() for path in one} == {path.name: path.read_bytes() for path in two}, name


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("not reached")


def always(*args: Any) -> bool:
    return True


def nothing(original: Callable[..., Any], *args: Any) -> None: ...


def all_of_it(original: Callable[..., Any], *args: Any) -> None:
    original(*args)


def half_of_the_text(original: Callable[..., Any], path: Path, text: Any) -> None:
    original(path, text[: len(text) // 2])


def half_of_the_file(original: Callable[..., Any], value: Any, path: str) -> None:
    original(value, path)
    os.truncate(path, os.path.getsize(path) // 2)


def half_of_the_folder(original: Callable[..., Any], folder: Path) -> None:
    next(folder.iterdir()).unlink()


def kill_in(
    owner: Any, name: str, part: Callable[..., None], number: int = 1, about: Callable[..., bool] = always
) -> None:
    """At the number-th call of owner.name that is `about` its arguments, do a part of it and die."""
    original = getattr(owner, name)
    seen = 0

    def instead(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        seen += about(*args)
        if seen < number:
            return original(*args, **kwargs)
        part(original, *args)
        die()

    setattr(owner, name, instead)


class Torn:
    """A file that is killed in the middle of its number-th line."""

    def __init__(self, file: Any, number: int) -> None:
        self.file, self.left = file, number

    def __enter__(self) -> Torn:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, text: str) -> None:
        self.left -= 1
        self.file.write(text if self.left else text[: len(text) // 2])
        if not self.left:
            self.file.flush()
            die()


def tear(name: str, number: int) -> None:
    original = Path.open

    def instead(path: Path, *args: Any, **kwargs: Any) -> Any:
        file = original(path, *args, **kwargs)
        return Torn(file, number) if path.name == name and args == ("a",) else file

    Path.open = instead


def replay() -> None:
    """No kill: learn from the rollouts that are there, though they are not of these very weights."""
    Rollouts.forget_after = lambda *_: None
    program.check_parity = lambda *_: None


# In this order each goes on from the one before.
PHASES: dict[str, Callable[[], None]] = {
    "rollouts": lambda: tear("step-1-rank-0.jsonl", 3),
    "mending the rollouts": lambda: kill_in(Path, "write_bytes", half_of_the_text),
    "second update of a step": lambda: kill_in(torch.optim.AdamW, "step", nothing, 2),
    "line of metrics": lambda: tear("metrics.jsonl", 1),
    "checkpoint": lambda: kill_in(torch, "save", half_of_the_file),
    "naming the checkpoint": lambda: kill_in(os, "replace", nothing, about=lambda _, to: Path(to).name == "latest"),
    "after the checkpoint": lambda: kill_in(Checkpoints, "save", all_of_it),
    "evaluation": lambda: kill_in(LengthControl, "run", nothing),
    "evaluated": lambda: kill_in(LengthControl, "run", all_of_it),
    "removing a checkpoint": lambda: kill_in(
        shutil, "rmtree", half_of_the_folder, about=lambda path, *_: path.name.startswith("step-")
    ),
    "mending the metrics": lambda: kill_in(
        Path, "write_text", half_of_the_text, about=lambda path, *_: path.name.startswith("metrics")
    ),
    "export": lambda: kill_in(export, "save_file", all_of_it),
    "naming the export": lambda: kill_in(os, "replace", nothing, about=lambda _, to: Path(to).name == "model"),
}

# Of two ranks the one that dies.
RANK_PHASES: dict[str, tuple[int, Callable[[], None]]] = {
    "rollouts of the second": (1, lambda: tear("step-1-rank-1.jsonl", 2)),
    "checkpoint of the first": (0, PHASES["naming the checkpoint"]),
    "last update of the second": (1, lambda: kill_in(torch.optim.AdamW, "step", nothing, 4)),
}


def run(config: str, ranks: int, phase: str) -> None:
    """A run whose ranks are forks of this process. One dies in the phase, and the others are killed, as launchers do.

    phase  "": none; "replay": none, see there
    """
    mortal, arm = RANK_PHASES.get(phase, (0, PHASES.get(phase)))
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    children: list[int] = []
    for rank in range(ranks):
        child = os.fork()
        if not child:
            status = 1
            try:
                if ranks > 1:
                    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
                    os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
                if phase == "replay":
                    replay()
                elif arm and rank == mortal:
                    arm()
                status = program.main(["--config", config])
            except BaseException:
                traceback.print_exc()
            os._exit(status)
        children.append(child)
    if arm:
        _, status = os.waitpid(children.pop(mortal), 0)
        if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
            raise SystemExit(f"{phase}: was not killed, status {status}")
        for child in children:
            os.kill(child, signal.SIGKILL)
    for child in children:
        _, status = os.waitpid(child, 0)
        if status and not arm:
            raise SystemExit(f"{phase}: ended with status {status}")


if __name__ == "__main__":
    for module in (
        "deepspeed",
        "torch._dynamo",
        "transformers.models.auto.tokenization_auto",
        "torch.utils.tensorboard",
    ):
        if module != "torch.utils.tensorboard" or find_spec("tensorboard"):
            import_module(module)  # what a run imports late
    arguments = iter(sys.argv[1:])
    for values in zip(arguments, arguments, arguments, strict=True):
        run(values[0], int(values[1]), values[2])
