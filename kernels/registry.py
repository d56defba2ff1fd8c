"""Registration of operators under the `s1engine::` namespace.

An operator has an implementation in PyTorch and may have a Triton one, which serves CUDA tensors, and one in C++ for
CPU tensors, which the library that native.py loads registers itself. Under
`TRITON_INTERPRET=1` the Triton one serves CPU tensors too, so that everything around it can be tested without a GPU.

`torch.library.Library` rather than `torch.library.custom_op`: a decode step calls some two hundred operators, and the
decorator's Python wrapper costs twice as much per call as a plain registration.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from s1engine.kernels.native import INTERPRETED

_libraries: list[torch.library.Library] = []  # a Library unregisters its operators when it is collected


def register(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    triton: str | None = None,
    gradient: tuple[Callable[..., None], Callable[..., Any]] | None = None,
) -> Any:
    """Define the operator `s1engine::<schema>` and return its callable overload.

    schema          as torch.library reads it, e.g. "silu_mul(Tensor gate_up) -> Tensor"
    implementation  written with PyTorch operators, so it serves every device that has no kernel of its own
    fake            gives shapes and dtypes only (meta and fake tensors)
    triton          "module:function" of the Triton implementation; imported when it is first called
    gradient        (setup_context(ctx, inputs, output), backward(ctx, *gradients)) as `torch.library.register_autograd`
                    takes them; without it the operator passes no gradient on
    """
    library = torch.library.Library("s1engine", "FRAGMENT")
    library.define(schema)
    name = schema.partition("(")[0]
    library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"s1engine::{name}", fake, lib=library)
    if triton is not None:
        for key in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
            library.impl(name, _lazy(triton), key)
    if gradient is not None:
        save, backward = gradient
        torch.library.register_autograd(f"s1engine::{name}", backward, setup_context=save, lib=library)
    _libraries.append(library)
    return getattr(torch.ops.s1engine, name).default


def widen(x: torch.Tensor) -> torch.Tensor:
    """What references compute in: float32, or float64 where a check of gradients brings it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _lazy(target: str) -> Callable[..., Any]:
    """The function "module:function", imported when it is first called: Triton is no part of a CPU's start."""
    module, _, name = target.partition(":")
    found: list[Callable[..., Any]] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        if not found:
            found.append(getattr(import_module(module), name))
        return found[0](*args, **kwargs)

    return call
