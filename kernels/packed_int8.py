"""int8 weights in the layout of the C++ operators (csrc/cpu/int8.h), and their products in plain PyTorch.

A weight [N, K] is cut into panels of 32 outputs and blocks of 64 inputs; a block of one output has one scale, bfloat16,
and codes of 8 bits, symmetric about zero. The packed form is int8 [panels, bytes]. A panel holds its blocks one after
another: the codes as [steps, 32, 4], four consecutive inputs of each output a step, 128 added, as bytes without a sign;
then the 32 scales. The last block has as many steps as it needs. In a gated weight gates have the columns 0 to 15 of a
panel and the up projection those from 16 on.

The rows that are multiplied are rounded block by block as well, with scales of float32. Sums within a block are exact,
and those of an output's blocks are added in the order of K: its bits depend on its own row only.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from s1engine.kernels.activation import silu_mul_reference

PANEL = 32
HALF = PANEL // 2
BLOCK = 64
STEP = 4  # inputs of a step


def packed_int8_shape(outputs: int, inputs: int, gated: bool = False) -> tuple[int, int]:
    """Shape of the packed form, int8, of a weight [outputs, inputs]; gated: half of the outputs are gates."""
    panels = -(-(outputs // 2) // HALF) if gated else -(-outputs // PANEL)
    return panels, -(-inputs // STEP) * STEP * PANEL + -(-inputs // BLOCK) * 2 * PANEL


def _in_blocks(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [n, K] as float32 [n, blocks, 64], with zeros at the end, and the magnitude of each block [n, blocks, 1].

    What is below 1e-30 counts as zero: the inverse of such a scale is no number.
    """
    blocks = functional.pad(rows.float(), (0, -rows.size(1) % BLOCK)).unflatten(1, (-1, BLOCK))
    magnitude = blocks.abs().amax(-1, keepdim=True)
    return blocks, torch.where(magnitude < 1e-30, 0.0, magnitude)


def _to_bfloat16_upwards(values: Tensor) -> Tensor:
    """The next bfloat16 that is not below; values: float32, not negative."""
    bits = values.contiguous().view(torch.int32)
    rounded = torch.where(values.isfinite(), (bits + 0xFFFF) & -0x10000, bits)
    return rounded.view(torch.float32).to(torch.bfloat16)


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes float32 [n, blocks, 64], whole numbers from -127 to 127, and scales bfloat16 [n, blocks] of rows [n, K]."""
    blocks, magnitude = _in_blocks(weight)
    scales = _to_bfloat16_upwards(magnitude / 127)
    inverse = torch.where(magnitude == 0, 0.0, 1 / scales.float())
    return (blocks * inverse).round(), scales.squeeze(-1)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same for rows that are multiplied: their scales are float32."""
    blocks, magnitude = _in_blocks(x)
    # (127 / magnitude would be the reciprocal times 127: two roundings.)
    inverse = torch.where(magnitude == 0, 0.0, torch.full_like(magnitude, 127) / magnitude)
    return (blocks * inverse).round(), (magnitude / 127).squeeze(-1)


def dequantise(codes: Tensor, scales: Tensor, inputs: int) -> Tensor:
    """float32 [n, inputs] of codes [n, blocks, 64] and scales [n, blocks]."""
    return (codes * scales.float().unsqueeze(-1)).flatten(1)[:, :inputs]


def int8_product(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """float32 [T, n]: rows x [T, K], rounded to 8 bits, times a weight as quantise_weight returns it."""
    values, row_scales = quantise_rows(x)
    total = torch.zeros(x.size(0), codes.size(0))
    for block in range(codes.size(1)):
        # (Exact in float32: below 64 * 127 * 127.)
        dots = values[:, block] @ codes[:, block].T
        total += dots * (row_scales[:, block].unsqueeze(1) * scales[:, block].float())
    return total


def _blocks_of(weight: Tensor, inputs: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of a packed weight's blocks: codes int8 [panels, steps, 32, 4], 128 too high, and scales [panels, 32]."""
    start = 0
    for first in range(0, inputs, BLOCK):
        steps = -(-min(inputs - first, BLOCK) // STEP)
        end = start + steps * STEP * PANEL
        codes = weight[:, start:end].unflatten(1, (steps, PANEL, STEP))
        start = end + 2 * PANEL
        yield codes, weight[:, end:start].view(torch.bfloat16)


def _places(first: int, count: int, half: int) -> tuple[Tensor, Tensor]:
    """The panel and the column of rows that begin at `first`."""
    index = torch.arange(first, first + count)
    if half < 0:
        return index // PANEL, index % PANEL
    return index // HALF, index % HALF + half * HALF


def pack_int8_rows(weight: Tensor, rows: Tensor, first: int, half: int) -> None:
    """Write rows [n, K] of float32, bfloat16 or float16, as s1engine::pack_rows_ does."""
    codes, scales = quantise_weight(rows)
    panel, column = _places(first, rows.size(0), half)
    stored = codes.nan_to_num(0, 0, 0).to(torch.int8) ^ -128
    for block, (to_codes, to_scales) in enumerate(_blocks_of(weight, rows.size(1))):
        steps = to_codes.size(1)
        to_codes[panel, :, column] = stored[:, block, : steps * STEP].unflatten(1, (steps, STEP))
        to_scales[panel, column] = scales[:, block]


def _read(weight: Tensor, panel: Tensor, column: Tensor, inputs: int) -> tuple[Tensor, Tensor]:
    """Codes [n, blocks, 64] and scales [n, blocks] of outputs of a packed weight."""
    codes, scales = [torch.zeros(panel.numel(), 0, BLOCK)], [torch.zeros(panel.numel(), 0, dtype=torch.bfloat16)]
    for from_codes, from_scales in _blocks_of(weight, inputs):
        found = (from_codes[panel, :, column] ^ -128).flatten(1).float()
        codes.append(functional.pad(found, (0, BLOCK - found.size(1))).unsqueeze(1))
        scales.append(from_scales[panel, column].unsqueeze(1))
    return torch.cat(codes, 1), torch.cat(scales, 1)


def unpack_int8_rows(rows: Tensor, weight: Tensor, first: int, half: int) -> None:
    """Fill float32 rows [n, K], as s1engine::unpack_rows_ does."""
    inputs = rows.size(1)
    rows.copy_(dequantise(*_read(weight, *_places(first, rows.size(0), half), inputs), inputs))


def int8_linear(x: Tensor, weight: Tensor, bias: Tensor | None, outputs: int, gated: bool) -> Tensor:
    """float32 [T, outputs], gated: [T, outputs / 2], as s1engine::packed_linear with float_out."""
    halves = [(outputs // 2, 0), (outputs // 2, 1)] if gated else [(outputs, -1)]
    parts = [int8_product(x, *_read(weight, *_places(0, count, half), x.size(1))) for count, half in halves]
    out = torch.cat(parts, 1)
    if bias is not None:
        out += bias.float()
    return silu_mul_reference(out) if gated else out


def int8_embedding(ids: Tensor, weight: Tensor, inputs: int) -> Tensor:
    """float32 [T, inputs], as s1engine::packed_embedding."""
    return dequantise(*_read(weight, ids // PANEL, ids % PANEL, inputs), inputs)
