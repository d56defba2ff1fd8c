"""Writing keys and values of a step's rows into the paged cache."""

from __future__ import annotations

from torch import Tensor

from s1engine.kernels.registry import register


def _store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    k_cache.view(-1, *k_cache.shape[2:]).index_copy_(0, slot_mapping, k)
    v_cache.view(-1, *v_cache.shape[2:]).index_copy_(0, slot_mapping, v)


def _fake_store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    return None


# k, v [T, kv_heads, D]; k_cache, v_cache [num_blocks, block_size, kv_heads, D], contiguous; slot_mapping int64 [T]:
# row t goes to offset slot % block_size of block slot // block_size. Slots of one call are distinct.
store_kv = register(
    "store_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping) -> ()",
    _store_kv,
    _fake_store_kv,
)
