"""The rows of one step, as models and operators see them: tensors, and two of them on the host as well."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class PackedBatch:
    """Rows of several sequences laid end to end. Sequences [0, num_decodes) have exactly one row each and come first.

    positions          int64 [T]: place of each row in its sequence
    slot_mapping       int64 [T]: where each row's key and value go, block * block_size + offset
    query_start        int32 [S + 1]: rows query_start[s] to query_start[s + 1] are of sequence s
    query_start_list   the same on the host
    context_lens       int32 [S]: keys visible to the last row of each sequence, its own chunk included
    context_lens_list  the same on the host
    block_tables       int32 [S, max_blocks], padded with 0
    num_decodes        sequences of one row at the front
    """

    positions: Tensor
    slot_mapping: Tensor
    query_start: Tensor
    query_start_list: list[int]
    context_lens: Tensor
    context_lens_list: list[int]
    block_tables: Tensor
    num_decodes: int
