"""The header as device code: nvcc compiles it for each supported GPU, with no warning and no spilled register."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

INCLUDE = Path(__file__).parents[2] / "csrc" / "include"

KERNELS = r"""
#include "s1engine/thinking.h"

namespace thinking = s1engine::thinking;

// One thread starts each row, whose prompt lies at prompts[starts[row]] to prompts[starts[row + 1]].
extern "C" __global__ void init_rows(const int32_t* programs, int32_t* states, const int32_t* prompts,
                                     const int32_t* starts, const thinking::Limits* limits, int32_t count) {
    const int32_t row = static_cast<int32_t>(blockIdx.x * blockDim.x + threadIdx.x);
    if (row >= count) return;
    thinking::init_state(programs + static_cast<int64_t>(row) * thinking::kProgramWidth, prompts + starts[row],
                         starts[row + 1] - starts[row], limits[row],
                         states + static_cast<int64_t>(row) * thinking::kStateWidth);
}

// One thread steps each row.
extern "C" __global__ void step_rows(const int32_t* programs, int32_t* states, const int32_t* rows,
                                     const int32_t* sampled, thinking::Result* out, int32_t count) {
    const int32_t i = static_cast<int32_t>(blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= count) return;
    const int64_t row = rows[i];
    out[i] = thinking::step(programs + row * thinking::kProgramWidth, states + row * thinking::kStateWidth, sampled[i]);
}
"""


@pytest.mark.parametrize("architecture", [80, 90])
def test_nvcc_compiles_it(architecture: int, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc here")
    source, cubin = tmp_path / "kernels.cu", tmp_path / "kernels.cubin"
    source.write_text(KERNELS)
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    warnings = ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror", "-Xptxas", "-v,-warn-spills,-Werror"]
    command = [
        nvcc,
        "-std=c++17",
        "-cubin",
        "-gencode",
        target,
        *warnings,
        f"-I{INCLUDE}",
        str(source),
        "-o",
        str(cubin),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    report = done.stdout + done.stderr
    assert done.returncode == 0, report

    compiled = re.findall(rf"entry function '(\w+)' for 'sm_{architecture}'", report)
    assert sorted(compiled) == ["init_rows", "step_rows"], report
    assert re.findall(r"\d+ bytes spill stores, \d+ bytes spill loads", report) == [
        "0 bytes spill stores, 0 bytes spill loads"
    ] * len(compiled), report
    assert b".text.step_rows\0" in cubin.read_bytes()
