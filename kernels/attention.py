"""Causal attention of packed rows over a paged key-value cache.

A step holds single rows of decoding sequences and chunks of prompts. On the CPU decoding rows are gathered into groups
of similar length, one scaled-dot-product call a group, and each chunk is one call or a few. Which rows and blocks go
together is the same in every layer, so it is planned once a step (`plan_attention`).

Grouped heads: the G query heads that share a key-value head are laid out as G query rows of it, so keys and values are
read once and never repeated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from s1engine.kernels.registry import register

# Bytes of the keys and values that one group gathers: they are still in the last-level cache when they are used.
GROUP_BYTES = 8 << 20
# Sequences of up to this many keys share a group whatever their lengths: a further call costs more than the padding.
SHORT_KEYS = 128
# Query rows of one call where a chunk continues a cached prefix: bounds the mask.
MASKED_QUERY_ROWS = 256


def paged_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    scale: float,
) -> Tensor:
    """The specification, in float32.

    q                 [T, heads, D]
    k_cache, v_cache  [num_blocks, block_size, kv_heads, D]; the chunk's own keys and values are already in them
    block_tables      int32 [S, max_blocks]: block i of sequence s holds its keys i * block_size and on
    query_start       int32 [S + 1]: rows query_start[s] to query_start[s + 1] are of sequence s
    context_lens      int32 [S]: keys visible to the last row of each sequence
    Row i of a sequence with n rows and context c sees keys 0 to c - n + i. Head h reads key-value head
    h * kv_heads // heads. Returns [T, heads, D] in the dtype of `q`.
    """
    out = torch.empty_like(q)
    group = q.size(1) // k_cache.size(2)
    for sequence, context in enumerate(context_lens.tolist()):
        start, end = query_start[sequence : sequence + 2].tolist()
        keys = k_cache[block_tables[sequence].long()].flatten(0, 1)[:context].float().repeat_interleave(group, dim=1)
        values = v_cache[block_tables[sequence].long()].flatten(0, 1)[:context].float().repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q[start:end].float(), keys) * scale
        visible = torch.ones(end - start, context, dtype=torch.bool, device=q.device).tril(context - (end - start))
        weights = scores.masked_fill(~visible, -math.inf).softmax(dim=-1)
        out[start:end] = torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
    return out


def group_by_length(context_lens: Sequence[int], max_keys: int) -> list[list[int]]:
    """Sequences to attend together: padded keys of a group stay below about twice its real ones.

    context_lens  keys of each sequence
    max_keys      keys of a group of more than one, padding included
    Returns indices, each exactly once, the longest first; a single group is in the order of the sequences.
    """
    groups: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(context_lens)), key=lambda i: -context_lens[i]):
        similar = 2 * context_lens[index] >= longest or longest <= SHORT_KEYS
        if groups and similar and (len(groups[-1]) + 1) * longest <= max_keys:
            groups[-1].append(index)
        else:
            groups.append([index])
            longest = context_lens[index]
    return groups if len(groups) > 1 else [sorted(group) for group in groups]


def max_group_keys(cache: Tensor) -> int:
    """Keys whose copies, with their values', take GROUP_BYTES; cache is any layer's k_cache."""
    return GROUP_BYTES // (2 * cache[0, 0].numel() * cache.element_size())


def workspace_rows(plan: list[Tensor], block_size: int) -> int:
    """Keys that the largest call of a plan gathers."""
    return max(blocks.numel() for blocks in plan[1::3]) * block_size


def plan_attention(
    block_tables: Tensor,
    query_start: Sequence[int],
    context_lens: Sequence[int],
    num_decodes: int,
    cache: Tensor,
) -> list[Tensor]:
    """What one step's calls of `paged_attention` have in common.

    block_tables as in `paged_attention_reference`; query_start and context_lens are the same lists on the host;
    sequences below num_decodes have one row each and come first; cache is any layer's k_cache.

    Returns triples, flattened: (query rows int64 [n], blocks int32 [b], mask). The mask tells the kind of call:
    [n, 1, 1, keys] adds to the scores of n sequences of one row; [n, keys] to those of n rows of one sequence; an empty
    one means n rows of one sequence that see each other causally and nothing else. The only triple of a step has its
    rows in order.
    """
    block_size, dtype = cache.size(1), cache.dtype
    plan: list[Tensor] = []
    for members in group_by_length(context_lens[:num_decodes], max_group_keys(cache)):
        lengths = torch.tensor([context_lens[i] for i in members])
        blocks = -(-int(lengths.max()) // block_size)
        rows = torch.tensor(members)
        hidden = torch.arange(blocks * block_size) >= lengths.unsqueeze(1)
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -math.inf)
        plan += (rows, block_tables[rows, :blocks].flatten(), mask[:, None, None])
    chunks = range(num_decodes, len(context_lens))
    prefixed = [context_lens[s] for s in chunks if context_lens[s] > query_start[s + 1] - query_start[s]]
    if prefixed:
        # One mask, aligned at its lower right corner, serves every piece as a view.
        corner = torch.full((MASKED_QUERY_ROWS, max(prefixed)), -math.inf, dtype=dtype)
        corner = corner.triu_(max(prefixed) - MASKED_QUERY_ROWS + 1)
    for sequence in chunks:
        start, end, context = query_start[sequence], query_start[sequence + 1], context_lens[sequence]
        if context == end - start:
            blocks = -(-context // block_size)
            plan += (torch.arange(start, end), block_tables[sequence, :blocks], torch.empty(0, dtype=dtype))
            continue
        for first in range(start, end, MASKED_QUERY_ROWS):
            last = min(first + MASKED_QUERY_ROWS, end)
            keys = context - (end - last)
            blocks = -(-keys // block_size)
            mask = corner[MASKED_QUERY_ROWS - (last - first) :, corner.size(1) - keys :]
            plan += (torch.arange(first, last), block_tables[sequence, :blocks], mask)
    return plan


def _attend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, blocks: Tensor, mask: Tensor, workspace: Tensor, scale: float
) -> Tensor:
    """One call of a plan; q holds its rows only, [n, heads, D], and so does the result."""
    rows, heads, head_dim = q.shape
    kv_heads = k_cache.size(2)
    gathered = workspace[:, : blocks.numel() * k_cache.size(1)]
    keys, values = gathered.view(2, blocks.numel(), *k_cache.shape[1:]).unbind(0)
    torch.index_select(k_cache, 0, blocks, out=keys)
    torch.index_select(v_cache, 0, blocks, out=values)
    queries = q.view(rows, kv_heads, heads // kv_heads, head_dim)
    if mask.dim() == 4:
        keys = keys.view(rows, -1, kv_heads, head_dim).transpose(1, 2)
        values = values.view(rows, -1, kv_heads, head_dim).transpose(1, 2)
        out = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    else:
        # The key-value head is the batch and the query heads that share it are the heads, at stride 0 in the keys.
        causal = mask.dim() != 2
        length = rows if causal else mask.size(1)
        shape = (kv_heads, heads // kv_heads, length, head_dim)
        out = functional.scaled_dot_product_attention(
            queries.permute(1, 2, 0, 3),
            keys.view(-1, kv_heads, head_dim)[:length].transpose(0, 1).unsqueeze(1).expand(shape),
            values.view(-1, kv_heads, head_dim)[:length].transpose(0, 1).unsqueeze(1).expand(shape),
            attn_mask=None if causal else mask,
            is_causal=causal,
            scale=scale,
        ).permute(2, 0, 1, 3)
    return out.reshape(rows, heads, head_dim)


def _paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    plan: list[Tensor],
    workspace: Tensor,
    scale: float,
) -> Tensor:
    if len(plan) == 3:
        return _attend(q, k_cache, v_cache, plan[1], plan[2], workspace, scale)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for rows, blocks, mask in zip(plan[0::3], plan[1::3], plan[2::3], strict=True):
        out.index_copy_(0, rows, _attend(q.index_select(0, rows), k_cache, v_cache, blocks, mask, workspace, scale))
    return out


def _fake_paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    plan: list[Tensor],
    workspace: Tensor,
    scale: float,
) -> Tensor:
    return q.new_empty(q.shape)


# As `paged_attention_reference`, with the plan of the same step. Masked cache entries must be finite: the mask is added
# to scores that were computed with them. workspace [2, keys, kv_heads, D], at least workspace_rows(plan) of them, in
# the cache's dtype: the caller keeps it, since fresh memory of this size costs more than what is copied into it.
paged_attention = register(
    "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor query_start, "
    "Tensor context_lens, Tensor[] plan, Tensor(a!) workspace, float scale) -> Tensor",
    _paged_attention,
    _fake_paged_attention,
)
