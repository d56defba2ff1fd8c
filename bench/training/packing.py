"""Training speed and memory: packed rows against padding, and against TRL's SFTTrainer, on the same samples in turns.

    python -m s1engine.bench.training.packing --tokenizer FOLDER traces.jsonl

Samples keep the lengths that real traces have under a real tokenizer; the model has the full width and vocabulary of a
real shape and few layers. Each contestant runs the same optimizer steps in a process of its own; a figure counts real
tokens, not padding, and leaves the first step out. Padding in our own trainer is the same samples made as long as the
longest of their micro-batch by tokens without weight.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from s1engine.bench.peers.making import make_environment, python_of
from s1engine.bench.speed.shapes import SHAPES
from s1engine.bench.training.contestants import TRL, add_running, conclude, execute, rotated, write_shape

WORKER = Path(__file__).parent / "workers" / "run_trl.py"
OURS = ("s1engine, packed", "s1engine, padded")
THEIRS = ("TRL, padded", "TRL, padding-free")


@dataclass(frozen=True)
class Result:
    """Of one contestant in one turn; memory is the most that its process held, in bytes, file-mapped pages apart."""

    name: str
    tokens_per_second: float
    losses: list[float]
    anonymous: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data", nargs="+", type=Path, help="JSONL files with a text each row, in `response` or `thinking`"
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a tokenizer")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen2.5-0.5b")
    parser.add_argument("--layers", type=int, default=4, help="of the model")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--batch", type=int, default=8, help="samples of an optimizer step")
    parser.add_argument("--micro-batch", type=int, default=4, help="samples that are padded to one length")
    parser.add_argument("--max-tokens", type=int, default=4096, help="longer samples are left out; also a packed row")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps, the first not counted")
    add_running(parser)


def run(args: argparse.Namespace) -> int:
    environment = make_environment(TRL, args.venvs)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_model(args, folder / "model")
        samples = read_samples(args)
        write_rows(folder / "packed.jsonl", samples)
        padded = pad(samples, args.micro_batch)
        write_rows(folder / "padded.jsonl", padded)
        lengths = [len(sample) for sample in samples]
        print(
            f"{len(samples)} samples, {min(lengths)} to {max(lengths)} tokens, mean {statistics.mean(lengths):.0f}; "
            f"padded in {args.micro_batch}s they are {sum(len(ids) for ids, _ in padded) / sum(lengths):.2f} x as many"
        )
        results: list[Result] = []
        for turn in range(args.repeats):
            for contestant in rotated([*OURS, *THEIRS], turn):
                if contestant in OURS:
                    found = run_ours(args, folder, model, contestant, samples, turn)
                else:
                    found = run_trl(args, folder, model, contestant, environment)
                results.append(found)
                print(f"{contestant:<20} {found.tokens_per_second:9.1f} tokens/s {found.anonymous / 2**20:9,.0f} MiB")
    return conclude(summary(results) | {"results": [asdict(result) for result in results]}, args, environment)


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """Medians of each contestant, and of the first one's ratios to the others, turn by turn."""
    turns = {name: [r for r in results if r.name == name] for name in (*OURS, *THEIRS)}
    medians: dict[str, dict[str, Any]] = {
        name: {
            "tokens_per_second": statistics.median(r.tokens_per_second for r in own),
            "anonymous": max(r.anonymous for r in own),
            "losses": own[0].losses,
            "ratio": statistics.median(
                a.tokens_per_second / b.tokens_per_second for a, b in zip(turns[OURS[0]], own, strict=True)
            ),
        }
        for name, own in turns.items()
    }
    for name, row in medians.items():
        print(
            f"{name:<20} {row['tokens_per_second']:9.1f} tokens/s, {row['anonymous'] / 2**20:,.0f} MiB; "
            f"packed rows are {row['ratio']:.2f} x as fast"
        )
    return {"medians": medians}


def write_model(args: argparse.Namespace, folder: Path) -> Path:
    """A model of the shape with few layers, and the tokenizer beside it."""
    write_shape(args.shape, args.layers, args.dtype, folder)
    for file in args.tokenizer.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def read_samples(args: argparse.Namespace) -> list[list[int]]:
    """Token ids of the rows' texts, as many as the steps need; raises ValueError where there are too few."""
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    texts = []
    for path in args.data:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            text = next((row[key] for key in ("response", "thinking") if isinstance(row.get(key), str)), None)
            if text:
                texts.append(text)
    found = [ids for ids in tokenizer(texts)["input_ids"] if 1 < len(ids) <= args.max_tokens]
    wanted = args.steps * args.batch
    if len(found) < wanted:
        raise ValueError(
            f"the data have {len(found)} samples of at most {args.max_tokens} tokens; the steps need {wanted}"
        )
    return found[:wanted]


Rows = list[tuple[list[int], list[float]]]


def pad(samples: list[list[int]], micro_batch: int) -> Rows:
    """Samples with weights, made as long as the longest of their micro-batch by tokens without weight."""
    rows = []
    for start in range(0, len(samples), micro_batch):
        together = samples[start : start + micro_batch]
        longest = max(map(len, together))
        rows += [
            (ids + [0] * (longest - len(ids)), [1.0] * len(ids) + [0.0] * (longest - len(ids))) for ids in together
        ]
    return rows


def write_rows(path: Path, samples: list[list[int]] | Rows) -> None:
    with path.open("w") as file:
        for sample in samples:
            ids, weights = sample if isinstance(sample, tuple) else (sample, [1.0] * len(sample))
            file.write(json.dumps({"input_ids": ids, "weights": weights}) + "\n")


def run_ours(
    args: argparse.Namespace, folder: Path, model: Path, name: str, samples: list[list[int]], turn: int
) -> Result:
    out = folder / f"{name.replace(', ', '-')}-{turn}"
    kind = name.partition(", ")[2]
    settings = {
        "model": str(model), "data": str(folder / f"{kind}.jsonl"), "output": str(out), "template": "tokens",
        "max_tokens": args.max_tokens, "batch_size": args.batch, "epochs": 1, "shuffle": False, "dtype": args.dtype,
        "row_tokens": args.max_tokens, "checkpointing": False, "keep": 1,
    }  # fmt: skip
    config = folder / "run.toml"
    config.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
    peak = execute([sys.executable, "-m", "s1engine.train.sft", "--config", str(config)], folder / "ours.log")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    tokens = [sum(len(ids) for ids in samples[i : i + args.batch]) for i in range(0, len(samples), args.batch)]
    seconds = sum(line["seconds"] for line in lines[1:])
    return Result(name, sum(tokens[1:]) / seconds, [line["loss"] for line in lines], peak)


def run_trl(args: argparse.Namespace, folder: Path, model: Path, name: str, environment: Path) -> Result:
    out = folder / "trl.json"
    options = {
        "model": str(model), "data": str(folder / "packed.jsonl"), "output": str(out), "dtype": args.dtype,
        "batch": args.batch, "micro_batch": args.micro_batch,
        "padding_free": name == THEIRS[1],
    }  # fmt: skip
    peak = execute([str(python_of(environment)), "-P", str(WORKER), json.dumps(options)], folder / "trl.log")
    found = json.loads(out.read_text())
    return Result(name, sum(found["tokens"][1:]) / sum(found["seconds"][1:]), found["losses"], peak)


def main(argv: Sequence[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m s1engine.bench.training.packing", description=__doc__, formatter_class=formatter
    )
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
