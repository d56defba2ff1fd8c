"""Registers, spills and shared memory of the Triton kernels against bench/resources.json; compiled, without a GPU."""

from __future__ import annotations

import ast
import importlib.util
import os
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from s1engine.bench.speed.resources import (
    ARCHITECTURES,
    BOUNDS_FILE,
    MAX_REGISTERS,
    Usage,
    maxima,
    measure,
    problems,
    read_bounds,
    table,
    triton_modules,
    widened,
)
from s1engine.bench.speed.shapes import SHAPES, model_shape

USAGE = Usage(
    kernel="norm", arch="sm_90", shapes=("small",), decode=True, registers=40, stack=0, shared=2048, warps=4
)  # fmt: skip
BOUNDS = {"norm": {"sm_90": {"registers": 40, "stack": 0, "shared": 2048}}}

if importlib.util.find_spec("triton") is None:
    REASON = "Triton is not installed: there is one for Linux only"
elif os.environ.get("TRITON_INTERPRET") == "1":
    REASON = "TRITON_INTERPRET=1: Triton compiles nothing in this process"
else:
    REASON = ""
compiles = pytest.mark.skipif(bool(REASON), reason=REASON)

MODULE = """
    import triton
    import triton.language as tl
    from s1engine.kernels.triton_build import Build

    @triton.jit
    def divide(x, out, SIZE: tl.constexpr):
        at = tl.arange(0, SIZE)
        value = tl.load(x + at)
        tl.store(out + at, value / tl.sum(value, axis=0))

    def builds(shape):
        pointers = {"x": "*fp32", "out": "*fp32"}
        size = {"SIZE": 8 * triton.next_power_of_2(shape.hidden)}
        plain = Build(name="divide", kernel=divide, signature=pointers, constexprs=size, aligned=frozenset(pointers))
        squeezed = Build(name="squeezed", kernel=divide, signature=pointers, constexprs=size, options={"maxnreg": 24})
        return [plain, squeezed]
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a module that the processes that compile can import too: they start with the same sys.path."""
    (tmp_path / "kernels_of_a_test.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.syspath_prepend(tmp_path)
    return "kernels_of_a_test"


@compiles
def test_kernels_keep_to_their_bounds() -> None:
    usages = measure(triton_modules(), [model_shape(name) for name in SHAPES], ARCHITECTURES, quiet=True)
    found = problems(usages, read_bounds())
    advice = f"python -m s1engine.bench.speed.resources --write changes {BOUNDS_FILE.name}, if that is what is wanted"
    assert not found, "\n".join(["", *found, advice])
    assert {usage.arch for usage in usages} == set(ARCHITECTURES), "nothing was compiled"


def test_every_module_that_launches_a_kernel_gives_its_builds() -> None:
    for path in sorted((BOUNDS_FILE.parents[1] / "kernels").glob("*_triton.py")):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        launches = any(isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) for node in nodes)
        gives = any(isinstance(node, ast.FunctionDef) and node.name == "builds" for node in nodes)
        assert gives or not launches, path.name


@compiles
def test_a_spill_is_measured_and_equal_builds_are_compiled_once(module: str) -> None:
    shape = model_shape("qwen2.5-0.5b")
    shapes = [shape, replace(shape, name="alike", vocab=7), replace(shape, name="smaller", hidden=500)]
    usages = measure([module], shapes, ["sm_90"], quiet=True)
    assert [(usage.kernel, usage.shapes) for usage in usages] == [
        (kernel, shapes) for kernel in ("divide", "squeezed") for shapes in (("qwen2.5-0.5b", "alike"), ("smaller",))
    ]
    plain, squeezed = usages[0], usages[2]
    assert plain.stack == 0 and plain.registers > 24 and plain.shared > 0
    assert squeezed.stack > 0 and squeezed.registers <= 24
    # Bounds that allow the spill do not excuse it.
    assert problems(usages, widened(usages, {})) == [
        f"squeezed sm_90: spills {usage.stack} bytes a thread in decode steps of {', '.join(usage.shapes)}"
        for usage in usages[2:]
        if usage.stack > 0
    ]


