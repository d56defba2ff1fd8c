"""The tiny L1 from beginning to end: the reasoner learns to think for the length that it is asked for.

Five commands, each of which can also be run by itself; what is there already is not made again, and a training that
was interrupted goes on. In the folder then stand the models (start, exact and max), and eval/report.html; l1_summary.py
has the numbers of several seeds side by side.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from s1engine.train.tiny import MODEL_DIR
from s1engine.train.tiny.prepare import write_problems

EXAMPLE = "example: python -m s1engine.train.tiny.l1 --out build/tiny-l1 --seed 0"
CONFIGS = Path(__file__).parents[1] / "configs"
TEST = Path(__file__).parent / "test.jsonl"
TARGETS = (22, 30, 38, 43, 54, 65, 75, 86)
"""From half to twice the 43 tokens that the reasoner writes on average where no length is set."""
CLOSE = 11
"""Tokens of a response that are not thinking: under a cap of so many less no response is longer than its target."""


class Stage(NamedTuple):
    """A command, and what it leaves when it is done."""

    name: str
    result: Path
    arguments: list[str]


def stages(out: Path, seed: int, limit: int) -> list[Stage]:
    def trained(name: str, command: str, **settings: object) -> Stage:
        changes = [f"--set={key}={value}" for key, value in {"output": out / name, "seed": seed, **settings}.items()]
        config = CONFIGS / f"tiny-l1-{name}.toml"
        return Stage(name, out / name / "model", ["s1engine.cli", command, "--config", str(config), *changes])

    problems, lengths = out / "problems.jsonl", out / "lengths.jsonl"
    models = [out / name / "model" for name in ("start", "exact", "max")]
    asked = ",".join(map(str, TARGETS))
    caps = ",".join(str(target - CLOSE) for target in TARGETS)
    return [
        Stage("lengths", lengths, ["s1engine.train.tiny.lengths", "--seed", str(seed), "--out", str(lengths)]),
        trained("start", "sft", model=MODEL_DIR, data=lengths),
        trained("exact", "grpo", model=models[0], data=problems),
        trained("max", "grpo", model=models[1], data=problems),
        Stage(
            "eval",
            out / "eval" / "report.html",
            [
                *("s1engine.cli", "eval", f"reasoner={MODEL_DIR}"),
                *(f"{name}={model}" for name, model in zip(("start", "exact", "max"), models, strict=True)),
                *("--task", str(TEST), "--limit", str(limit), "--temperature", "1", "--max-tokens", "320"),
                *("--seed", str(seed), "--deterministic", "--out", str(out / "eval")),
                *("--strategy", "plain", f"cap={caps}", "ignore=1,2,4", f"l1-exact={asked}", f"l1-max={asked}"),
            ],
        ),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m s1engine.train.tiny.l1",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("--seed", type=int, default=0, help="of all stages (0)")
    parser.add_argument("--limit", type=int, default=1000, help="test problems, each asked for every length (1000)")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    write_problems(args.out / "problems.jsonl")
    environment = {"OMP_NUM_THREADS": "1"} | os.environ  # operators this small are over before a second thread begins
    for stage in stages(args.out, args.seed, args.limit):
        if stage.result.exists():
            print(f"{stage.name}: {stage.result} is there", file=sys.stderr)
            continue
        begun = time.monotonic()
        print(f"{stage.name}: python -m {' '.join(stage.arguments)}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", *stage.arguments], env=environment, check=True)
        print(f"{stage.name}: {(time.monotonic() - begun) / 60:.1f} minutes", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
