"""The compiled state machine in C++: `csrc/include/s1engine/thinking.h` behind its C ABI, called through ctypes.

The shared library lies beside the package as `s1engine._native`. It is optional: without it `table_step.py` steps.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from importlib.util import find_spec

import numpy as np
import numpy.typing as npt

from s1engine.thinking.layout import LAYOUT_VERSION, OUT_WIDTH, PROGRAM_WIDTH, STATE_WIDTH

Array = npt.NDArray[np.int32]


class NativeLibraryError(RuntimeError):
    """The native library is missing, or was built for another layout of the rows."""


@lru_cache(maxsize=1)
def load() -> ctypes.CDLL:
    """The library, checked and with its signatures declared.

    Raises:
        NativeLibraryError: saying what to do about it.
    """
    spec = find_spec("s1engine._native")
    if spec is None or spec.origin is None:
        raise NativeLibraryError(
            "s1engine._native was not built; with a C++17 compiler, build it by `pip install .` or, in a checkout, "
            "`python setup.py build_ext --inplace`"
        )
    library = ctypes.CDLL(spec.origin)
    for name, expected in (
        ("s1_thinking_layout_version", LAYOUT_VERSION),
        ("s1_thinking_program_width", PROGRAM_WIDTH),
        ("s1_thinking_state_width", STATE_WIDTH),
    ):
        function = getattr(library, name, None)
        found = None if function is None else function()
        if found != expected:
            raise NativeLibraryError(
                f"{spec.origin} was built for another version of s1engine ({name} is {found}, not {expected}); "
                "build it again"
            )
    pointer = ctypes.c_void_p
    library.s1_thinking_step.argtypes = [pointer, pointer, pointer, pointer, ctypes.c_int32, pointer]
    library.s1_thinking_step.restype = None
    library.s1_thinking_init.argtypes = [pointer, pointer, ctypes.c_int64, *[ctypes.c_int32] * 4, pointer]
    library.s1_thinking_init.restype = None
    return library


def native_step(programs: Array, states: Array, rows: Array, sampled: Array) -> Array:
    """One sampled token for each of the slots `rows`; shapes as in `stepper.step`."""
    out = np.empty((len(rows), OUT_WIDTH), dtype=np.int32)
    load().s1_thinking_step(
        programs.ctypes.data, states.ctypes.data, rows.ctypes.data, sampled.ctypes.data, len(rows), out.ctypes.data
    )
    return out
