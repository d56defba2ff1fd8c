"""The decision of the sampler on a GPU: one program a row chooses the token and writes it to its slot."""

import triton
import triton.language as tl

from s1engine.kernels import sampler_truncation_triton
from s1engine.kernels.logit_edits_triton import (
    active_slot,
    aligned_arguments,
    logits_arguments,
    machine_bans,
    stop_bans,
)
from s1engine.kernels.sampler_redraw_triton import load_drawn, load_mass, load_truncation, tiles_block
from s1engine.kernels.sampler_scores_triton import (
    DRAWN,
    MASS,
    RAW_MASS,
    RAW_MAX,
    SCORE,
    TILE,
    TOP,
    VALUE,
    load_temperature,
)
from s1engine.kernels.sampler_truncation_triton import groups_block, truncated_token
from s1engine.kernels.slot_layout import FIELD_WIDTH, MAX_BIASES, RESULT_WIDTH, Field, Result
from s1engine.kernels.slot_step_triton import advance_slot, store_idle_result
from s1engine.kernels.triton_build import Build, ModelShape

WARPS = 8

_FIELD_WIDTH = tl.constexpr(FIELD_WIDTH)
_MAX_BIASES = tl.constexpr(MAX_BIASES)
_RESULT_WIDTH = tl.constexpr(RESULT_WIDTH)
_RESULT_LOGPROB = tl.constexpr(int(Result.LOGPROB))
_RESULT_RANK = tl.constexpr(int(Result.RANK))
_NUM_BIASES = tl.constexpr(int(Field.NUM_BIASES))
_WANTS_LOGPROB = tl.constexpr(int(Field.WANTS_LOGPROB))


@triton.jit
def store_logprob(source, row, sweep, token, result, TILES_BLOCK: tl.constexpr):
    """The raw log probability of a row's token; its rank begins at 1, and is counted by `count_ranks`."""
    raw_max, raw_mass = load_mass(sweep, row, 1.0, RAW_MAX, RAW_MASS, TILES_BLOCK)
    raw = tl.load(source[0] + row.to(tl.int64) * source[9] + token).to(tl.float32)
    if source[1] is not None:
        raw = tl.where(((tl.load(source[1] + token // 32) >> (token % 32)) & 1) != 0, raw, -float("inf"))
    tl.debug_barrier()
    tl.store(result + _RESULT_LOGPROB, (raw - raw_max - tl.log(raw_mass)).to(tl.int32, bitcast=True))
    tl.store(result + _RESULT_RANK, 1)


@triton.jit(do_not_specialize=["tokens_stride", "num_tiles", "ring", "max_rows"])
def decide(
    rows,
    logits,
    valid_words,
    fields,
    programs,
    states,
    bias_ids,
    bias_values,
    prompt_mask,
    output_counts,
    vocab,
    tiles,
    tile_tokens,
    group_max,
    groups,
    tokens,
    results,
    counter,
    tokens_stride,
    num_tiles,
    ring,
    max_rows,
    TILES_BLOCK: tl.constexpr,
    GROUPS_BLOCK: tl.constexpr,
    SEARCH_GROUPS: tl.constexpr,
    SWEEP_GROUPS: tl.constexpr,
):
    """Program r chooses the token of row r and writes it to its slot and to results[counter % ring, r]."""
    row = tl.program_id(0)
    slot = active_slot(rows, fields, row)
    result = results + ((tl.load(counter) % ring).to(tl.int64) * max_rows + row) * _RESULT_WIDTH
    if slot < 0:
        store_idle_result(result)
        return
    source = (logits, valid_words, fields, programs, states, bias_ids, bias_values, prompt_mask, output_counts, vocab)
    sweep = (tiles, tile_tokens, num_tiles)
    sampled, temperature = load_temperature(fields, slot)
    top_k, top_p, min_p = load_truncation(fields, slot, vocab)
    token, value = load_drawn(sweep, row, vocab, SCORE, VALUE, DRAWN, TILES_BLOCK)
    top, mass = load_mass(sweep, row, temperature, TOP, MASS, TILES_BLOCK)
    # Without a finite maximum there is no distribution to truncate.
    truncates = (top > -float("inf")) & (top < float("inf")) & ((top_k > 0) | (top_p < 1) | (min_p > 0))
    if sampled & truncates:
        token = truncated_token(
            source, row, slot, sweep, group_max, groups, temperature, top, mass, token, value, top_k, top_p, min_p,
            TILES_BLOCK, GROUPS_BLOCK, SEARCH_GROUPS, SWEEP_GROUPS,
        )  # fmt: skip

    field = fields + slot.to(tl.int64) * _FIELD_WIDTH
    place = tl.arange(0, _MAX_BIASES)
    given = place < tl.load(field + _NUM_BIASES)
    biases = tl.load(bias_values + slot.to(tl.int64) * _MAX_BIASES + place, mask=given, other=0.0)
    _, num_banned = machine_bans(fields, programs, states, slot)
    banned = (tl.min(biases, axis=0) == -float("inf")) | (stop_bans(fields, slot) > 0) | (num_banned > 0)
    wants_logprob = tl.load(field + _WANTS_LOGPROB) != 0
    rewind, token = advance_slot(
        fields, tokens, tokens_stride, programs, states, output_counts, vocab, slot, token, banned.to(tl.int32), result
    )
    # A token put at an earlier position is none of this row of logits.
    if wants_logprob & (token >= 0) & (rewind == 0):
        store_logprob(source, row, sweep, token, result, TILES_BLOCK)


def builds(shape: ModelShape) -> list[Build]:
    found = []
    for penalties in (False, True):
        signature, constexprs = logits_arguments(shape, penalties)
        signature |= {"tiles": "*fp32", "tile_tokens": "*i32", "group_max": "*fp32"}
        signature |= dict.fromkeys(("groups", "tokens", "results", "counter"), "*i32")
        aligned = aligned_arguments(signature, shape)
        signature |= dict.fromkeys(("tokens_stride", "num_tiles", "ring", "max_rows"), "i32")
        blocks = {
            "TILES_BLOCK": tiles_block(shape.vocab, TILE),
            "GROUPS_BLOCK": groups_block(shape.vocab),
            "SEARCH_GROUPS": sampler_truncation_triton.SEARCH_GROUPS,
            "SWEEP_GROUPS": sampler_truncation_triton.SWEEP_GROUPS,
        }
        found.append(
            Build(
                name=f"decide{' with penalties' if penalties else ''}",
                kernel=decide,
                signature=signature,
                constexprs={**constexprs, **blocks},
                aligned=aligned,
                num_warps=WARPS,
                num_stages=1,
                options={"enable_fp_fusion": False},
            )
        )
    return found
