"""Registered gradients: gradcheck in float64 on the specifications, and the operators against autograd in float32."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from s1engine.kernels import activation, linear, rms_norm, rope
from s1engine.kernels.linear_cross_entropy import linear_cross_entropy
from s1engine.kernels.varlen_attention import varlen_attention, varlen_attention_reference

EPS = 1e-5


def with_gradient(forward, save, backward):
    """The formula under test on a specification, which computes in float64 where the operators do not."""
    members = {
        "forward": staticmethod(forward),
        "setup_context": staticmethod(save),
        "backward": staticmethod(backward),
    }
    return type("Checked", (torch.autograd.Function,), members).apply


def wide(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def angles(rows: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.arange(rows * size // 2, dtype=dtype).view(rows, size // 2)
    return torch.cat((angle.cos(), angle.cos()), -1), torch.cat((-angle.sin(), angle.sin()), -1)


@pytest.mark.parametrize("shape", [(1, 4), (5, 7), (2, 3, 4)])
def test_rms_norm(shape):
    checked = with_gradient(rms_norm.rms_norm_reference, rms_norm.save_for_rms_norm, rms_norm.backward_of_rms_norm)
    assert gradcheck(lambda x, w: checked(x, w, EPS), (wide(*shape), wide(shape[-1], seed=1)))


def test_silu_mul(monkeypatch):
    monkeypatch.setattr(activation, "_PASS_ELEMENTS", 8)  # several passes
    checked = with_gradient(
        lambda x, _: activation.silu_mul_reference(x), activation.save_for_silu_mul, activation.backward_of_silu_mul
    )
    assert gradcheck(lambda x: checked(x, False), (wide(5, 8),))


@pytest.mark.parametrize("normed", [False, True])
def test_rope(normed):
    norm = wide(2, 6, seed=1) if normed else None
    cos, sin = angles(3, 6, torch.float64)
    assert gradcheck(lambda x, w: rope.rope(x, cos, sin, w, EPS), (wide(3, 2, 6), norm))


@pytest.mark.parametrize("row_invariant", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(bias, row_invariant):
    b = wide(5, seed=2) if bias else None
    assert gradcheck(lambda x, w, b: linear.linear(x, w, b, row_invariant), (wide(3, 4), wide(5, 4, seed=1), b))


@pytest.mark.parametrize("starts", [[0, 1], [0, 4, 5, 9]])
def test_varlen_attention(starts):
    rows = starts[-1]
    inputs = wide(rows, 4, 8), wide(rows, 2, 8, seed=1), wide(rows, 2, 8, seed=2)
    where = (torch.tensor(starts, dtype=torch.int32), starts, 0.3)
    torch.testing.assert_close(varlen_attention(*inputs, *where), varlen_attention_reference(*inputs, *where))
    assert gradcheck(lambda q, k, v: varlen_attention(q, k, v, *where), inputs)


def test_linear_cross_entropy(monkeypatch):
    monkeypatch.setattr("s1engine.kernels.linear_cross_entropy.PIECE_BYTES", 2 * 11 * 4)  # two rows a piece
    targets = torch.tensor([3, 0, 10, 3, 7])
    weights = torch.tensor([1.0, 0.5, 0.0, 3.0, 0.25])
    hidden, weight = wide(5, 4), wide(11, 4, seed=1)
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="none") @ weights.double()
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets, weights), expected)
    assert gradcheck(lambda h, w: linear_cross_entropy(h, w, targets, weights) * 1.7, (hidden, weight))


def test_nothing_to_learn_is_a_loss_of_zero_with_gradients():
    hidden, weight = wide(2, 4), wide(11, 4, seed=1)
    loss = linear_cross_entropy(hidden, weight, torch.zeros(2, dtype=torch.int64), torch.zeros(2))
    loss.backward()
    assert loss == 0 and not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_agree_with_autograd(dtype):
    """Of the operators as they are called, C++ forward and all, with a float32 stream into the norm."""
    cos, sin = angles(6, 8, torch.float32)

    def run(norm, turn, gate, product):
        torch.manual_seed(0)
        stream = torch.randn(6, 32).requires_grad_()
        weights = [torch.randn(32).to(dtype), torch.randn(64, 32).to(dtype), torch.randn(4, 8).to(dtype)]
        scale, matrix, heads = (w.requires_grad_() for w in weights)
        x = product(norm(stream, scale, EPS), matrix, None)
        x = turn(x[:, :32].view(6, 4, 8), cos, sin, heads, EPS).flatten(1)
        x = gate(torch.cat((x, x * 0.5), 1))
        (x.float() * torch.randn(x.shape)).sum().backward()
        return [t.grad for t in (stream, scale, matrix, heads)]

    ours = run(
        rms_norm.rms_norm, rope.rope, lambda x: activation.silu_mul(x, False),
        lambda x, w, b: linear.linear(x, w, b, False),
    )  # fmt: skip
    theirs = run(
        rms_norm.rms_norm_reference, rope.rope_reference, activation.silu_mul_reference, linear.linear_reference
    )
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for own, other in zip(ours, theirs, strict=True):
        assert own.dtype == other.dtype
        torch.testing.assert_close(own, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))
