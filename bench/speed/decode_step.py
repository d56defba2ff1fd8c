"""A decode step as its kernels see it, with random inputs of a model's shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from s1engine.kernels.registry import INTERPRETED
from s1engine.kernels.slot_layout import FIELD_WIDTH, Field
from s1engine.kernels.triton_build import ModelShape
from s1engine.thinking import ThinkingBudget, ThinkingFormat, Trigger
from s1engine.thinking.program import compile_program, initial_state

BLOCK_SIZE = 16
EPS = 1e-6

Launch = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel.

    num_bytes   to be read or written, each once
    operations  of matrix products, where an addition and a multiplication are two
    make        draws a set of inputs; what it returns runs the kernel on it, and returns what that wrote
    """

    kernel: str
    num_bytes: int
    operations: int
    make: Callable[[], Launch]


@dataclass(frozen=True, kw_only=True)
class Step:
    """A decode step: `batch` rows, each of `context` tokens with the new one. A set is launched `launches` times."""

    shape: ModelShape
    batch: int
    context: int
    launches: int
    dtype: torch.dtype
    device: torch.device

    @property
    def triton(self) -> bool:
        return self.device.type == "cuda" or INTERPRETED

    @property
    def blocks(self) -> int:
        """KV blocks of a row."""
        return -(-self.context // BLOCK_SIZE)

    def module(self, name: str) -> Any:
        """The module of the operator `name` with the implementation that is measured."""
        return import_module(f"s1engine.kernels.{name}_triton" if self.triton else f"s1engine.kernels.{name}")

    def normal(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(size, dtype=dtype or self.dtype, device=self.device).normal_()

    def full(self, *size: int, value: int = 0) -> Tensor:
        return torch.full(size, value, dtype=torch.int32, device=self.device)

    def slots(self) -> Tensor:
        return torch.arange(self.batch, dtype=torch.int32, device=self.device)

    def caches(self) -> tuple[Tensor, Tensor]:
        """A layer's key and value cache."""
        shape = self.shape
        both = self.normal(2, self.batch * self.blocks, BLOCK_SIZE, shape.kv_heads, shape.head_dim)
        return both[0], both[1]

    def block_tables(self) -> Tensor:
        """int32 [batch, blocks], in no order."""
        return torch.randperm(self.batch * self.blocks, device=self.device).view(self.batch, -1).int()

    def fields(self, temperature: float = 0.0, top_p: float = 1.0, budget: bool = False) -> Tensor:
        """The slots' rows of requests without an end, that want nothing else."""
        fields = self.full(self.batch, FIELD_WIDTH)
        fields[:, Field.LENGTH] = self.context
        fields[:, Field.LIMIT] = self.context + self.launches + 1
        fields[:, Field.ACTIVE] = 1
        fields[:, Field.HAS_MACHINE] = int(budget)
        fields[:, Field.USER_CAP] = -1
        fields[:, Field.SEED_LOW] = self.slots()
        floats = fields.view(torch.float32)
        floats[:, Field.TEMPERATURE] = temperature
        floats[:, Field.TOP_P] = top_p
        floats[:, Field.REPETITION] = 1.0
        return fields

    def machines(self) -> tuple[Tensor, Tensor]:
        """The slots' programs and states of requests that think, under a budget that they do not use up."""
        format = ThinkingFormat(start=(1,), triggers=(Trigger((2,), (2,)),), forced_close=(2,), eos_ids=(3,))
        program = compile_program(format)
        state = initial_state(program, format, ThinkingBudget(max_tokens=2**30), [1])
        rows = [torch.tensor(row, device=self.device).repeat(self.batch, 1) for row in (program, state)]
        return rows[0], rows[1]
