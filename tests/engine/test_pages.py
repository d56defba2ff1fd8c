"""Pages that are given back: the tensor is zeros, and its memory is the system's again."""

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s1engine.engine.pages import clear_pages

ON_LINUX = pytest.mark.skipif(
    not sys.platform.startswith("linux"),
    reason="madvise drops pages on Linux alone; what holds elsewhere has its own test",
)


def resident_bytes() -> int:
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Anonymous:"))


@ON_LINUX
@given(start=st.integers(0, 9000), length=st.integers(9000, 40_000))
def test_nothing_but_the_tensor_is_cleared(start: int, length: int) -> None:
    """Wherever it begins and ends: its pages are shared with what lies beside it."""
    whole = torch.arange(60_000, dtype=torch.int32)
    part = whole[start : start + length]
    assert clear_pages(part)
    want = torch.arange(60_000, dtype=torch.int32)
    want[start : start + length] = 0
    assert torch.equal(whole, want)


@ON_LINUX
def test_memory_goes_and_comes_with_what_is_written() -> None:
    pool = torch.empty(256 << 20, dtype=torch.uint8)
    assert clear_pages(pool)
    empty = resident_bytes()
    pool[: 64 << 20] = 1
    filled = resident_bytes()
    assert 60 << 20 < filled - empty < 70 << 20
    assert clear_pages(pool) and resident_bytes() - empty < 8 << 20
    assert not bool(pool[: 64 << 20].any())


def test_a_tensor_without_a_whole_page_is_left_as_it_is() -> None:
    small = torch.ones(8)
    assert not clear_pages(small) and bool(small.all())


def test_on_other_systems_a_tensor_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    pool = torch.ones(1 << 20)
    assert not clear_pages(pool) and bool(pool.all())
