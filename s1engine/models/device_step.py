"""What all layers of one forward pass share on a device: where rows lie, and the operators that read it there."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from s1engine.kernels.attention_flash import flash_prefill
from s1engine.kernels.rope import rope_store_kv
from s1engine.kernels.slot_attention import paged_attention_decode, paged_attention_prefill
from s1engine.models.batch import SlotBatch


@dataclass(slots=True)
class DeviceStep:
    """One batch and the model's table of angles, [positions, 2, head_dim / 2]."""

    batch: SlotBatch
    kv_cache: Tensor
    rotary: Tensor

    def attention(
        self, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float, scale: float, layer: int
    ) -> Tensor:
        """See Step."""
        batch = self.batch
        k_cache, v_cache = self.kv_cache[layer].unbind(0)
        q = rope_store_kv(qkv, self.rotary, batch.positions, q_norm, k_norm, eps, k_cache, v_cache, batch.slot_mapping)
        where = (batch.block_tables, batch.rows)
        if batch.decode is not None:
            split_start, work, workspace = batch.decode
            return paged_attention_decode(
                q, k_cache, v_cache, *where, batch.context_lens, split_start, work, workspace, scale
            )
        assert batch.prefill is not None
        query_start, tiles = batch.prefill
        if batch.flash is not None:
            tables = batch.block_tables.index_select(0, batch.rows)
            return flash_prefill(q, k_cache, v_cache, tables, query_start, *batch.flash, scale)
        return paged_attention_prefill(
            q, k_cache, v_cache, *where, query_start, batch.context_lens, tiles, scale, batch.rows_per_tile
        )
