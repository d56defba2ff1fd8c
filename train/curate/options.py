"""The options of `s1engine curate`, by stage, and the config file that holds the same options for `run`."""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from s1engine.train.curate.decontaminate import WORDS
from s1engine.train.curate.difficulty import SUFFIX, Solving
from s1engine.train.curate.quality import REQUIRED
from s1engine.train.curate.rows import ROLES
from s1engine.train.curate.select import Selection


def add_io(parser: argparse.ArgumentParser, output: str) -> None:
    parser.add_argument(
        "--input",
        nargs="+",
        default=[],
        metavar="SOURCE",
        help=".jsonl and .parquet files, and hub datasets: owner/name or owner/name:split",
    )
    parser.add_argument("--output", help=output)
    columns = parser.add_argument_group("columns (each default is what the rows have)")
    for role, names in ROLES.items():
        columns.add_argument(f"--{role}-column", metavar="NAME", help=" or ".join(names))


def add_quality(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("quality")
    group.add_argument(
        "--require",
        nargs="+",
        default=list(REQUIRED),
        metavar="ROLE",
        help=f"what a row must have, of {', '.join(ROLES)} (default: {' '.join(REQUIRED)})",
    )


def add_decontaminate(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("decontamination")
    group.add_argument(
        "--against", nargs="+", default=[], metavar="SOURCE", help="evaluation sets, as --input takes them"
    )
    group.add_argument("--words", type=int, default=WORDS, help="words in a row that may not be shared (8)")
    group.add_argument(
        "--add-accepted",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare each source with those before it as well (default, as the s1 authors did)",
    )


def add_difficulty(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("difficulty")
    group.add_argument("--model", nargs="+", default=[], help="models that try each question: folders or hub ids")
    group.add_argument("--tokenizer", help="measure the traces with this one: a folder or hub id")
    group.add_argument("--suffix", default=SUFFIX, help="text after each question (default: that asks for a box)")
    group.add_argument("--temperature", type=float, default=Solving.temperature, help="0.05, as the s1 authors'")
    group.add_argument("--max-tokens", type=int, default=32768, help="tokens of one answer at most (32768)")
    group.add_argument("--thinking-tokens", type=int, help="thinking tokens at most")
    group.add_argument("--ignore-end", type=int, default=0, help='ends of thinking to replace by "Wait"')
    group.add_argument("--min-answer-tokens", type=int, default=0, help="tokens kept free for the answer")
    group.add_argument("--kind", choices=("math", "integer", "choice"), default=Solving.kind, help="of the answers")
    group.add_argument(
        "--drop-unreadable",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="drop rows without a usable answer",
    )


def add_label(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("labels")
    group.add_argument("--label-model", help="a folder or hub id; with --endpoint, its name there")
    group.add_argument("--endpoint", metavar="URL", help="an OpenAI-compatible server, e.g. http://localhost:8000/v1")
    group.add_argument("--api-key-env", default="OPENAI_API_KEY", metavar="NAME", help="variable that holds its key")
    group.add_argument("--concurrency", type=int, default=8, help="requests to it at a time (8)")
    group.add_argument("--label-max-tokens", type=int, default=1024, help="tokens of one reply at most (1024)")
    group.add_argument("--label-temperature", type=float, default=0.0, help="of the first try; the second has 0.7")


def add_models(parser: argparse.ArgumentParser) -> None:
    """What all models of this engine are loaded and asked with."""
    group = parser.add_argument_group("models")
    group.add_argument("--device", default="auto", help="auto, cpu or cuda")
    group.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    group.add_argument("--quantization", choices=("int8",), help="hold the matrices in 8 bits (CPUs)")
    group.add_argument("--max-model-len", type=int, help="context, in tokens")
    group.add_argument("--thinking-format", default="auto", help="auto, s1, deepseek-r1 or qwen3")
    group.add_argument("--max-num-seqs", type=int, default=256, help="questions that are answered at a time (256)")


def add_replies(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--replies", help="file of the replies so far, which are not asked for again (OUTPUT's name + .replies.jsonl)"
    )


def add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (0)")


def add_select(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("selection")
    default = Selection()
    group.add_argument("--size", type=int, default=default.size, help="rows in the end (1000)")
    group.add_argument(
        "--uniform-until",
        type=int,
        default=default.uniform_until,
        help="rows when the draw turns to the benchmarks' mix",
    )
    group.add_argument("--math-tokens", type=int, default=default.math_tokens, help="a trace longer than this is kept")
    group.add_argument("--gpqa-share", type=float, default=default.gpqa_share, help="weight of GPQA beside AIME's 1")
    for name in ("aime", "gpqa", "math"):
        source = getattr(default, f"{name}_source")
        group.add_argument(f"--{name}-source", default=source, help=f"text in the source of {name.upper()}'s rows")


class ReadConfig(argparse.Action):
    """`--config FILE`: its options are parsed as if they stood here; those that follow on the command line win."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        changed = [name for name, value in vars(namespace).items() if value != parser.get_default(name)]
        if changed:
            parser.error(f"--config has to come first, before --{changed[0].replace('_', '-')}")
        try:
            arguments = list(config_arguments(read_config(Path(values))))
        except (OSError, ValueError) as error:
            parser.error(f"--config {values}: {error}")
        parser.parse_args(arguments, namespace)
        setattr(namespace, self.dest, values)


def read_config(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    if path.suffix == ".toml":
        return tomllib.loads(content.decode())
    if path.suffix == ".json":
        config = json.loads(content)
        if not isinstance(config, dict):
            raise ValueError("it has to hold one JSON object")
        return config
    raise ValueError(f"unknown suffix {path.suffix!r}; valid are .toml and .json")


def config_arguments(config: Mapping[str, Any]) -> Iterator[str]:
    """A config as a command line. Tables only group their options: an option may stand in any or in none."""
    for name, value in config.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, Mapping):
            yield from config_arguments(value)
        elif isinstance(value, bool):
            yield option if value else f"--no-{option[2:]}"
        elif isinstance(value, Sequence) and not isinstance(value, str):
            yield option
            yield from map(str, value)
        elif value is not None:
            yield f"{option}={value}"
