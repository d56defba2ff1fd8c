"""Registration of operators under the `s1engine::` namespace.

`torch.library.Library` rather than `torch.library.custom_op`: a decode step calls some two hundred operators, and the
decorator's Python wrapper costs twice as much per call as a plain registration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_libraries: list[torch.library.Library] = []  # a Library unregisters its operators when it is collected


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define the operator `s1engine::<schema>` and return its callable overload.

    schema          as torch.library reads it, e.g. "silu_mul(Tensor gate_up) -> Tensor"
    implementation  written with PyTorch operators, so it serves every device that has no kernel of its own
    fake            gives shapes and dtypes only (meta and fake tensors)
    """
    library = torch.library.Library("s1engine", "FRAGMENT")
    library.define(schema)
    name = schema.partition("(")[0]
    library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"s1engine::{name}", fake, lib=library)
    _libraries.append(library)
    return getattr(torch.ops.s1engine, name).default
