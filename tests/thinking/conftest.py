"""The cases of the thinking machine, their replays, and the steppers, as fixtures."""

from collections.abc import Callable
from typing import Any

import pytest
from thinking_cases import Case, by_reference, by_stepper, draw_cases, load_conformance

from s1engine.thinking.native_step import NativeLibraryError, load, native_step
from s1engine.thinking.table_step import table_step


@pytest.fixture(scope="session")
def conformance() -> list[tuple[str, Case, dict[str, Any]]]:
    """(name, case, what it must become) of each."""
    return load_conformance()


@pytest.fixture(scope="session")
def random_cases() -> Callable[..., list[Case]]:
    return draw_cases


@pytest.fixture(scope="session")
def replay_reference() -> Callable[..., dict[str, Any]]:
    return by_reference


@pytest.fixture(scope="session")
def replay_batch() -> Callable[..., list[dict[str, Any]]]:
    return by_stepper


@pytest.fixture(params=["table", "native"])
def any_step(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Each stepper in turn."""
    if request.param == "table":
        return table_step
    try:
        load()
    except NativeLibraryError as error:
        pytest.skip(str(error))
    return native_step
