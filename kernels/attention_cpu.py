"""Paged attention of any mixture of decoding rows and chunks of prompts in one call, for the C++ kernel.

Nothing is planned or gathered beforehand: the kernel reads keys and values where they lie. The bits of a row depend on
its own query, keys and values only. The implementation registered here is the specification; where csrc was not built,
`attention.py` and `attention_row_invariant.py` serve instead.
"""

from __future__ import annotations

from torch import Tensor

from s1engine.kernels.attention import paged_attention_reference
from s1engine.kernels.registry import register


def _fake_paged_attention_cpu(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


# As `paged_attention_reference`, all tensors contiguous. Cache entries that no row sees may hold anything.
paged_attention_cpu = register(
    "paged_attention_cpu(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor query_start, "
    "Tensor context_lens, float scale) -> Tensor",
    paged_attention_reference,
    _fake_paged_attention_cpu,
)
