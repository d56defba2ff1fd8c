"""Matrix product with a weight stored as [out, in], and its row-invariant form.

A library chooses its kernel by the number of rows, so the bits of a row depend on how many others are in the batch.
The row-invariant form multiplies tiles of a fixed number of rows instead, zeros filling the last one: every product
then has the same shape. That a row's bits do not depend on its place within a tile either is a property of the
library, so `rows_are_independent` probes it.

On Hopper GPUs tiles are not needed: what differs between cuBLASLt's kernels there is whether the inner dimension is
split among them, and `fix_cuda_products` rules that out. `any_rows_are_independent` probes whether it did.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from s1engine.kernels.registry import register, widen

TILE_ROWS = 16

# Without a workspace cuBLAS cannot split the inner dimension. Read when its handle is made: at the first product.
_NO_WORKSPACE = {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "CUBLASLT_WORKSPACE_SIZE": "1"}


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The specification, in float32.

    x       [T, K]
    weight  [N, K]
    bias    [N] or None
    Returns x @ weight^T + bias, [T, N], in the dtype of `x`.
    """
    out = widen(x) @ widen(weight).T
    if bias is not None:
        out = out + widen(bias)
    return out.to(x.dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, row_invariant: bool) -> Tensor:
    if not row_invariant:
        return functional.linear(x, weight, bias)
    rows, columns = x.size(0), weight.size(0)
    padded = -(-rows // TILE_ROWS) * TILE_ROWS
    if padded != rows:
        x = torch.cat((x, x.new_zeros(padded - rows, x.size(1))))
    x = x.contiguous()
    out = x.new_empty(padded, columns)
    for tile, target in zip(x.split(TILE_ROWS), out.split(TILE_ROWS), strict=True):
        target.copy_(functional.linear(tile, weight, bias))
    return out[:rows]


# Bounds the products of a probe.
_PROBED_ELEMENTS = 1 << 27


def fix_cuda_products() -> None:
    """Settings of this process under which a GPU's matrix products do not depend on the number of rows; see above.

    Before the first product: what another part of the process multiplied already keeps its kernels.
    """
    os.environ.update(_NO_WORKSPACE)
    torch.backends.cuda.preferred_blas_library("cublaslt")
    # (Reduced precision, splitting the inner dimension): neither is allowed.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = (False, False)
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = (False, False)
    torch.backends.cuda.matmul.allow_tf32 = False


def any_rows_are_independent(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether products with `weight` [N, K] give a row the same bits whatever the number of rows. A probe, no proof."""
    generator = torch.Generator().manual_seed(0)
    most = min(8192, max(_PROBED_ELEMENTS // weight.size(0), 512))
    rows = torch.randn(most, weight.size(1), generator=generator).to(weight.device, weight.dtype)
    expected = functional.linear(rows, weight, bias)
    return all(
        torch.equal(functional.linear(rows[start : start + count], weight, bias), expected[start : start + count])
        for count in (1, 2, 7, 16, 33, 64, 130, 256, 512, 1000, 2048, 4096)
        for start in (0, most - count)
        if count <= most
    )


def rows_are_independent(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether, for this weight on this machine, a row of a tile gives the same bits at any place and beside any rows.

    weight [N, K]; bias [N] or None. A few tiles are multiplied that hold the same rows at other places, and one that
    holds a single row. A probe, not a proof.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(TILE_ROWS, weight.size(1), generator=generator).to(weight.device, weight.dtype)
    expected = functional.linear(rows, weight, bias)
    for shift in (1, TILE_ROWS // 2 - 1, TILE_ROWS - 1):
        rolled = functional.linear(rows.roll(shift, 0), weight, bias).roll(-shift, 0)
        if not torch.equal(rolled, expected):
            return False
    alone = torch.zeros_like(rows)
    alone[-1] = rows[0]
    return torch.equal(functional.linear(alone, weight, bias)[-1], expected[0])


def save_for_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, _ = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def backward_of_linear(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    """Plain products whatever the form of the forward one: a gradient belongs to the batch, not to a row."""
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
    return (
        grad @ weight if needs_x else None,
        grad.T @ x if needs_weight else None,
        widen(grad).sum(0).to(grad.dtype) if ctx.has_bias and needs_bias else None,
        None,
    )


def _fake_linear(x: Tensor, weight: Tensor, bias: Tensor | None, row_invariant: bool) -> Tensor:
    return x.new_empty(x.size(0), weight.size(0))


linear = register(
    "linear(Tensor x, Tensor weight, Tensor? bias, bool row_invariant) -> Tensor",
    _linear,
    _fake_linear,
    gradient=(save_for_linear, backward_of_linear),
)
