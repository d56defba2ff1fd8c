"""How each Triton kernel is built at a model's real shape, so that all of them can be compiled without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What kernels specialise on. Sizes in elements; dtype is Triton's name of it."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    qk_norm: bool
    dtype: str = "bf16"


@dataclass(frozen=True, kw_only=True)
class Build:
    """One compilation of one kernel, as its launcher would ask for it.

    name        kernel and variant, for the table
    kernel      the @triton.jit function
    signature   {argument: "*bf16" | "*fp32" | "i32" | "fp32" | ...} of all arguments that are not constexpr, in order
    constexprs  {argument: value}
    aligned     arguments known to be divisible by 16: pointers of tensors that torch allocated, and strides
    decode      whether it is part of a decode step, whose kernels may not spill
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    aligned: frozenset[str] = frozenset()
    num_warps: int = 4
    num_stages: int = 3
    decode: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)
