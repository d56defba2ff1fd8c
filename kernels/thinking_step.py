"""One step of the thinking state machine over a block of slots, as an operator of its own.

Inside the engine the machine runs at the end of the sampler's last kernel; this is for stacks that sample themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from s1engine.kernels.registry import register
from s1engine.thinking.layout import OUT_WIDTH
from s1engine.thinking.stepper import step


def _thinking_step(programs: Tensor, states: Tensor, slots: Tensor, sampled: Tensor) -> Tensor:
    return torch.from_numpy(step(programs.numpy(), states.numpy(), slots.numpy(), sampled.numpy()))


def _fake(programs: Tensor, states: Tensor, slots: Tensor, sampled: Tensor) -> Tensor:
    return sampled.new_empty(sampled.size(0), OUT_WIDTH)


# programs int32 [N, PROGRAM_WIDTH], rows of thinking.program.compile_program; states int32 [N, STATE_WIDTH], first from
# initial_state, those of `slots` updated in place; slots int32 [n], distinct; sampled int32 [n], the token sampled at
# the next position of each. Returns int32 [n, 4], columns as in thinking.layout.Out.
thinking_step = register(
    "thinking_step(Tensor programs, Tensor(a!) states, Tensor slots, Tensor sampled) -> Tensor",
    _thinking_step,
    _fake,
    triton="s1engine.kernels.thinking_step_triton:step_slots",
)
