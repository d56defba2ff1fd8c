"""Runs of `s1engine grpo` as a user starts them, on the tiny reasoner."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from s1engine.train.tiny import MODEL_DIR, problems

ROOT = Path(__file__).parents[2]

SETTINGS: dict[str, Any] = {
    "model": str(MODEL_DIR), "kind": "integer", "dtype": "float32", "objective": "exact", "instruction": "",
    "targets": ["uniform", 20, 90], "alphas": [0.02, 0.02], "steps": 3, "prompts": 4, "group": 4, "updates": 2,
    "max_response": 120, "temperature": 1.0, "row_tokens": 700, "learning_rate": 1e-3, "checkpointing": False,
    "save_every": 1,
}  # fmt: skip


def write_config(folder: Path, **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    rows = [{"problem": p.question, "answer": p.answer} for p in problems("train", 40)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = SETTINGS | {"data": str(folder / "problems.jsonl"), "output": str(folder / "out")} | settings
    path = folder / "config.toml"
    path.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()))
    return path


def command(config: Path, ranks: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launcher, "-m", "s1engine.train.grpo", "--config", str(config)]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}


def grpo(config: Path, ranks: int = 1) -> list[dict[str, Any]]:
    """A run to its end. Returns its metrics."""
    ran = subprocess.run(
        command(config, ranks), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return metrics(config)


def metrics(config: Path) -> list[dict[str, Any]]:
    """Its steps without what they took."""
    file = config.parent / "out" / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [{name: value for name, value in line.items() if not name.startswith("seconds_")} for line in lines]
