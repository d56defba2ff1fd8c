"""A round of GRPO, ours against TRL's GRPOTrainer with transformers' rollouts, in turns: seconds by phase, and memory.

    python -m s1engine.bench.training.grpo_step --model qwen2.5-0.5b
    python -m s1engine.bench.training.grpo_step --model train/tiny/model --dtype float32 --response 128 \\
        --prompts 32 --group 16 --micro-batch 64
    python -m s1engine.bench.training.grpo_step --model train/tiny/model --dtype float32 --prompts 32 --group 16 \\
        --micro-batch 64 --problems problems.jsonl

Without --problems all responses have --response tokens: the model gets an end of text that it cannot write, and a
tokenizer whose tokens box a 0 or a 1, so that a response is right by its last token, groups have something to
learn, and both trainers compute the same. With them the model answers, each response as long as it is, and figures are
per token. Both have the same learning rate, AdamW, loss (DAPO's), rewards, and tokens of a micro-batch; no reference,
no checkpointing, one optimizer step a round. Our state of bfloat16 models is float32 (weights, both moments); TRL's is
that of the weights it loads, which are float32 under autocast, or bfloat16: both are measured.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from s1engine.bench.peers.making import make_environment, python_of
from s1engine.bench.reasoning.grading import Grader
from s1engine.bench.speed import machine
from s1engine.bench.speed.floor import Rates, model_sizes
from s1engine.bench.speed.shapes import SHAPES
from s1engine.bench.training.contestants import TRL, add_running, conclude, execute, rotated, write_shape
from s1engine.bench.training.grpo_rounds import OURS, Result, Round, least_seconds, needed, summary
from s1engine.bench.training.grpo_tasks import write_endless, write_problems

WORKER = Path(__file__).parent / "workers" / "run_trl_grpo.py"
THEIRS = {"bfloat16": ("float32", "bfloat16"), "float32": ("float32",)}
"""TRL's weights, and with them its optimizer's state, by --dtype."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="qwen2.5-0.5b", help=f"a folder, or {', '.join(sorted(SHAPES))}")
    parser.add_argument("--layers", type=int, default=0, help="of a shape; 0: all")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--problems", type=Path, help="JSONL of `problem` and `answer`, an integer")
    parser.add_argument("--prompts", type=int, default=4, help="of a round")
    parser.add_argument("--group", type=int, default=8, help="responses to a prompt")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="without --problems")
    parser.add_argument("--response", type=int, default=256, help="tokens of a response, at most with --problems")
    parser.add_argument("--micro-batch", type=int, default=8, help="responses; for us, as many tokens in a row")
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--rounds", type=int, default=3, help="of a turn, the first not counted")
    add_running(parser)


