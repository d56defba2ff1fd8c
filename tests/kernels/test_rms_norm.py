"""RMS norm against float64, alone and after a residual sum."""

from __future__ import annotations

import pytest
import torch

from s1engine.kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference

SHAPES = [(1, 1), (1, 5), (3, 33), (7, 896), (65, 128), (2, 3, 40)]
EPS = 1e-6


def exact(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.double()
    return wide / (wide.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def tolerance(dtype: torch.dtype) -> float:
    return 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * 3
    weight = torch.randn(shape[-1], generator=generator).to(dtype)
    for given in (x, x.to(dtype), x * 1e-4):  # the last so small that eps counts
        out = rms_norm(given, weight, EPS)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), exact(given, weight), rtol=tolerance(dtype), atol=1e-6)
        torch.testing.assert_close(rms_norm_reference(given, weight, EPS), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm_updates_the_residual(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    residual = torch.randn(shape, generator=generator) * 100
    x = torch.randn(shape, generator=generator).to(dtype)
    weight = torch.randn(shape[-1], generator=generator).to(dtype)
    expected, expected_residual = add_rms_norm_reference(residual, x, weight, EPS)
    total = residual.double() + x.double()
    out = add_rms_norm(residual, x, weight, EPS)
    torch.testing.assert_close(residual.double(), total, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.double(), exact(total, weight), rtol=tolerance(dtype), atol=1e-6)
    assert torch.equal(residual, expected_residual)
    torch.testing.assert_close(out, expected)


def test_operators_are_well_formed():
    x, weight = torch.randn(3, 8), torch.randn(8)
    torch.library.opcheck(rms_norm, (x, weight, EPS), test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(
        add_rms_norm, (x, torch.randn(3, 8), weight, EPS), test_utils=("test_schema", "test_faketensor")
    )
