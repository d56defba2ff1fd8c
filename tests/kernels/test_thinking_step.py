"""The thinking machine as an operator on tensors."""

import torch
from thinking_cases import by_reference, by_stepper, load_conformance

from s1engine.kernels.thinking_step import thinking_step
from s1engine.thinking.layout import OUT_WIDTH, PROGRAM_WIDTH, STATE_WIDTH


def test_conformance() -> None:
    cases = [case for _, case, _ in load_conformance()]

    def by_operator(*arrays: object) -> object:
        return thinking_step(*map(torch.from_numpy, arrays)).numpy()

    assert by_stepper(by_operator, cases) == [by_reference(case) for case in cases]


def test_shapes_are_known_without_running() -> None:
    def of(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int32, device="meta")

    assert torch.ops.s1engine.thinking_step(of(3, PROGRAM_WIDTH), of(3, STATE_WIDTH), of(2), of(2)).shape == (
        2,
        OUT_WIDTH,
    )
