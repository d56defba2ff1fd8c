"""What some tests need and a user's machine may lack: they are reported as skipped there, never as passed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from s1engine.kernels import native

# There is nothing to test where no compiler built the library, or where the run leaves it out to test what serves then.
needs_csrc = pytest.mark.skipif(not native.AVAILABLE, reason=f"the C++ operators are {native.PROBLEM}")


def data_folder() -> Path:
    """Real evaluation sets, tokenizers and traces, too large for the repository; the test is skipped without them."""
    folder = os.environ.get("S1ENGINE_TEST_DATA")
    if not folder:
        pytest.skip("not run: S1ENGINE_TEST_DATA names no data folder")
    return Path(folder) / "data"
