"""Holds the import floors: which part of the project may know which other part.

Every module's imports are read from its source with `ast`, wherever they stand (in a function and under
`TYPE_CHECKING` too: knowing a type is knowing the module), and compared with `FLOORS`.
"""

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAPPED = ("kernels", "train", "bench")

# The public contract: plain descriptions that every floor above may read.
CONTRACT = {"s1engine.params", "s1engine.outputs", "s1engine.config"}
# What a user may import, and so what the trainer and the benchmarks may. "s1engine" alone means its top-level names.
PUBLIC = {"s1engine", "s1engine.llm", *CONTRACT, "s1engine.thinking", "s1engine.models", "s1engine.kernels"}
BELOW_LLM = {"s1engine.engine", "s1engine.models", "s1engine.thinking", "s1engine.kernels", *CONTRACT}

# Module prefix -> the other modules of the project that it may import, each with what lies below it; itself always.
FLOORS: dict[str, set[str]] = {
    # The rows of the thinking machine are integers that its kernel reads as well.
    "s1engine.kernels": {"s1engine.thinking"},
    "s1engine.thinking": set(),
    "s1engine.models": {"s1engine.kernels"},
    "s1engine.config": {"s1engine.thinking"},
    "s1engine.params": {"s1engine.thinking", "s1engine.config"},
    "s1engine.outputs": {"s1engine.thinking", "s1engine.params"},
    "s1engine.engine": {"s1engine.thinking", "s1engine.kernels", "s1engine.models", *CONTRACT},
    "s1engine.llm": BELOW_LLM,
    # Its top-level names, LLMEngine among them.
    "s1engine": {"s1engine.llm", "s1engine.engine", "s1engine.thinking", *CONTRACT},
    "s1engine.environment": {"s1engine", "s1engine.thinking", "s1engine.kernels"},
    "s1engine.serve": {"s1engine", "s1engine.llm", *BELOW_LLM},
    "s1engine.embed": {"s1engine", "s1engine.llm", *BELOW_LLM},
    "s1engine.bench": PUBLIC,
    "s1engine.train": {*PUBLIC, "s1engine.bench.reasoning.grading", "s1engine.bench.reasoning.l1_wording"},
    "s1engine.cli": {
        *("s1engine.serve", "s1engine.embed", "s1engine.train", "s1engine.bench", "s1engine.environment"),
        *PUBLIC,
        *BELOW_LLM,
    },
    "s1engine.__main__": {"s1engine.cli"},
}
# The command line reaches these inside its commands: importing them at its top would load them for `s1engine --help`.
LAZY_FROM_CLI = {"s1engine.train", "s1engine.bench"}
KERNEL_LIBRARIES = {"torch", "numpy", "triton", "flash_attn"}
# Top-level names that the working directory would offer by accident.
FOLDERS_NOT_PACKAGES = {"kernels", "train", "bench", "csrc", "tests"}


def modules() -> dict[str, Path]:
    """Every module of the installed package, by import name."""
    found = {}
    for folder, prefix in [("s1engine", "s1engine"), *((name, f"s1engine.{name}") for name in MAPPED)]:
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((prefix, *parts)).removesuffix(".__init__")] = path
    return found


