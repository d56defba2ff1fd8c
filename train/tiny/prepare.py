"""Writes what `s1engine sft` needs to train the tiny reasoner from nothing.

    python -m s1engine.train.tiny.prepare --out FOLDER

    FOLDER/model             the tokenizer, and a Hugging Face model with random weights
    FOLDER/traces.parquet    the traces for template "tokens", in the order in which they are to be trained on
    FOLDER/validation.jsonl  questions and answers of the validation split

The traces are in the order of the curriculum, so it is read without shuffling, `--batch-size` traces a step, once.
Questions get no loss, since they are random digits; neither do tokens that the engine writes.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from s1engine.train.rows import needed
from s1engine.train.tiny.task import MAX_STEPS, MIN_STEPS, draw, problems
from s1engine.train.tiny.tokenizer import MAX_LENGTH, build_tokenizer
from s1engine.train.tiny.traces import Role, Trace, write_trace

RECHECK_WEIGHT = 3.0
"""Weight in the loss of the token that says what to do after "Wait", which is one in fifty."""

BATCH_SIZE = 24
"""Traces a step: about 2,000 tokens, of 81 a trace."""

ROW_GROUP = 8192


def build_model(tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    """A Qwen2 of 0.8M parameters with random weights."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        # 0.02 is meant for widths of thousands; at this one it starts the layers almost silent.
        initializer_range=0.06,
        use_cache=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True, temperature=1.0
    )
    return model


def max_steps_at(progress: float) -> int:
    """The curriculum: the longest chain. It stays short for the first tenth of training and is full from a third on."""
    shortest = MIN_STEPS + 1
    return min(MAX_STEPS, shortest + max(0, int((MAX_STEPS - shortest + 1) * (progress - 0.1) / 0.23)))


def traces(steps: int, batch_size: int, seed: int) -> Iterator[Trace]:
    """`batch_size` traces for each of `steps` steps, in order."""
    rng = random.Random(seed)
    for step in range(steps):
        longest = max_steps_at(step / steps)
        for _ in range(batch_size):
            yield write_trace(draw(rng, "train", longest), rng)


def weight(role: Role) -> float:
    return 0.0 if role == Role.GIVEN else RECHECK_WEIGHT if role in (Role.RECHECK, Role.MEND) else 1.0


def write_traces(
    path: Path, tokenizer: PreTrainedTokenizerBase, steps: int, batch_size: int, seed: int
) -> tuple[int, int]:
    """Writes the parquet file: `input_ids`, `targets`, `weights` of each trace. Returns the traces and their tokens."""
    pyarrow, parquet = needed("pyarrow", path), needed("pyarrow.parquet", path)
    ids = {tokenizer.decode([i]): i for i in range(len(tokenizer))}
    schema = pyarrow.schema(
        {
            "input_ids": pyarrow.list_(pyarrow.int16()),
            "targets": pyarrow.list_(pyarrow.int16()),
            "weights": pyarrow.list_(pyarrow.float32()),
        }
    )
    bar = tqdm(traces(steps, batch_size, seed), "writing traces", steps * batch_size, unit="trace", unit_scale=True)
    tokens = 0
    rows: list[dict[str, list[int] | list[float]]] = []
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for trace in bar:
            rows.append(
                {
                    "input_ids": [ids[token] for token in trace.tokens],
                    "targets": [ids[target] for target in trace.targets],
                    "weights": [weight(role) for role in trace.roles],
                }
            )
            tokens += len(trace.tokens)
            if len(rows) == ROW_GROUP:
                writer.write_table(pyarrow.Table.from_pylist(rows, schema))
                rows.clear()
        if rows:
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))
    return steps * batch_size, tokens


def write_problems(path: Path, count: int = 8000) -> None:
    """Questions and answers of the training split, for `s1engine grpo`."""
    rows = [{"problem": problem.question, "answer": problem.answer} for problem in problems("train", count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive integer")
    return value


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m s1engine.train.tiny.prepare",
        description="Write the random model and the training traces of the tiny reasoner, for s1engine sft.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write: model/, traces.parquet and problems")
    parser.add_argument("--steps", type=positive, default=7000, help="optimizer steps")
    parser.add_argument("--batch-size", type=positive, default=BATCH_SIZE, help="traces a step")
    parser.add_argument("--seed", type=int, default=1, help="of weights and data")
    parser.add_argument("--validation-problems", type=positive, default=200)
    parser.add_argument("--training-problems", type=positive, default=8000, help="for reinforcement, without traces")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    model_folder, traces_file = arguments.out / "model", arguments.out / "traces.parquet"
    model_folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    count, tokens = write_traces(traces_file, tokenizer, arguments.steps, arguments.batch_size, arguments.seed)
    with (arguments.out / "validation.jsonl").open("w", encoding="utf-8") as file:
        for problem in problems("validation", arguments.validation_problems):
            file.write(json.dumps({"question": problem.question, "answer": problem.answer}) + "\n")
    write_problems(arguments.out / "problems.jsonl", arguments.training_problems)
    torch.manual_seed(arguments.seed)
    build_model(tokenizer).save_pretrained(model_folder)
    tokenizer.save_pretrained(model_folder)
    print(f"{model_folder}: random weights, and the tokenizer")
    size = traces_file.stat().st_size / 1e6
    print(f"{traces_file}: {count:,} traces, {tokens:,} tokens, {tokens / arguments.steps:.0f} a step, {size:.1f} MB")


if __name__ == "__main__":
    main()