@compiles
def test_a_build_must_name_all_arguments(module: str, tmp_path: Path) -> None:
    other = (tmp_path / f"{module}.py").read_text().replace('"x": "*fp32", ', "")
    (tmp_path / "incomplete_kernels_of_a_test.py").write_text(other)
    message = "divide: the kernel takes x, out, SIZE; signature and constexprs name out, SIZE; aligned names out"
    with pytest.raises(ValueError, match=message):
        measure(["incomplete_kernels_of_a_test"], [model_shape("qwen3-8b")], ["sm_90"], quiet=True)


@pytest.mark.parametrize(
    ("usages", "bounds", "message"),
    [
        ([replace(USAGE, registers=41, shared=2049)], BOUNDS, "norm sm_90: registers 41 > 40, shared 2049 > 2048"),
        ([USAGE, replace(USAGE, registers=64)], BOUNDS, "norm sm_90: registers 64 > 40"),
        ([replace(USAGE, stack=8, decode=False)], BOUNDS, "norm sm_90: stack 8 > 0"),
        ([USAGE], {}, "norm sm_90: no bounds; it takes {'registers': 40, 'stack': 0, 'shared': 2048}"),
        ([USAGE, replace(USAGE, arch="sm_80")], BOUNDS, "norm sm_80: no bounds; it takes"),
        ([USAGE], BOUNDS | {"gone": {}}, "gone: bounds, but no such kernel"),
        (
            [replace(USAGE, stack=8)],
            {"norm": {"sm_90": {"registers": 40, "stack": 8, "shared": 2048}}},
            "norm sm_90: spills 8 bytes a thread in decode steps of small",
        ),
    ],
)
def test_a_problem_is_named(usages: list[Usage], bounds: dict, message: str) -> None:
    assert problems([USAGE], BOUNDS) == []
    (found,) = problems(usages, bounds)
    assert found.startswith(message)


def test_widened_bounds_are_kept_to_and_never_lower() -> None:
    bounds = {"gone": {}, "norm": {"sm_80": {"registers": 9, "stack": 0, "shared": 9}, **BOUNDS["norm"]}}
    more = [replace(USAGE, registers=50, shared=100), replace(USAGE, kernel="new", registers=250)]
    wider = widened(more, bounds)
    assert problems(more, wider) == [] and set(wider) == {"norm", "new"}
    assert wider["norm"]["sm_80"] == bounds["norm"]["sm_80"]
    assert 50 < wider["norm"]["sm_90"]["registers"] <= 66 and wider["norm"]["sm_90"]["shared"] == 2048
    assert wider["new"]["sm_90"]["registers"] == MAX_REGISTERS
    assert widened([USAGE, *more[1:]], wider) == wider
    assert maxima(more)["new"]["sm_90"] == {"registers": 250, "stack": 0, "shared": 2048}


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "expected"),
    [
        ("sm_90", 32, 0, 4, 16),  # all 64 warps
        ("sm_90", 33, 0, 4, 12),  # registers of a warp are allocated 256 at a time
        ("sm_90", 64, 0, 8, 4),
        ("sm_90", 255, 0, 4, 2),  # two warps a quarter
        ("sm_80", 255, 0, 16, 0),  # does not start at all
        ("sm_80", 16, 0, 1, 32),
        ("sm_80", 32, 100 << 10, 4, 1),
        ("sm_90", 32, 100 << 10, 4, 2),
        ("sm_90", 32, 227 << 10, 4, 1),
    ],
)
def test_occupancy(arch: str, registers: int, shared: int, warps: int, expected: int) -> None:
    usage = replace(USAGE, arch=arch, registers=registers, shared=shared, warps=warps)
    assert usage.occupancy == expected
    assert table([usage]).splitlines()[1].split()[:7] == [
        "norm", arch, str(registers), "0", str(shared), str(warps), str(expected),
    ]  # fmt: skip
