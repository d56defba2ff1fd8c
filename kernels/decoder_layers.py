"""All decoder layers of a model in one call, on packed weights: for the C++ operators, whose calls from Python add up.

The implementation here says what is computed, in the operators that the C++ one calls too, and so to the same bits.
"""

from __future__ import annotations

from torch import Tensor

from s1engine.kernels.attention_cpu import paged_attention_cpu
from s1engine.kernels.packed import packed_linear
from s1engine.kernels.registry import register
from s1engine.kernels.rms_norm import add_rms_norm, rms_norm
from s1engine.kernels.rope import rope_store_kv

# Of a layer, in this order; one that the model lacks has no elements.
LAYER_WEIGHTS = (
    "input norm", "qkv", "qkv bias", "q norm", "k norm", "o", "o bias",
    "post-attention norm", "gate and up", "gate and up bias", "down", "down bias",
)  # fmt: skip


def _decoder_layers(
    residual: Tensor,
    weights: list[Tensor],
    caches: list[Tensor],
    rotary: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    heads: int,
    intermediate: int,
    eps: float,
    scale: float,
) -> Tensor:
    rows, hidden = residual.shape
    where = (block_tables, query_start, context_lens)
    x: Tensor | None = None
    for layer, (k_cache, v_cache) in enumerate(zip(caches[::2], caches[1::2], strict=True)):
        count = len(LAYER_WEIGHTS)
        given = weights[count * layer : count * (layer + 1)]
        norm, qkv, qkv_bias, q_norm, k_norm, o, o_bias, post_norm, gate_up, gate_up_bias, down, down_bias = (
            tensor if tensor.numel() else None for tensor in given
        )
        normed = rms_norm(residual, norm, eps) if x is None else add_rms_norm(residual, x, norm, eps)
        all_heads, head_dim = heads + 2 * k_cache.size(2), k_cache.size(3)
        joint = packed_linear(normed, qkv, qkv_bias, all_heads * head_dim, False, False).view(rows, -1, head_dim)
        q = rope_store_kv(joint, rotary, positions, q_norm, k_norm, eps, k_cache, v_cache, slot_mapping)
        attended = paged_attention_cpu(q, k_cache, v_cache, *where, scale).view(rows, -1)
        x = packed_linear(attended, o, o_bias, hidden, False, False)
        normed = add_rms_norm(residual, x, post_norm, eps)
        activated = packed_linear(normed, gate_up, gate_up_bias, 2 * intermediate, True, False)
        x = packed_linear(activated, down, down_bias, hidden, False, False)
    assert x is not None
    return x


def _fake_decoder_layers(residual: Tensor, weights: list[Tensor], *_: object) -> Tensor:
    return weights[0].new_empty(residual.shape)


# residual  float32 [T, hidden], updated in place
# weights   LAYER_WEIGHTS of each layer, norms and biases plain, matrices packed
# caches    k_cache and v_cache of each layer; the rest as `rope_store_kv` and `paged_attention_cpu` take it
# Returns what is still to be added to the residual, [T, hidden] in the dtype of the norms.
decoder_layers = register(
    "decoder_layers(Tensor(a!) residual, Tensor[] weights, Tensor(b!)[] caches, Tensor rotary, Tensor positions, "
    "Tensor slot_mapping, Tensor block_tables, Tensor query_start, Tensor context_lens, int heads, int intermediate, "
    "float eps, float scale) -> Tensor",
    _decoder_layers,
    _fake_decoder_layers,
)
