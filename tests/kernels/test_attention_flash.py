"""What flash-attn is asked for, checked with a stand-in that has its documented signature and meaning."""

import sys
from types import ModuleType

import pytest
import torch

from s1engine.kernels.attention import paged_attention_reference
from s1engine.kernels.attention_flash import flash_prefill, unusable_because


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    block_table: torch.Tensor | None = None,
) -> torch.Tensor:
    """With a block table k and v are [blocks, page, kv_heads, D]; causal is aligned at the lower right corner."""
    assert causal and dropout_p == 0.0 and block_table is not None and softmax_scale is not None
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == block_table.dtype == torch.int32
    queries, keys = cu_seqlens_q.diff(), cu_seqlens_k.diff()
    assert (max_seqlen_q, max_seqlen_k) == (queries.max(), keys.max())
    out = torch.empty_like(q)
    group = q.size(1) // k.size(2)
    for s, (start, end) in enumerate(zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True)):
        length = int(keys[s])
        one_k, one_v = (c[block_table[s].long()].flatten(0, 1)[:length].repeat_interleave(group, 1) for c in (k, v))
        mask = torch.ones(end - start, length, dtype=torch.bool).tril(length - (end - start))
        heads_first = (x.transpose(0, 1)[None] for x in (q[start:end], one_k, one_v))
        attended = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=softmax_scale)
        out[start:end] = attended[0].transpose(0, 1)
    return out


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)


@pytest.mark.usefixtures("installed")
def test_equals_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    k_cache, v_cache = torch.randn(2, 5, 256, 2, 16, generator=generator)
    queries, contexts = [3, 300, 1], [3, 420, 256]
    starts = torch.tensor([0, 3, 303, 304], dtype=torch.int32)
    q = torch.randn(304, 6, 16, generator=generator)
    tables = torch.tensor([[4, 0], [1, 3], [2, 0]], dtype=torch.int32)
    lens = torch.tensor(contexts, dtype=torch.int32)
    key_start = torch.tensor([0, 3, 423, 679], dtype=torch.int32)
    got = flash_prefill(q, k_cache, v_cache, tables, starts, key_start, max(queries), max(contexts), 0.25)
    want = paged_attention_reference(q, k_cache, v_cache, tables, starts, lens, 0.25)
    torch.testing.assert_close(got, want)


@pytest.mark.usefixtures("installed")
def test_where_it_serves() -> None:
    assert unusable_because(256, 128, torch.bfloat16) is None
    assert "block_size=16 is not a multiple of 256" in str(unusable_because(16, 128, torch.bfloat16))
    assert "float32" in str(unusable_because(512, 128, torch.float32))
    assert "head_dim=20" in str(unusable_because(256, 20, torch.bfloat16))


def test_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert "cannot be imported" in str(unusable_because(256, 128, torch.bfloat16))
