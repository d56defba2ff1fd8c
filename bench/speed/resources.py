"""What every Triton kernel takes of a GPU at the shapes of real models, found by compiling it: no GPU is needed.

A kernel that spills registers, or takes so many that too few of its programs fit on a multiprocessor, is slow without
being wrong, so no other test sees it. bench/resources.json holds the bounds that a test compares with.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path

from tqdm import tqdm

from s1engine.bench.speed.shapes import SHAPES, model_shape
from s1engine.kernels.triton_build import Build, ModelShape

BOUNDS_FILE = Path(__file__).parents[1] / "resources.json"
EXAMPLE = "example: python -m s1engine.bench.speed.resources --arch sm_90"

# Bytes of shared memory of one multiprocessor, and of those that the system takes per CTA what the disassembler counts
# as the kernel's. The other limits are the same for both.
ARCHITECTURES = {"sm_80": (164 << 10, 0), "sm_90": (228 << 10, 1 << 10)}
WARPS_PER_SM, CTAS_PER_SM = 64, 32
REGISTERS_PER_QUARTER, REGISTER_GRANULE = 16384, 256  # a quarter of an SM schedules its own warps
RESERVED_SHARED = 1 << 10

# Registers a thread that another version of Triton may take more: less than what costs a CTA of four warps.
REGISTER_SLACK = 16
MAX_REGISTERS = 255

Bounds = dict[str, dict[str, dict[str, int]]]


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What one build takes on one architecture.

    shapes     names of the models that it is built for
    registers  per thread
    stack      bytes per thread in local memory, where spilled registers go
    shared     bytes per CTA, static and dynamic
    """

    kernel: str
    arch: str
    shapes: tuple[str, ...]
    decode: bool
    registers: int
    stack: int
    shared: int
    warps: int

    @property
    def occupancy(self) -> int:
        """CTAs that fit on one multiprocessor together."""
        registers_of_warp = -(-self.registers * 32 // REGISTER_GRANULE) * REGISTER_GRANULE
        by_registers = 4 * (REGISTERS_PER_QUARTER // registers_of_warp) // self.warps
        by_shared = ARCHITECTURES[self.arch][0] // (self.shared + RESERVED_SHARED)
        return min(by_registers, by_shared, WARPS_PER_SM // self.warps, CTAS_PER_SM)


def triton_modules() -> list[str]:
    """Import names of all modules that launch Triton kernels; others hold functions for them."""
    package = import_module("s1engine.kernels")
    found = sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.name.endswith("_triton"))
    names = [f"s1engine.kernels.{name}" for name in found]
    return [name for name in names if hasattr(import_module(name), "builds")]


def measure(modules: Sequence[str], shapes: Sequence[ModelShape], archs: Iterable[str], quiet: bool) -> list[Usage]:
    """Compile what `builds(shape)` of every module gives, equal builds once, and read what the machine code takes.

    Raises ValueError where Triton interprets instead of compiling, or where a build does not fit its kernel;
    RuntimeError for a kernel that does not compile.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET=1: nothing is compiled under it; unset it")
    tasks: dict[tuple[object, ...], tuple[str, ModelShape, int]] = {}
    users: dict[tuple[object, ...], list[str]] = {}
    for module in modules:
        for shape in shapes:
            for index, build in enumerate(import_module(module).builds(shape)):
                key = (module, build.name, *_identity(build))
                tasks.setdefault(key, (module, shape, index))
                users.setdefault(key, []).append(shape.name)

    found = []
    # Processes that start afresh: a copy of one with other threads may hang. A cache of their own: all is compiled.
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"), _start_worker, (cache,)) as pool,
    ):
        jobs = {pool.submit(_compile, *task, arch): users[key] for key, task in tasks.items() for arch in archs}
        try:
            for job in tqdm(as_completed(jobs), "compiling", len(jobs), unit="kernel", disable=quiet):
                found.append(replace(job.result(), shapes=tuple(jobs[job])))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return sorted(found, key=lambda usage: (usage.kernel, usage.arch, usage.shapes))


def _identity(build: Build) -> tuple[object, ...]:
    """Equal for builds that compile to the same code; checks that every argument of the kernel is given."""
    given = [*build.signature, *build.constexprs]
    if sorted(given) != sorted(build.kernel.arg_names) or not build.aligned <= set(build.signature):
        raise ValueError(
            f"{build.name}: the kernel takes {', '.join(build.kernel.arg_names)}; signature and constexprs name "
            f"{', '.join(given)}; aligned names {', '.join(sorted(build.aligned))}"
        )
    constants = sorted((name, str(value)) for name, value in build.constexprs.items())
    options = (build.num_warps, build.num_stages, build.decode, *sorted(build.options.items()))
    return build.kernel.__name__, *build.signature.items(), *constants, *sorted(build.aligned), *options


def _start_worker(cache: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = cache


def _compile(module: str, shape: ModelShape, index: int, arch: str) -> Usage:
    """Runs in another process, which finds the build by its place: a kernel cannot be sent."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    build = import_module(module).builds(shape)[index]
    names = build.kernel.arg_names
    source = ASTSource(
        build.kernel,
        signature={name: build.signature.get(name, "constexpr") for name in names},
        constexprs=dict(build.constexprs),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in build.aligned},
    )
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages, **build.options}
    try:
        compiled = triton.compile(source, GPUTarget("cuda", int(arch.removeprefix("sm_")), 32), options)
    except Exception as error:  # Triton's own cannot all be sent back
        raise RuntimeError(f"{build.name} at {shape.name} for {arch}: {type(error).__name__}: {error}") from None
    usage = _usage(compiled.asm["cubin"])
    return Usage(
        kernel=build.name,
        arch=arch,
        shapes=(shape.name,),
        decode=build.decode,
        registers=usage["REG"],
        stack=usage["STACK"] + usage["LOCAL"],
        shared=max(usage["SHARED"] - ARCHITECTURES[arch][1], 0) + compiled.metadata.shared,
        warps=build.num_warps,
    )