def imports(source: str, name: str, is_package: bool, known: set[str]) -> Iterator[tuple[str, int, bool]]:
    """Yields (absolute module, line, at import time) for every import of a source; `known` tells modules from names."""
    tree = ast.parse(source)
    deferred = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        at_import = node not in deferred
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".") if is_package else name.split(".")[:-1]
                package = package[: len(package) - (node.level - 1)]
                base = ".".join([*package, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield (inner if inner in known else base), node.lineno, at_import
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {
            "import_module",
            "importlib.import_module",
            "__import__",
        }:
            target = node.args[0] if node.args else None
            if isinstance(target, ast.Constant) and isinstance(target.value, str):
                yield target.value, node.lineno, at_import


def within(module: str, prefix: str) -> bool:
    # "s1engine" alone is its top-level names, not everything beneath it.
    return module == prefix or (prefix != "s1engine" and module.startswith(prefix + "."))


def floor_of(module: str) -> str | None:
    return next((prefix for prefix in FLOORS if within(module, prefix)), None)


def offences(source: str, name: str, is_package: bool, known: set[str]) -> list[str]:
    """The imports of one module that its floor forbids, as 'module:line imports target: why'."""
    floor = floor_of(name)
    if floor is None:
        return [f"{name} stands on no floor: add it to FLOORS in {Path(__file__).name}"]
    found = []
    for target, line, at_import in imports(source, name, is_package, known):
        why = None
        top = target.split(".")[0]
        if top == "s1engine":
            if not within(target, floor) and not any(within(target, allowed) for allowed in FLOORS[floor]):
                why = f"{floor} may import {', '.join(sorted(FLOORS[floor])) or 'nothing else of s1engine'}"
            elif floor == "s1engine.cli" and at_import and any(within(target, lazy) for lazy in LAZY_FROM_CLI):
                why = "only inside the command that needs it"
        elif top in FOLDERS_NOT_PACKAGES:
            why = f"write s1engine.{top}" if top in MAPPED else f"{top} is a folder of the checkout, not a package"
        elif floor == "s1engine.kernels" and top not in KERNEL_LIBRARIES | sys.stdlib_module_names:
            why = f"kernels use {', '.join(sorted(KERNEL_LIBRARIES))} and the standard library alone"
        if why is not None:
            found.append(f"{name}:{line} imports {target}: {why}")
    return found


def test_every_module_keeps_to_its_floor() -> None:
    known = modules()
    assert {"s1engine", "s1engine.models", "s1engine.engine"} <= set(known), "the walk found too little"
    names = set(known) | {f"s1engine.{folder}" for folder in MAPPED}
    found = [
        offence
        for name, path in sorted(known.items())
        for offence in offences(path.read_text(encoding="utf-8"), name, path.name == "__init__.py", names)
    ]
    assert not found, "\n" + "\n".join(found)


def test_floors_have_no_cycle() -> None:
    graph = {
        floor: {below for target in allowed if (below := floor_of(target)) is not None and below != floor}
        for floor, allowed in FLOORS.items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("s1engine.kernels.rms_norm", "import transformers"),
        ("s1engine.kernels.rms_norm", "from s1engine.models import qwen"),
        ("s1engine.kernels.rms_norm", "from ..models import qwen"),
        ("s1engine.kernels.rms_norm", "from .. import engine"),
        ("s1engine.thinking.machine", "from s1engine.params import SamplingParams"),
        ("s1engine.thinking.machine", "if TYPE_CHECKING:\n    from s1engine.engine import core"),
        ("s1engine.models.qwen", "def load():\n    from s1engine.engine import core"),
        ("s1engine.models.qwen", "import s1engine"),
        ("s1engine.engine.core", "from s1engine import llm"),
        ("s1engine.engine.core", "import importlib\nimportlib.import_module('s1engine.serve.app')"),
        ("s1engine.llm", "from s1engine.train import sft"),
        ("s1engine.serve.app", "def f():\n    import s1engine.bench.speed"),
        ("s1engine.cli", "from s1engine.bench.speed import throughput"),
        ("s1engine.train.grpo", "from s1engine.engine.core import EngineCore"),
        ("s1engine.train.grpo", "from s1engine.bench.reasoning.tasks import load"),
        ("s1engine.train.grpo", "from bench.reasoning.grading import grade"),
        ("s1engine.bench.reasoning.tasks", "from s1engine.train.tiny import task"),
        ("s1engine.bench.reasoning.tasks", "import kernels"),
        ("s1engine.nowhere", "import os"),
    ],
)
def test_an_offence_is_found(name: str, source: str) -> None:
    known = {*modules(), "s1engine.kernels", "s1engine.engine", "s1engine.llm", "s1engine.models.qwen"}
    assert len(offences(source, name, False, known)) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("s1engine.kernels.rms_norm", "import math, torch, triton.language as tl\nfrom .registry import register"),
        ("s1engine.thinking.machine", "from . import formats\nfrom .formats import Trigger"),
        ("s1engine.models.qwen", "from s1engine.kernels.rms_norm import rms_norm\nimport transformers"),
        ("s1engine.engine.core", "from s1engine.outputs import RequestOutput\nfrom ..models import qwen"),
        ("s1engine.cli", "def bench():\n    from s1engine.bench.speed import throughput"),
        ("s1engine.train.grpo", "from s1engine import LLM\nfrom s1engine.bench.reasoning.grading import grade"),
        ("s1engine.bench.reasoning.tasks", "from s1engine import LLM, SamplingParams"),
    ],
)
def test_a_permitted_import_is_not_an_offence(name: str, source: str) -> None:
    assert offences(source, name, False, {*modules(), "s1engine.thinking.formats", "s1engine.models.qwen"}) == []
