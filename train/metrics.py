"""What a run reports: one JSON object a line, a progress bar, and TensorBoard where it is installed."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm


class Metrics:
    """A context manager. Lines beyond `done` steps are of a run that was cut short, and are dropped.

    enabled  off on ranks but the first: nothing is written or shown
    """

    def __init__(self, folder: Path, done: int, steps: int, enabled: bool = True) -> None:
        self.enabled = enabled
        if not enabled:
            return
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        kept = [line for line in lines if _step(line) <= done]
        beside = folder / "metrics.jsonl.new"  # a kill in the middle of it must not cost the lines that are there
        beside.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        beside.replace(file)
        self._file = file.open("a", encoding="utf-8")
        self._bar = tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True)
        self._board: Any = None
        if find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

    def step(self, values: dict[str, Any], shown: str) -> None:
        """Report one optimizer step; `shown` stands beside the bar."""
        if self.enabled:
            self._write(values)
            self._bar.set_postfix_str(shown)
            self._bar.update()

    def note(self, values: dict[str, Any]) -> None:
        """Report something else that happened at a step, a validation for instance."""
        if self.enabled:
            self._write(values)
            self._bar.write(json.dumps(values))

    def _write(self, values: dict[str, Any]) -> None:
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float) and name != "step":
                    self._board.add_scalar(name, value, values["step"])

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *error: object) -> None:
        if not self.enabled:
            return
        self._bar.close()
        self._file.close()
        if self._board is not None:
            self._board.close()


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # cut off in the middle of a line
