"""Keys and values go to their slots and nowhere else."""

from __future__ import annotations

import torch

from s1engine.kernels.kv_cache import store_kv


def test_rows_go_to_their_slots():
    block_size, shape = 4, (6, 4, 2, 8)
    k_cache, v_cache = torch.zeros(shape), torch.ones(shape)
    # Slices of one projection, as in a model: not contiguous.
    k, v = torch.randn(5, 4, 8).split(2, dim=1)
    slots = [21, 3, 4, 0, 14]
    store_kv(k, v, k_cache, v_cache, torch.tensor(slots))
    for block in range(6):
        for offset in range(block_size):
            slot = block * block_size + offset
            row = slots.index(slot) if slot in slots else None
            assert torch.equal(k_cache[block, offset], torch.zeros(2, 8) if row is None else k[row])
            assert torch.equal(v_cache[block, offset], torch.ones(2, 8) if row is None else v[row])


def test_operator_is_well_formed():
    k, v = torch.randn(2, 1, 4), torch.randn(2, 1, 4)
    cache = (torch.zeros(3, 2, 1, 4), torch.zeros(3, 2, 1, 4))
    torch.library.opcheck(store_kv, (k, v, *cache, torch.tensor([5, 0])), test_utils=("test_schema", "test_faketensor"))
