"""What the speed benchmarks ask for alike: a model, a device, and counts."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from s1engine.bench.speed.shapes import SHAPES, make_model


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", help="a model folder or hub id")
    source.add_argument(
        "--shape", choices=sorted(SHAPES), default="qwen2.5-0.5b", help="random weights at a real shape"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def chosen_device(args: argparse.Namespace) -> torch.device:
    """Raises ValueError where the device that is asked for is not there."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU")
    return torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")


@contextmanager
def model_folder(args: argparse.Namespace) -> Iterator[str]:
    """The model that `args` name: a folder or hub id, or a folder of random weights that is there inside the block."""
    if args.model:
        yield args.model
        return
    with tempfile.TemporaryDirectory() as folder:
        print(f"writing random weights of {args.shape} …", file=sys.stderr)
        yield str(make_model(args.shape, Path(folder), getattr(torch, args.dtype)))


def check_counts(args: argparse.Namespace, *names: str) -> None:
    """Raise ValueError unless each of these arguments, a number or a list of them, is at least 1."""
    for name in names:
        value = getattr(args, name)
        least = min(value) if isinstance(value, list) else value
        if least < 1:
            raise ValueError(f"--{name.replace('_', '-')} {least}: must be at least 1")
