"""The sampler on a GPU: from logits to updated slots in three launches, without a sort and without the host.

Its meaning is that of `logit_edits.py`, `sampler.py` and `slot_step.py` together. Grids depend on the number of rows
and the vocabulary alone, so that the launches can be part of a CUDA graph.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from s1engine.kernels import sampler_decide_triton, sampler_scores_triton, sampler_truncation_triton
from s1engine.kernels.logit_edits_triton import raw_logits
from s1engine.kernels.sampler_decide_triton import decide
from s1engine.kernels.sampler_redraw_triton import redraw_tiles, tiles_block
from s1engine.kernels.sampler_scores_triton import GROUP, TILE_COLUMNS, score_tiles
from s1engine.kernels.sampler_truncation_triton import groups_block
from s1engine.kernels.slot_layout import FIELD_WIDTH, RESULT_WIDTH, Field, Result
from s1engine.kernels.triton_build import Build, ModelShape

_FIELD_WIDTH = tl.constexpr(FIELD_WIDTH)
_RESULT_WIDTH = tl.constexpr(RESULT_WIDTH)
_WANTS_LOGPROB = tl.constexpr(int(Field.WANTS_LOGPROB))
_REWIND = tl.constexpr(int(Result.REWIND))
_TOKEN = tl.constexpr(int(Result.TOKEN))
_RANK = tl.constexpr(int(Result.RANK))


@dataclass(frozen=True, kw_only=True)
class SlotTensors:
    """What is known of N slots, at addresses that never move. All contiguous but for the rows of `tokens`.

    fields         int32 [N, FIELD_WIDTH]
    programs       int32 [N, PROGRAM_WIDTH]
    states         int32 [N, STATE_WIDTH]
    tokens         int32 [N, max_len]
    bias_ids       int32 [N, MAX_BIASES]
    bias_values    float32 [N, MAX_BIASES], -inf bans the id
    prompt_mask    int32 [N, ceil(V / 32)], bit i % 32 of word i // 32: whether the prompt has token i; None: no slot
                   has penalties
    output_counts  int32 [N, V], how often the output has a token, of slots with penalties; None with prompt_mask
    """

    fields: Tensor
    programs: Tensor
    states: Tensor
    tokens: Tensor
    bias_ids: Tensor
    bias_values: Tensor
    prompt_mask: Tensor | None = None
    output_counts: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class SamplerWorkspace:
    """What the launches of one step hand on. Nothing in it outlives the step.

    tiles        float32 [max_rows, TILE_COLUMNS, tiles]
    tile_tokens  int32 [max_rows, 2, tiles]
    group_max    float32 [max_rows, groups], the highest edited logit of each group
    groups       int32 [max_rows, groups], a list of some of them
    tile         tokens of one tile
    """

    tiles: Tensor
    tile_tokens: Tensor
    group_max: Tensor
    groups: Tensor
    tile: int


def sampler_workspace(max_rows: int, vocab: int, device: torch.device | str) -> SamplerWorkspace:
    """A workspace for steps of up to `max_rows` rows."""
    tile = sampler_scores_triton.TILE
    num_tiles, num_groups = triton.cdiv(vocab, tile), triton.cdiv(vocab, GROUP)
    return SamplerWorkspace(
        tiles=torch.empty((max_rows, TILE_COLUMNS, num_tiles), dtype=torch.float32, device=device),
        tile_tokens=torch.empty((max_rows, 2, num_tiles), dtype=torch.int32, device=device),
        group_max=torch.empty((max_rows, num_groups), dtype=torch.float32, device=device),
        groups=torch.empty((max_rows, num_groups), dtype=torch.int32, device=device),
        tile=tile,
    )


def sample_slots(
    logits: Tensor,
    valid_words: Tensor | None,
    table: SlotTensors,
    rows: Tensor,
    workspace: SamplerWorkspace,
    results: Tensor,
    counter: Tensor,
    with_logprobs: bool = False,
) -> None:
    """Sample a token for each row and write it into its slot.

    logits       bfloat16 or float32 [R, V], contiguous; not modified
    valid_words  int32 [ceil(V / 32)], bit i % 32 of word i // 32: whether token i may be sampled; None: all may
    rows         int32 [R], the slot of each row, distinct; -1 is padding
    results      int32 [ring, max_rows, RESULT_WIDTH]; results[counter % ring, :R] is written
    counter      int32 [1], 0 or more

    Of the slots, `tokens`, LENGTH, ACTIVE, `states` and, with penalties, `output_counts` change. A row that is padding
    or whose slot is not active changes nothing; its result is token -1 and otherwise zeros.

    A token is chosen as by `sampler.sample`, at position LENGTH. Probabilities are summed in float32: a token whose
    border of top-p lies within 1e-5 of the mass may fall on the other side of it.

    LOGPROB and RANK are those of the emitted token, forced ones included, under the logits before all edits, for slots
    that want them; RANK is counted only `with_logprobs`. Both are 0 where REWIND is not: such a token stands at an
    earlier position, whose logits are gone.
    """
    num_rows, vocab = logits.shape
    if num_rows == 0:
        return
    source = (
        rows, logits, valid_words, table.fields, table.programs, table.states, table.bias_ids, table.bias_values,
        table.prompt_mask, table.output_counts, vocab,
    )  # fmt: skip
    num_tiles = triton.cdiv(vocab, workspace.tile)
    sweep = {"tiles": workspace.tiles, "tile_tokens": workspace.tile_tokens}
    tile_sizes = {"TILE": workspace.tile, "TILES_BLOCK": tiles_block(vocab, workspace.tile)}
    options = {"num_warps": sampler_scores_triton.WARPS, "num_stages": 1, "enable_fp_fusion": False}
    grid = (num_rows, num_tiles)
    score_tiles[grid](*source, **sweep, group_max=workspace.group_max, TILE=workspace.tile, **options)
    redraw_tiles[grid](*source, **sweep, **tile_sizes, **options)
    decide[(num_rows,)](
        *source,
        **sweep,
        group_max=workspace.group_max,
        groups=workspace.groups,
        tokens=table.tokens,
        results=results,
        counter=counter,
        tokens_stride=table.tokens.stride(0),
        num_tiles=num_tiles,
        ring=results.size(0),
        max_rows=results.size(1),
        TILES_BLOCK=tile_sizes["TILES_BLOCK"],
        GROUPS_BLOCK=groups_block(vocab),
        SEARCH_GROUPS=sampler_truncation_triton.SEARCH_GROUPS,
        SWEEP_GROUPS=sampler_truncation_triton.SWEEP_GROUPS,
        **{**options, "num_warps": sampler_decide_triton.WARPS},
    )
    if with_logprobs:
        count_ranks[grid](
            rows, logits, valid_words, table.fields, vocab, results, counter, results.size(0), results.size(1),
            TILE=workspace.tile, **options,
        )  # fmt: skip


@triton.jit(do_not_specialize=["ring", "max_rows"])
def count_ranks(
    rows, logits, valid_words, fields, vocab, results, counter, ring, max_rows, TILE: tl.constexpr
):  # fmt: skip
    """Program (r, s) adds to RANK of row r how many tokens of tile s are more likely than the emitted one."""
    row = tl.program_id(0)
    slot = tl.load(rows + row)
    result = results + ((tl.load(counter) % ring).to(tl.int64) * max_rows + row) * _RESULT_WIDTH
    token = tl.load(result + _TOKEN)
    wanted = tl.load(fields + slot.to(tl.int64) * _FIELD_WIDTH + _WANTS_LOGPROB, mask=slot >= 0, other=0)
    # ACTIVE already tells of the step after this one: whether the row took part shows in its token.
    if (wanted == 0) | (token < 0) | (tl.load(result + _REWIND) != 0):
        return
    # The whole quad, whose word of valid ids is then a matter of one place.
    own = raw_logits(logits, valid_words, vocab, row, token // 4 + tl.arange(0, 1))
    chosen = tl.max(tl.where(tl.arange(0, 4)[None, :] == token % 4, own, -float("inf")))
    quads = tl.program_id(1) * (TILE // 4) + tl.arange(0, TILE // 4)
    above = raw_logits(logits, valid_words, vocab, row, quads) > chosen
    tl.atomic_add(result + _RANK, tl.sum(above.to(tl.int32)), sem="relaxed")


def builds(shape: ModelShape) -> list[Build]:
    """The count of ranks; the other kernels are listed where they are written."""
    pointers = dict.fromkeys(("rows", "valid_words", "fields", "results", "counter"), "*i32")
    order = ("rows", "logits", "valid_words", "fields", "vocab", "results", "counter", "ring", "max_rows")
    kinds = {**pointers, "logits": f"*{shape.dtype}", **dict.fromkeys(("vocab", "ring", "max_rows"), "i32")}
    return [
        Build(
            name="count_ranks",
            kernel=count_ranks,
            signature={name: kinds[name] for name in order},
            constexprs={"TILE": sampler_scores_triton.TILE},
            aligned=frozenset({*pointers, "logits"} | ({"vocab"} if shape.vocab % 16 == 0 else set())),
            num_warps=sampler_scores_triton.WARPS,
            num_stages=1,
            options={"enable_fp_fusion": False},
        )
    ]
