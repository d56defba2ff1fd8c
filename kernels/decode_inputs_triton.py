"""The inputs of a decode step, made from the slots on the device: no step waits for the host to know its tokens.

One launch of one program: it gathers what each row needs and lays out the work of attention, whose keys are cut into
splits of a fixed size.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from s1engine.kernels.slot_layout import FIELD_WIDTH, MAX_ROWS, Field
from s1engine.kernels.triton_build import Build, ModelShape

_TILE = 4096  # work items written at a time
_WARPS = 8

_FIELD_WIDTH = tl.constexpr(FIELD_WIDTH)
_LENGTH = tl.constexpr(int(Field.LENGTH))
_ACTIVE = tl.constexpr(int(Field.ACTIVE))


@dataclass(frozen=True, kw_only=True)
class DecodeInputs:
    """Tensors of a decode step of B rows, at the same addresses in every step.

    token_ids     int64 [B], the newest token
    positions     int64 [B], where it stands
    slot_mapping  int64 [B], where its key and value go in the cache, counted over all blocks; -1: nowhere
    context_lens  int32 [B], tokens to attend to, itself included; 0: none
    split_start   int32 [B + 1], how many splits of keys the rows before have together; the last is the number of all
    work          int32 [B * max_splits, 2], (row, split) of every split in order; what follows them has no meaning
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    context_lens: Tensor
    split_start: Tensor
    work: Tensor

    def narrow(self, rows: int) -> "DecodeInputs":
        """Views of the first `rows` rows, with as many splits a row as here."""
        max_splits = self.work.size(0) // self.token_ids.size(0)
        return DecodeInputs(
            token_ids=self.token_ids[:rows],
            positions=self.positions[:rows],
            slot_mapping=self.slot_mapping[:rows],
            context_lens=self.context_lens[:rows],
            split_start=self.split_start[: rows + 1],
            work=self.work[: rows * max_splits],
        )


def allocate(max_rows: int, max_splits: int, device: torch.device) -> DecodeInputs:
    """Tensors for steps of up to `max_rows` rows, each with up to `max_splits` splits, as of a step without any work.

    Raises ValueError for more than MAX_ROWS rows.
    """
    _check_rows(max_rows)

    def of(*size: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=device)

    return DecodeInputs(
        token_ids=of(max_rows, dtype=torch.int64),
        positions=of(max_rows, dtype=torch.int64),
        slot_mapping=of(max_rows, dtype=torch.int64).fill_(-1),
        context_lens=of(max_rows, dtype=torch.int32),
        split_start=of(max_rows + 1, dtype=torch.int32),
        work=of(max_rows * max_splits, 2, dtype=torch.int32),
    )


def _check_rows(rows: int) -> None:
    if rows > MAX_ROWS:
        raise ValueError(f"a decode step has at most {MAX_ROWS} rows, not {rows}")


