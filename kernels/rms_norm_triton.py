"""RMS norm in Triton, alone and after a residual sum: one program a row, the row in registers.

A row's result depends on nothing but the row: the block and the number of warps follow from its size alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from s1engine.kernels.triton_build import Build, ModelShape


@triton.jit
def _rms_norm_kernel(x, addend, weight, out, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """x, addend and out [rows, SIZE], contiguous; where `addend` is given, x becomes x + addend before the norm."""
    start = tl.program_id(0).to(tl.int64) * SIZE
    columns = tl.arange(0, BLOCK)
    inside = columns < SIZE
    wide = tl.load(x + start + columns, mask=inside, other=0.0).to(tl.float32)
    if addend is not None:
        wide += tl.load(addend + start + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(x + start + columns, wide, mask=inside)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) * (1.0 / SIZE) + eps)
    scaled = wide * scale * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + start + columns, scaled.to(out.dtype.element_ty), mask=inside)


def _block(size: int) -> tuple[int, int]:
    """(block, warps): eight elements a thread, one 16-byte access of bfloat16, until sixteen warps are reached."""
    block = triton.next_power_of_2(size)
    return block, min(max(block // 256, 1), 16)


def _launch(x: Tensor, addend: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    size = x.size(-1)
    block, warps = _block(size)
    out = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    grid = (x.numel() // size,)
    _rms_norm_kernel[grid](
        x, addend, weight, out, eps, SIZE=size, BLOCK=block, num_warps=warps, num_stages=1, enable_fp_fusion=True
    )
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., H], any floating dtype; weight [H]. Returns rms_norm_reference(x, weight, eps), in weight's dtype."""
    return _launch(x.contiguous(), None, weight, eps)


def add_rms_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual [..., H] float32, updated in place to residual + x; x [..., H]; returns the norm of the sum.

    Raises ValueError if `residual` is not contiguous.
    """
    if not residual.is_contiguous():
        raise ValueError("add_rms_norm updates its residual in place, so it must be contiguous")
    return _launch(residual, x.contiguous(), weight, eps)


def builds(shape: ModelShape) -> list[Build]:
    block, warps = _block(shape.hidden)
    residual, model = "*fp32", f"*{shape.dtype}"
    sizes = {"SIZE": shape.hidden, "BLOCK": block}
    plain = {"x": residual, "weight": model, "out": model, "eps": "fp32"}
    fused = {"x": residual, "addend": model, "weight": model, "out": model, "eps": "fp32"}
    return [
        Build(
            name=name,
            kernel=_rms_norm_kernel,
            signature=signature,
            constexprs=constexprs,
            aligned=frozenset({"x", "addend", "weight", "out"} & signature.keys()),
            num_warps=warps,
            num_stages=1,
            options={"enable_fp_fusion": True},
        )
        for name, signature, constexprs in (
            ("rms_norm", plain, {"addend": None, **sizes}),
            ("add_rms_norm", fused, sizes),
        )
    ]