def run(args: argparse.Namespace) -> int:
    check(args)
    environment = make_environment(TRL, args.venvs)
    names = {OURS: "", **{f"TRL, {weights} weights": weights for weights in THEIRS[args.dtype]}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, data = prepare(args, folder)
        results: list[Result] = []
        rates: list[Rates] = []
        for turn in range(args.repeats):
            rates.append(measure_rates(args.dtype))
            for contestant in rotated(list(names), turn):
                if contestant == OURS:
                    rounds, peak = run_ours(args, folder / f"ours-{turn}", model, data)
                else:
                    rounds, peak = run_trl(args, folder, model, data, names[contestant], environment)
                results.append(Result(contestant, turn, rounds[1:], peak))
                phases = {name: f"{seconds:.2f}" for name, seconds in rounds[-1].seconds.items()}
                print(f"{contestant}: {phases}, {peak / 2**20:,.0f} MiB", flush=True)
        found = summary(results)
        best = Rates(bandwidth=max(rate.bandwidth for rate in rates), operations=max(rate.operations for rate in rates))
        first = next(result for result in results if result.name == OURS).rounds[0]
        least = least_seconds(first, model_sizes(str(model)), getattr(torch, args.dtype).itemsize, best)
    print(table(found, least))
    report = {"summary": found, "least_seconds": least, "rates": asdict(best), "results": [asdict(r) for r in results]}
    return conclude(report, args, environment)


def measure_rates(dtype: str) -> Rates:
    return Rates(bandwidth=machine.read_bandwidth(), operations=machine.matmul_rate(getattr(torch, dtype)))


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for what neither trainer could do."""
    if args.rounds < 2:
        raise ValueError(f"--rounds {args.rounds}: must be at least 2, of which the first is not counted")
    if args.prompts * args.group % args.micro_batch or args.micro_batch % args.group:
        raise ValueError(
            f"--micro-batch {args.micro_batch}: must be a multiple of --group {args.group} and divide "
            f"--prompts {args.prompts} times it"
        )


def prepare(args: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """(The model's folder, the file of problems), as both trainers read them."""
    model, data = folder / "model", folder / "problems.jsonl"
    if args.model in SHAPES:
        write_shape(args.model, args.layers, args.dtype, model)
    else:
        shutil.copytree(args.model, model)
    wanted = args.prompts * args.rounds
    if args.problems is None:
        write_endless(model)
        write_problems(data, wanted, args.prompt_tokens)
    else:
        lines = args.problems.read_text(encoding="utf-8").splitlines()
        if len(lines) < wanted:
            raise ValueError(f"{args.problems}: has {len(lines)} problems; {args.rounds} rounds need {wanted}")
        data.write_text("\n".join(lines[:wanted]) + "\n", encoding="utf-8")
    return model, data


def run_ours(args: argparse.Namespace, out: Path, model: Path, data: Path) -> tuple[list[Round], int]:
    """The rounds of `s1engine grpo`, which is ended before it would write a checkpoint, and its peak of memory."""
    longest = args.prompt_tokens + args.response
    settings = {
        "model": str(model), "data": str(data), "output": str(out), "kind": "integer", "objective": "correctness",
        "overlong": [args.response, args.response - 1], "steps": args.rounds + 1, "prompts": args.prompts,
        "group": args.group, "updates": 1, "max_response": args.response, "temperature": 1.0, "dtype": args.dtype,
        "row_tokens": args.micro_batch * longest, "learning_rate": args.learning_rate, "checkpointing": False,
        "save_every": 0, "loss": "dapo", "instruction": "",
    }  # fmt: skip
    config = out.with_suffix(".toml")
    config.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
    metrics = out / "metrics.jsonl"

    def enough() -> bool:
        return metrics.exists() and metrics.read_text().count("\n") >= args.rounds

    peak = execute(
        [sys.executable, "-m", "s1engine.train.grpo", "--config", str(config)], out.with_suffix(".log"), enough
    )
    lines = [json.loads(line) for line in metrics.read_text().splitlines()[: args.rounds]]
    return [read_round(out, line) for line in lines], peak


def read_round(out: Path, line: dict[str, Any]) -> Round:
    """Of a line of metrics and the rollouts of its step.

    Our passes compute what is needed and no more: see PolicyRow. Groups without variance, which are few and made again,
    are left out, though not from the seconds. Grading is a part of these, and done a second time to tell which.
    """
    path = out / "rollouts" / f"step-{line['step']}-rank-0.jsonl"
    groups = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    groups = [group for group in groups if not group["dropped"]]
    prompts = [len(group["prompt"]) for group in groups]
    responses = [[len(rollout["token_ids"]) for rollout in group["rollouts"]] for group in groups]
    seconds = {name: line[f"seconds_{name}"] for name in ("rollouts", "updates", "weights")}
    texts = [rollout["text"] for group in groups for rollout in group["rollouts"]]
    with Grader() as grader:
        begun = time.perf_counter()
        grader.grade(texts, ["1"] * len(texts), "integer")
        seconds["rewards"] = time.perf_counter() - begun
    return Round(seconds, prompts, responses, needed(prompts, responses), line["grad_norm"])


def run_trl(
    args: argparse.Namespace, folder: Path, model: Path, data: Path, weights: str, environment: Path
) -> tuple[list[Round], int]:
    out = folder / "trl.json"
    options = {
        "model": str(model), "data": str(data), "output": str(out), "weights": weights,
        "autocast": args.dtype != weights, "prompts": args.prompts, "group": args.group, "rounds": args.rounds,
        "micro_batch": args.micro_batch, "max_response": args.response, "learning_rate": args.learning_rate,
    }  # fmt: skip
    peak = execute([str(python_of(environment)), "-P", str(WORKER), json.dumps(options)], folder / "trl.log")
    rounds = []
    for found in json.loads(out.read_text()):
        seconds = found.pop("seconds")
        seconds["updates"] = seconds.pop("whole") - seconds["rollouts"]
        seconds["rollouts"] -= seconds.get("logprobs", 0.0)
        rounds.append(Round(seconds=seconds, **found))
    return rounds, peak


def table(found: dict[str, dict[str, Any]], least: dict[str, float]) -> str:
    lines = []
    for name, row in found.items():
        phases = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in row["seconds"].items())
        lines.append(
            f"{name}: {row['tokens']:.0f} tokens a round; seconds: {phases}; {row['anonymous'] / 2**20:,.0f} MiB"
        )
        times = ", ".join(f"{phase} {ratio:.2f}" for phase, ratio in row["ratios"].items())
        parts = "; ".join(
            f"{phase} {row['computed'][phase]:.2f} x the tokens that are needed, {row['padding'][phase]:.0%} padding"
            for phase in row["computed"]
        )
        if name == OURS:
            shares = ", ".join(f"{phase} {least[phase] / row['seconds'][phase]:.0%}" for phase in least)
            lines.append(f"  of the machine's floor: {shares}")
        else:
            bound = f"{row['bound']:.2f} if our rollouts took none"
            lines.append(f"  times ours: {times} ({bound}), memory {row['memory']:.2f}")
            lines.append(f"  computed: {parts}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m s1engine.bench.training.grpo_step", description=__doc__, formatter_class=formatter
    )
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except ValueError as error:
        print(f"grpo_step: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
