"""What lies between the fused projection and attention, in one Triton kernel: head norms, rotation, the cache's rows.

Rotary position embedding (Su et al., 2021, section 3.4) in the rotate-half layout. A program takes one row and some of
its heads, as two tiles: the halves of the heads, whose elements at equal places form the pairs. Heads lie side by side
as query, key and value heads, and a program may hold all three kinds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from s1engine.kernels.triton_build import Build, ModelShape

_TILE = 1024  # pairs of a program; with eight elements of each half a thread, accesses of bfloat16 are of 16 bytes


@triton.jit
def _rope_store_kv_kernel(
    qkv,
    rotary,
    positions,
    q_norm,
    k_norm,
    eps,
    q,
    k_cache,
    v_cache,
    slot_mapping,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    heads = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS))[:, None]
    columns = tl.arange(0, BLOCK_HALF)
    pairs = columns[None, :]
    inside = pairs < HALF
    is_q = heads < HEADS
    is_k = (heads >= HEADS) & (heads < HEADS + KV_HEADS)
    is_v = (heads >= HEADS + KV_HEADS) & (heads < HEADS + 2 * KV_HEADS)

    position = tl.load(positions + row)
    slot = tl.load(slot_mapping + row)
    source = qkv + row * ((HEADS + 2 * KV_HEADS) * 2 * HALF) + heads * (2 * HALF) + pairs
    given = (heads < HEADS + 2 * KV_HEADS) & inside
    first = tl.load(source, mask=given, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=given, other=0.0).to(tl.float32)
    angle = rotary + position * (2 * HALF) + columns
    cos = tl.load(angle, mask=columns < HALF, other=0.0)[None, :]
    sin = tl.load(angle + HALF, mask=columns < HALF, other=0.0)[None, :]

    x, y = first, second
    if q_norm is not None:
        scale = tl.rsqrt(tl.sum(x * x + y * y, axis=1) * (1.0 / (2 * HALF)) + eps)[:, None]
        q_x = tl.load(q_norm + columns, mask=columns < HALF, other=0.0).to(tl.float32)[None, :]
        q_y = tl.load(q_norm + HALF + columns, mask=columns < HALF, other=0.0).to(tl.float32)[None, :]
        k_x = tl.load(k_norm + columns, mask=columns < HALF, other=0.0).to(tl.float32)[None, :]
        k_y = tl.load(k_norm + HALF + columns, mask=columns < HALF, other=0.0).to(tl.float32)[None, :]
        x = x * scale * tl.where(is_q, q_x, k_x)
        y = y * scale * tl.where(is_q, q_y, k_y)
    turned_x = (x * cos - y * sin).to(q.dtype.element_ty)
    turned_y = (y * cos + x * sin).to(q.dtype.element_ty)

    target = q + row * (HEADS * 2 * HALF) + heads * (2 * HALF) + pairs
    tl.store(target, turned_x, mask=is_q & inside)
    tl.store(target + HALF, turned_y, mask=is_q & inside)
    if slot >= 0:
        cached = slot * (KV_HEADS * 2 * HALF) + pairs
        target = k_cache + cached + (heads - HEADS) * (2 * HALF)
        tl.store(target, turned_x, mask=is_k & inside)
        tl.store(target + HALF, turned_y, mask=is_k & inside)
        target = v_cache + cached + (heads - HEADS - KV_HEADS) * (2 * HALF)
        tl.store(target, first.to(q.dtype.element_ty), mask=is_v & inside)
        tl.store(target + HALF, second.to(q.dtype.element_ty), mask=is_v & inside)


def _blocks(heads: int, head_dim: int) -> tuple[int, int, int]:
    """(block of heads, block of half a head, warps)"""
    block_half = triton.next_power_of_2(head_dim // 2)
    block_heads = min(max(_TILE // block_half, 1), triton.next_power_of_2(heads))
    return block_heads, block_half, max(block_heads * block_half // 256, 1)


def rope_store_kv(
    qkv: Tensor,
    rotary: Tensor,
    positions: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    """Norm and rotate query and key heads; write keys and values into the cache.

    qkv               [T, H + 2 * KV, D], the fused projection's output, in the dtype of the caches; D even
    rotary            [P, 2, D / 2] float32: cosines and sines of every position
    positions         int64 [T], each less than P
    q_norm, k_norm    [D]: each head is RMS-normalised with it first (Qwen3); both or neither
    k_cache, v_cache  [num_blocks, block_size, KV, D], contiguous, updated in place
    slot_mapping      int64 [T]: the row's place in the cache, counted over all blocks; -1 writes nothing. Distinct else
    Returns the query heads, [T, H, D]. The arithmetic is float32 with one rounding.
    Raises ValueError if a cache is not contiguous.
    """
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("rope_store_kv takes a layer's caches as contiguous tensors")
    rows, all_heads, head_dim = qkv.shape
    kv_heads = k_cache.size(2)
    heads = all_heads - 2 * kv_heads
    block_heads, block_half, warps = _blocks(all_heads, head_dim)
    q = torch.empty(rows, heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    grid = (rows, triton.cdiv(all_heads, block_heads))
    _rope_store_kv_kernel[grid](
        qkv.contiguous(),
        rotary,
        positions,
        q_norm,
        k_norm,
        eps,
        q,
        k_cache,
        v_cache,
        slot_mapping,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=head_dim // 2,
        BLOCK_HEADS=block_heads,
        BLOCK_HALF=block_half,
        num_warps=warps,
        num_stages=1,
        enable_fp_fusion=True,
    )
    return q


def builds(shape: ModelShape) -> list[Build]:
    block_heads, block_half, warps = _blocks(shape.heads + 2 * shape.kv_heads, shape.head_dim)
    model = f"*{shape.dtype}"
    norms = {"q_norm": model, "k_norm": model} if shape.qk_norm else {}
    signature = {
        "qkv": model,
        "rotary": "*fp32",
        "positions": "*i64",
        **norms,
        "eps": "fp32",
        "q": model,
        "k_cache": model,
        "v_cache": model,
        "slot_mapping": "*i64",
    }
    return [
        Build(
            name="rope_store_kv",
            kernel=_rope_store_kv_kernel,
            signature=signature,
            constexprs={
                **({} if norms else {"q_norm": None, "k_norm": None}),
                "HEADS": shape.heads,
                "KV_HEADS": shape.kv_heads,
                "HALF": shape.head_dim // 2,
                "BLOCK_HEADS": block_heads,
                "BLOCK_HALF": block_half,
            },
            aligned=frozenset(signature.keys() - {"eps"}),
            num_warps=warps,
            num_stages=1,
            options={"enable_fp_fusion": True},
        )
    ]
