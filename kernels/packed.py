"""Weights in the layout of the C++ operators (csrc/cpu/gemm.h), and what is done with them.

A weight [N, K] is cut into panels of 32 outputs, [panels, steps, 32, pair]: a step holds two consecutive inputs of each
output for bfloat16 (pair 2) and one for float32 (pair 1). N and K are filled up with zeros. The gate and the up
projection of a feed-forward layer share panels, 16 outputs of each, so that their product leaves as silu(gate) * up.
Weights may be rounded to int8 instead (packed_int8.py); the rows that they multiply are float32 or bfloat16 still.

Each output of a product is one chain of float32 additions in the order of K: its bits depend on its own row only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from s1engine.kernels.activation import silu_mul_reference
from s1engine.kernels.linear import linear_reference
from s1engine.kernels.packed_int8 import (
    int8_embedding,
    int8_linear,
    pack_int8_rows,
    packed_int8_shape,
    unpack_int8_rows,
)
from s1engine.kernels.registry import register

PANEL = 32
HALF = PANEL // 2


def packed_shape(outputs: int, inputs: int, dtype: torch.dtype, gated: bool = False) -> tuple[int, ...]:
    """Shape of the packed form of a weight [outputs, inputs], in float32, bfloat16 or int8; gated: half are gates."""
    if dtype == torch.int8:
        return packed_int8_shape(outputs, inputs, gated)
    pair = 2 if dtype == torch.bfloat16 else 1
    panels = -(-(outputs // 2) // HALF) if gated else -(-outputs // PANEL)
    return panels, -(-inputs // pair), PANEL, pair


@dataclass(slots=True, eq=False)
class PackedWeight:
    """A weight [outputs, inputs] in packed form; gated: rows of gates, then as many of the up projection.

    storage  packed_shape(...), zeros where nothing was written
    """

    storage: Tensor
    outputs: int
    inputs: int
    gated: bool = False

    def rows(self, start: int, count: int) -> PackedRows:
        """A run of its rows. Of a gated weight: of the gates or of the up projection only, as a whole."""
        if not self.gated:
            return PackedRows(self.storage, start, -1, torch.Size((count, self.inputs)))
        half, first = divmod(start, self.outputs // 2)
        return PackedRows(self.storage, first, half, torch.Size((count, self.inputs)))


@dataclass(slots=True, eq=False)
class PackedRows:
    """Rows of a packed weight, to be filled and read as those of a tensor of this shape could be."""

    storage: Tensor
    first: int
    half: int
    shape: torch.Size

    def copy_(self, rows: Tensor) -> None:
        """Write float32, bfloat16 or float16 rows [count, inputs], rounded to what the weight holds."""
        if rows.shape != self.shape:
            raise ValueError(f"rows: have shape {list(rows.shape)}, expected {list(self.shape)}")
        pack_rows_(self.storage, rows.contiguous(), self.first, self.half)

    def read(self) -> Tensor:
        """The rows, [count, inputs], in the weight's dtype; those of int8 in float32."""
        dtype = torch.float32 if self.storage.dtype == torch.int8 else self.storage.dtype
        out = torch.empty(self.shape, dtype=dtype)
        unpack_rows_(out, self.storage, self.first, self.half)
        return out


def _by_output(weight: Tensor, half: int) -> Tensor:
    """View of a packed weight as outputs x inputs, both with their zeros: [panels, outputs of a panel, steps, pair]."""
    columns = weight if half < 0 else weight[:, :, half * HALF : (half + 1) * HALF]
    return columns.permute(0, 2, 1, 3)


def _pack_rows(weight: Tensor, rows: Tensor, first: int, half: int) -> None:
    if weight.dtype == torch.int8:
        pack_int8_rows(weight, rows, first, half)
        return
    view = _by_output(weight, half)
    width = view.size(1)
    padded = functional.pad(rows.to(weight.dtype), (0, view.size(2) * view.size(3) - rows.size(1)))
    index = torch.arange(first, first + rows.size(0))
    view[index // width, index % width] = padded.view(-1, *view.shape[2:])


def _unpack_rows(rows: Tensor, weight: Tensor, first: int, half: int) -> None:
    if weight.dtype == torch.int8:
        unpack_int8_rows(rows, weight, first, half)
        return
    view = _by_output(weight, half)
    index = torch.arange(first, first + rows.size(0))
    found = view[index // view.size(1), index % view.size(1)].flatten(1)
    rows.copy_(found[:, : rows.size(1)])


def _read(weight: Tensor, first: int, count: int, half: int, inputs: int) -> Tensor:
    rows = torch.empty(count, inputs, dtype=weight.dtype)
    _unpack_rows(rows, weight, first, half)
    return rows


def _packed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, outputs: int, gated: bool, float_out: bool
) -> Tensor:
    inputs = x.size(1)
    if weight.dtype == torch.int8:
        out = int8_linear(x, weight, bias, outputs, gated)
    elif gated:
        halves = [_read(weight, 0, outputs // 2, half, inputs) for half in (0, 1)]
        wide = None if bias is None else bias.float()
        out = silu_mul_reference(linear_reference(x.float(), torch.cat(halves), wide))
    else:
        out = linear_reference(x.float(), _read(weight, 0, outputs, -1, inputs), bias)
    return out if float_out else out.to(x.dtype)


def _fake_packed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, outputs: int, gated: bool, float_out: bool
) -> Tensor:
    dtype = torch.float32 if float_out else x.dtype
    return x.new_empty(x.size(0), outputs // 2 if gated else outputs, dtype=dtype)


def _packed_embedding(ids: Tensor, weight: Tensor, inputs: int) -> Tensor:
    if weight.dtype == torch.int8:
        return int8_embedding(ids, weight, inputs)
    view = _by_output(weight, -1)
    return view[ids // PANEL, ids % PANEL].flatten(1)[:, :inputs].float()


def _fake_packed_embedding(ids: Tensor, weight: Tensor, inputs: int) -> Tensor:
    return weight.new_empty(ids.size(0), inputs, dtype=torch.float32)


# x [T, K] times a packed weight of `outputs` rows, plus bias [outputs]: [T, outputs]; gated: silu of the first half
# times the second, [T, outputs / 2]. float_out: the sums are returned as they are, in float32.
packed_linear = register(
    "packed_linear(Tensor x, Tensor weight, Tensor? bias, int outputs, bool gated, bool float_out) -> Tensor",
    _packed_linear,
    _fake_packed_linear,
)

# Rows `ids` int64 [T] of a packed weight that is not gated, float32 [T, inputs].
packed_embedding = register(
    "packed_embedding(Tensor ids, Tensor weight, int inputs) -> Tensor", _packed_embedding, _fake_packed_embedding
)

# Write rows [n, inputs] of float32, bfloat16 or float16 into a packed weight from row `first` on; half 0 or 1: of the
# gates or of the up projection of a gated one, else -1.
pack_rows_ = register(
    "pack_rows_(Tensor(a!) weight, Tensor rows, int first, int half) -> ()", _pack_rows, lambda *_: None
)

# The inverse: fill rows [n, inputs], of the weight's dtype.
unpack_rows_ = register(
    "unpack_rows_(Tensor(a!) rows, Tensor weight, int first, int half) -> ()", _unpack_rows, lambda *_: None
)
