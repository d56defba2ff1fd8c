"""Rotary embedding against complex multiplication in float64, which is its definition."""

from __future__ import annotations

import pytest
import torch

from s1engine.kernels.rope import rope, rope_reference

EPS = 1e-6


def exact(x: torch.Tensor, angles: torch.Tensor, norm_weight: torch.Tensor | None) -> torch.Tensor:
    wide = x.double()
    if norm_weight is not None:
        wide = wide / (wide.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * norm_weight.double()
    first, second = wide.chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    return torch.cat((turned.real, turned.imag), dim=-1)


def tables(angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = angles.cos().float(), angles.sin().float()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("rows", "heads", "head_dim"), [(1, 1, 2), (1, 16, 64), (5, 4, 40), (33, 3, 66)])
def test_rope(rows, heads, head_dim, normed, dtype):
    generator = torch.Generator().manual_seed(0)
    # A slice of a wider projection, as in a model: its rows are not contiguous.
    x = torch.randn(rows, heads + 2, head_dim, generator=generator).to(dtype)[:, :heads]
    angles = torch.rand(rows, head_dim // 2, generator=generator, dtype=torch.float64) * 1000
    norm_weight = torch.randn(heads, head_dim, generator=generator).to(dtype) if normed else None
    cos, sin = tables(angles)
    out = rope(x, cos, sin, norm_weight, EPS)
    assert out.dtype == dtype and out.shape == x.shape
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact(x, angles, norm_weight), rtol=tolerance, atol=2 * tolerance)
    torch.testing.assert_close(rope_reference(x, cos, sin, norm_weight, EPS), out)


def test_operator_is_well_formed():
    x, weight = torch.randn(3, 2, 8), torch.randn(2, 8)
    for norm_weight in (None, weight):
        torch.library.opcheck(
            rope, (x, *tables(torch.randn(3, 4)), norm_weight, EPS), test_utils=("test_schema", "test_faketensor")
        )
