"""The gate of a SwiGLU feed-forward layer in Triton: silu(gate) * up, a block of one row's columns a program."""

import triton
import triton.language as tl
from torch import Tensor

from s1engine.kernels.triton_build import Build, ModelShape

_BLOCK = 1024  # eight elements a thread: one 16-byte load of each operand in bfloat16
_WARPS = 4


@triton.jit
def _silu_mul_kernel(gate_up, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < SIZE
    start = gate_up + row * (2 * SIZE) + columns
    gate = tl.load(start, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(start + SIZE, mask=inside, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * SIZE + columns, result.to(out.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor, row_invariant: bool) -> Tensor:
    """gate_up [T, 2 * I]; returns silu_mul_reference(gate_up), [T, I], with one rounding.

    row_invariant makes no difference: every element is computed alike wherever it lies.
    """
    gate_up = gate_up.contiguous()
    rows, size = gate_up.size(0), gate_up.size(1) // 2
    out = gate_up.new_empty(rows, size)
    grid = (rows, triton.cdiv(size, _BLOCK))
    _silu_mul_kernel[grid](gate_up, out, SIZE=size, BLOCK=_BLOCK, num_warps=_WARPS, num_stages=1, enable_fp_fusion=True)
    return out


def builds(shape: ModelShape) -> list[Build]:
    model = f"*{shape.dtype}"
    return [
        Build(
            name="silu_mul",
            kernel=_silu_mul_kernel,
            signature={"gate_up": model, "out": model},
            constexprs={"SIZE": shape.intermediate, "BLOCK": _BLOCK},
            aligned=frozenset({"gate_up", "out"}),
            num_warps=_WARPS,
            num_stages=1,
            options={"enable_fp_fusion": True},
        )
    ]
