"""The header as a C++ user has it: compiled alone, run over the conformance cases; the C ABI's header in plain C."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from s1engine.thinking import resolve_extensions
from s1engine.thinking.layout import PROGRAM_WIDTH, STATE_WIDTH, State
from s1engine.thinking.native_step import NativeLibraryError, load
from s1engine.thinking.program import compile_program, initial_state

INCLUDE = Path(__file__).parents[2] / "csrc" / "include"

MAIN = r"""
#include <cstdio>
#include <vector>
#include "s1engine/thinking.h"

// Reads cases of integers from standard input, prints a line "output | forced" for each.
static int32_t number() { int value = 0; if (std::scanf("%d", &value) != 1) value = 0; return value; }
static std::vector<int32_t> numbers(int32_t size) {
    std::vector<int32_t> list(size);
    for (int32_t& value : list) value = number();
    return list;
}

int main() {
    namespace thinking = s1engine::thinking;
    for (int32_t cases = number(); cases > 0; --cases) {
        const auto program = numbers(thinking::kProgramWidth);
        const auto limits = numbers(4);
        const auto prompt = numbers(number());
        const auto sampled = numbers(number());
        int32_t state[thinking::kStateWidth];
        thinking::init_state(program.data(), prompt.data(), static_cast<int64_t>(prompt.size()),
                             {limits[0], limits[1], limits[2], limits[3]}, state);
        std::vector<int32_t> output, forced;
        for (const int32_t token : sampled) {
            const thinking::Result result = thinking::step(program.data(), state, token);
            output.resize(output.size() - result.rewind);
            forced.resize(output.size());
            if (result.token < 0) break;
            output.push_back(result.token);
            forced.push_back(result.flags & thinking::kForced);
        }
        for (const int32_t token : output) std::printf("%d ", token);
        std::printf("|");
        for (const int32_t bit : forced) std::printf(" %d", bit);
        std::printf("\n");
    }
}
"""


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"no {name} here")
    return path


def row_of(case: Any) -> Any:
    return compile_program(case.format, resolve_extensions(case.budget), case.budget.scope, case.budget.on_budget)


def test_header_alone(conformance: list[Any], tmp_path: Path) -> None:
    source, binary = tmp_path / "main.cpp", tmp_path / "main"
    source.write_text(MAIN)
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Wconversion", "-Werror", f"-I{INCLUDE}"]
    subprocess.run([tool("g++"), *flags, str(source), "-o", str(binary)], check=True, timeout=120)
    lines = [str(len(conformance))]
    for _, case, _ in conformance:
        budget = case.budget
        limits = [-1 if budget.max_tokens is None else budget.max_tokens]
        limits += [budget.min_tokens, budget.ignore_end, budget.grace_tokens]
        ids = [*row_of(case), *limits, len(case.prompt), *case.prompt, len(case.sampled), *case.sampled]
        lines.append(" ".join(map(str, ids)))
    done = subprocess.run([binary], input="\n".join(lines), capture_output=True, text=True, check=True, timeout=60)
    for (name, _, expect), line in zip(conformance, done.stdout.splitlines(), strict=True):
        output, forced = ([int(token) for token in part.split()] for part in line.split("|"))
        assert (output, forced) == (expect["output"], expect["forced"]), name


def test_c_abi_header_is_plain_c(tmp_path: Path) -> None:
    source = tmp_path / "main.c"
    source.write_text('#include "s1engine/thinking_c.h"\nint main(void) { return s1_thinking_program_width() == 0; }\n')
    flags = ["-std=c99", "-pedantic", "-Wall", "-Werror", "-fsyntax-only", f"-I{INCLUDE}"]
    subprocess.run([tool("gcc"), *flags, str(source)], check=True, timeout=60)


def test_header_is_device_code(tmp_path: Path) -> None:
    source = tmp_path / "kernel.cu"
    source.write_text(
        '#include "s1engine/thinking.h"\n'
        "__global__ void step(const int32_t* programs, int32_t* states, const int32_t* sampled,\n"
        "                     s1engine::thinking::Result* out) {\n"
        "    const int row = threadIdx.x;\n"
        "    out[row] = s1engine::thinking::step(programs + row * s1engine::thinking::kProgramWidth,\n"
        "                                        states + row * s1engine::thinking::kStateWidth, sampled[row]);\n"
        "}\n"
    )
    command = [tool("nvcc"), "-std=c++17", "-ptx", f"-I{INCLUDE}", str(source), "-o", str(tmp_path / "kernel.ptx")]
    subprocess.run(command, check=True, timeout=120)
    assert ".entry" in (tmp_path / "kernel.ptx").read_text()


def test_native_initial_state(random_cases: Callable[..., Sequence[Any]]) -> None:
    try:
        library = load()
    except NativeLibraryError as error:
        pytest.skip(str(error))
    opened = 0
    for case in random_cases(seed=7, count=500):
        program = row_of(case)
        expected = initial_state(program, case.format, case.budget, case.prompt)
        limits = [-1 if case.budget.max_tokens is None else case.budget.max_tokens]
        limits += [case.budget.min_tokens, case.budget.ignore_end, case.budget.grace_tokens]
        prompt = np.array(case.prompt, dtype=np.int32)
        state = np.full(STATE_WIDTH, 99, dtype=np.int32)
        pointer = ctypes.c_void_p
        library.s1_thinking_init(
            pointer(program.ctypes.data), pointer(prompt.ctypes.data), len(prompt), *limits, pointer(state.ctypes.data)
        )
        assert state.tolist() == expected.tolist()
        opened += int(state[State.PHASE])
    assert 50 < opened < 450
    assert program.shape == (PROGRAM_WIDTH,)
