"""How the C++ library is found, left out and missed: each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

from conditions import needs_csrc

CODE = """
import torch
from s1engine.environment import environment
from s1engine.kernels.rms_norm import rms_norm
print(environment()["C++ operators"])
print(rms_norm(torch.ones(2, 8), torch.ones(8), 0.0).sum().item())
"""


def run(**variables: str) -> tuple[str, str]:
    """What `s1engine env` says of the operators, and the warnings; the operators work in any case."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("S1ENGINE_")} | variables
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=env, check=True)
    said, total = done.stdout.splitlines()
    assert total == "16.0"
    return said, done.stderr


def test_it_can_be_left_out():
    said, warnings = run(S1ENGINE_DISABLE_CSRC="1")
    assert said == "off (S1ENGINE_DISABLE_CSRC=1)" and "Warning" not in warnings


def test_a_library_that_cannot_be_loaded_is_one_warning(tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    for path in (broken, tmp_path / "absent.so"):
        said, warnings = run(S1ENGINE_OPS=str(path))
        assert said.startswith("cannot be loaded") and str(path) in said
        assert warnings.count("RuntimeWarning") == 1 and "a fraction of the speed" in warnings


@needs_csrc
def test_the_instruction_set_can_be_chosen():
    assert run(S1ENGINE_CPU_ISA="baseline") == ("baseline", "")
    said, warnings = run(S1ENGINE_CPU_ISA="mmx")
    assert said in ("avx512_bf16", "avx512", "avx2", "baseline")
    assert "S1ENGINE_CPU_ISA=mmx: this processor has no such kernels" in warnings