def _usage(cubin: bytes) -> dict[str, int]:
    """The figures of the one kernel in `cubin` as the disassembler that Triton brings along prints them."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def maxima(usages: Sequence[Usage]) -> Bounds:
    """{kernel: {architecture: {"registers", "stack", "shared"}}}, the most over the models."""
    found: Bounds = {}
    for usage in usages:
        most = found.setdefault(usage.kernel, {}).setdefault(usage.arch, {"registers": 0, "stack": 0, "shared": 0})
        for name in most:
            most[name] = max(most[name], getattr(usage, name))
    return found


def problems(usages: Sequence[Usage], bounds: Bounds) -> list[str]:
    """One sentence for each way in which `usages`, of whole architectures, do not keep to the bounds."""
    found = [
        f"{usage.kernel} {usage.arch}: spills {usage.stack} bytes a thread in decode steps of {', '.join(usage.shapes)}"
        for usage in usages
        if usage.decode and usage.stack > 0
    ]
    measured = maxima(usages)
    found += [f"{kernel}: bounds, but no such kernel" for kernel in bounds if kernel not in measured]
    for kernel, by_arch in measured.items():
        for arch, most in by_arch.items():
            limits = bounds.get(kernel, {}).get(arch)
            if limits is None:
                found.append(f"{kernel} {arch}: no bounds; it takes {most}")
                continue
            over = [f"{name} {most[name]} > {limits[name]}" for name in most if most[name] > limits[name]]
            if over:
                found.append(f"{kernel} {arch}: {', '.join(over)}")
    return found


def widened(usages: Sequence[Usage], bounds: Bounds) -> Bounds:
    """`bounds` without kernels that are gone, and raised, with some slack, where `usages` exceed them."""
    found: Bounds = {}
    for kernel, by_arch in maxima(usages).items():
        old = bounds.get(kernel, {})
        found[kernel] = dict(old)
        for arch, most in by_arch.items():
            limits = dict(old.get(arch) or dict.fromkeys(most, 0))
            if most["registers"] > limits["registers"]:
                limits["registers"] = min(most["registers"] + REGISTER_SLACK, MAX_REGISTERS)
            for name in ("stack", "shared"):
                limits[name] = max(limits[name], most[name])
            found[kernel][arch] = limits
    return found


def read_bounds() -> Bounds:
    return json.loads(BOUNDS_FILE.read_text()) if BOUNDS_FILE.exists() else {}


def table(usages: Sequence[Usage]) -> str:
    """Models at which a kernel takes the same share a row."""
    width = max(len(usage.kernel) for usage in usages)
    models: dict[Usage, list[str]] = {}
    for usage in usages:
        models.setdefault(replace(usage, shapes=()), []).extend(usage.shapes)
    lines = [f"{'kernel':<{width}} {'arch':<5} {'REG':>4} {'STACK':>5} {'SHARED':>6} {'warps':>5} {'CTAs/SM':>7}  for"]
    for usage, names in models.items():
        which = "all" if set(names) == set(SHAPES) else ", ".join(sorted(names))
        lines.append(
            f"{usage.kernel:<{width}} {usage.arch:<5} {usage.registers:>4} {usage.stack:>5} {usage.shared:>6} "
            f"{usage.warps:>5} {usage.occupancy:>7}  {which}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table. Returns 1 where something does not keep to the bounds."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", choices=sorted(ARCHITECTURES), action="append", help="default: all")
    parser.add_argument(
        "--write",
        action="store_true",
        help="raise the bounds to what is measured, from nothing without their file",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    args = parser.parse_args(argv)
    usages = measure(triton_modules(), [model_shape(name) for name in SHAPES], args.arch or ARCHITECTURES, quiet=False)
    print(table(usages))
    if args.write:
        BOUNDS_FILE.write_text(json.dumps(widened(usages, read_bounds()), indent=1, sort_keys=True) + "\n")
    found = problems(usages, read_bounds())
    for problem in found:
        print(problem, file=sys.stderr)
    if args.json:
        print(json.dumps({"usages": [asdict(usage) for usage in usages], "problems": found}))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