@triton.jit(do_not_specialize=["num_rows", "tokens_stride", "block_tables_stride"])
def _decode_inputs_kernel(
    rows,
    fields,
    tokens,
    block_tables,
    token_ids,
    positions,
    slot_mapping,
    context_lens,
    split_start,
    work,
    counter,
    num_rows,
    tokens_stride,
    block_tables_stride,
    BLOCK_SIZE: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """BLOCK rows, num_rows of them given; SPLITS work items of each row are written at a time."""
    row = tl.arange(0, BLOCK)
    given = row < num_rows
    slot = tl.load(rows + row, mask=given, other=-1).to(tl.int64)
    taken = slot >= 0
    field = fields + slot * _FIELD_WIDTH
    length = tl.load(field + _LENGTH, mask=taken, other=0)
    active = taken & (tl.load(field + _ACTIVE, mask=taken, other=0) != 0)
    length = tl.where(active, length, 0)
    position = tl.where(active, length - 1, 0)
    token = tl.load(tokens + slot * tokens_stride + position, mask=active, other=0)
    block = tl.load(block_tables + slot * block_tables_stride + position // BLOCK_SIZE, mask=active, other=0)
    place = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
    tl.store(token_ids + row, token.to(tl.int64), mask=given)
    tl.store(positions + row, position.to(tl.int64), mask=given)
    tl.store(slot_mapping + row, tl.where(active, place, -1), mask=given)
    tl.store(context_lens + row, length, mask=given)

    splits = (length + SPLIT_KEYS - 1) // SPLIT_KEYS
    end = tl.cumsum(splits, axis=0)
    tl.store(split_start, 0)
    tl.store(split_start + 1 + row, end, mask=given)
    most = tl.max(splits, axis=0)
    start = end - splits
    written = 0
    while written < most:
        split = written + tl.arange(0, SPLITS)[None, :]
        due = split < splits[:, None]
        item = work + (start[:, None] + split) * 2
        tl.store(item, row[:, None] + tl.zeros_like(split), mask=due)
        tl.store(item + 1, split + tl.zeros_like(row)[:, None], mask=due)
        written += SPLITS
    tl.store(counter, tl.load(counter) + 1)


def _blocks(rows: int) -> tuple[int, int]:
    """(block of rows, splits at a time). A row a thread at least: fewer would save nothing and be one more kernel."""
    block = max(triton.next_power_of_2(rows), 32 * _WARPS)
    return block, _TILE // block


def build_decode_inputs(
    rows: Tensor,
    fields: Tensor,
    tokens: Tensor,
    block_tables: Tensor,
    block_size: int,
    inputs: DecodeInputs,
    counter: Tensor,
    split_keys: int,
) -> None:
    """Fill `inputs` for a step of the slots `rows`, and count the step.

    rows          int32 [B], the slot of each row; -1 is padding
    fields        int32 [N, FIELD_WIDTH], contiguous
    tokens        int32 [N, max_len], the known tokens of each slot
    block_tables  int32 [N, max_blocks], blocks of `block_size` positions
    inputs        of B rows; none may have more splits than it has room for
    counter       int32 [1], one more afterwards
    split_keys    keys of one split
    Padding and slots that are not active get token 0, position 0, slot_mapping -1, context 0 and no splits.
    Raises ValueError for more than MAX_ROWS rows.
    """
    _check_rows(rows.size(0))
    block, splits = _blocks(rows.size(0))
    _decode_inputs_kernel[(1,)](
        rows,
        fields,
        tokens,
        block_tables,
        inputs.token_ids,
        inputs.positions,
        inputs.slot_mapping,
        inputs.context_lens,
        inputs.split_start,
        inputs.work,
        counter,
        rows.size(0),
        tokens.stride(0),
        block_tables.stride(0),
        BLOCK_SIZE=block_size,
        SPLIT_KEYS=split_keys,
        BLOCK=block,
        SPLITS=splits,
        num_warps=_WARPS,
        num_stages=1,
        enable_fp_fusion=True,
    )


def builds(shape: ModelShape) -> list[Build]:
    """The kernel knows nothing of the model: its smallest and its largest block of rows."""
    pointers = {
        **dict.fromkeys(("rows", "fields", "tokens", "block_tables"), "*i32"),
        **dict.fromkeys(("token_ids", "positions", "slot_mapping"), "*i64"),
        **dict.fromkeys(("context_lens", "split_start", "work", "counter"), "*i32"),
    }
    scalars = dict.fromkeys(("num_rows", "tokens_stride", "block_tables_stride"), "i32")

    def build(rows: int) -> Build:
        block, splits = _blocks(rows)
        return Build(
            name=f"decode_inputs {block} rows",
            kernel=_decode_inputs_kernel,
            signature={**pointers, **scalars},
            constexprs={"BLOCK_SIZE": 16, "SPLIT_KEYS": 256, "BLOCK": block, "SPLITS": splits},
            aligned=frozenset(pointers),
            num_warps=_WARPS,
            num_stages=1,
            options={"enable_fp_fusion": True},
        )

    return [build(rows) for rows in (1, MAX_ROWS)]
