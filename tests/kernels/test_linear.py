"""The linear operator against float64, and the bits of its row-invariant form."""

from __future__ import annotations

import pytest
import torch

from s1engine.kernels.linear import (
    TILE_ROWS,
    any_rows_are_independent,
    linear,
    linear_reference,
    rows_are_independent,
)

SHAPES = [(96, 160), (896, 1152), (164, 48), (64, 1000)]


def operands(
    rows: int, columns: int, out: int, dtype: torch.dtype, biased: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(out, generator=generator).to(dtype) if biased else None
    weight = torch.randn(out, columns, generator=generator).to(dtype)
    return torch.randn(rows, columns, generator=generator).to(dtype), weight, bias


@pytest.mark.parametrize("row_invariant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [1, 2, TILE_ROWS, TILE_ROWS + 1, 50])
def test_linear(rows, biased, dtype, row_invariant):
    x, weight, bias = operands(rows, 96, 77, dtype, biased)
    out = linear(x, weight, bias, row_invariant)
    expected = x.double() @ weight.double().T + (bias.double() if bias is not None else 0)
    assert out.dtype == dtype
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=10 * tolerance)
    torch.testing.assert_close(linear_reference(x, weight, bias), out, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("columns", "out"), SHAPES)
def test_rows_have_the_same_bits_in_every_batch(columns, out, biased, dtype):
    x, weight, bias = operands(70, columns, out, dtype, biased)
    assert rows_are_independent(weight, bias)
    together = linear(x, weight, bias, True)
    for rows in (slice(0, 1), slice(5, 6), slice(15, 18), slice(31, 70)):
        assert torch.equal(linear(x[rows].clone(), weight, bias, True), together[rows])


def test_operator_is_well_formed():
    x, weight, bias = operands(3, 8, 5, torch.float32, True)
    for row_invariant in (False, True):
        torch.library.opcheck(linear, (x, weight, bias, row_invariant), test_utils=("test_schema", "test_faketensor"))


def test_the_probe_of_any_number_of_rows_finds_a_library_that_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr("s1engine.kernels.linear.functional.linear", lambda x, *_: x[:, :24] * 2)
    assert any_rows_are_independent(weight, None)

    def by_count(x: torch.Tensor, weight: torch.Tensor, bias: object) -> torch.Tensor:
        return x[:, :24] * 2 + (1e-3 if len(x) == 33 else 0.0)

    monkeypatch.setattr("s1engine.kernels.linear.functional.linear", by_count)
    assert not any_rows_are_independent(weight, None)
