"""Second sweep of the sampler on a GPU, for rows with top-p or min-p alone.

It is the second draw of `sampler.py`, and the sums by which the first is judged.
"""

import triton
import triton.language as tl

from s1engine.kernels.logit_edits_triton import (
    active_slot,
    aligned_arguments,
    edited_logits,
    float_field,
    logits_arguments,
    token_ids,
)
from s1engine.kernels.sampler_scores_triton import (
    ABOVE,
    COLUMNS,
    DRAWN,
    KEPT,
    MASS,
    NEXT,
    NEXT_SCORE,
    NEXT_VALUE,
    NO_TOKEN,
    SCORE,
    TILE,
    TOP,
    VALUE,
    WARPS,
    best_of,
    gumbel_noise,
    load_temperature,
    relative_mass,
)
from s1engine.kernels.slot_layout import FIELD_WIDTH, Field
from s1engine.kernels.triton_build import Build, ModelShape

_FIELD_WIDTH = tl.constexpr(FIELD_WIDTH)
_TOP_K = tl.constexpr(int(Field.TOP_K))
_TOP_P = tl.constexpr(int(Field.TOP_P))
_MIN_P = tl.constexpr(int(Field.MIN_P))


@triton.jit
def load_truncation(fields, slot, vocab):
    """(top_k, top_p, min_p) of a slot; top_k is 0 where it is off or keeps everything."""
    top_k = tl.load(fields + slot.to(tl.int64) * _FIELD_WIDTH + _TOP_K)
    return tl.where(top_k < vocab, top_k, 0), float_field(fields, slot, _TOP_P), float_field(fields, slot, _MIN_P)


@triton.jit
def min_p_threshold(top, temperature, min_p):
    """The lowest logit that min-p lets pass; `top` is the highest."""
    # In float64, as float32 would round the logarithm before it is scaled and added.
    log = tl.log(tl.maximum(min_p, 2.0**-126).to(tl.float64))
    bound = (top.to(tl.float64) + temperature.to(tl.float64) * log).to(tl.float32)
    return tl.where(min_p > 0, bound, -float("inf"))


@triton.jit
def load_drawn(sweep, row, vocab, SCORES: tl.constexpr, VALUES: tl.constexpr, TOKENS: tl.constexpr,
               TILES_BLOCK: tl.constexpr):  # fmt: skip
    """(token, its edited logit): the best of what all tiles of a row offer. sweep: (tiles, tile_tokens, num_tiles)"""
    tiles, tile_tokens, num_tiles = sweep
    tile = tl.arange(0, TILES_BLOCK)
    given = tile < num_tiles
    columns = tiles + row.to(tl.int64) * COLUMNS * num_tiles + tile
    scores = tl.load(columns + SCORES * num_tiles, mask=given, other=-float("inf"))
    values = tl.load(columns + VALUES * num_tiles, mask=given, other=-float("inf"))
    places = tile_tokens + (row.to(tl.int64) * 2 + TOKENS) * num_tiles + tile
    _, token, value = best_of(scores, tl.load(places, mask=given, other=NO_TOKEN), values)
    # A row of NaN has to give some token.
    return tl.where(token < vocab, token, 0), value


@triton.jit
def load_mass(sweep, row, scale, MAXIMA: tl.constexpr, MASSES: tl.constexpr, TILES_BLOCK: tl.constexpr):
    """(the highest of MAXIMA, the sum of all tiles' MASSES relative to it); the maxima count divided by `scale`."""
    tiles, _, num_tiles = sweep
    tile = tl.arange(0, TILES_BLOCK)
    given = tile < num_tiles
    columns = tiles + row.to(tl.int64) * COLUMNS * num_tiles + tile
    maxima = tl.load(columns + MAXIMA * num_tiles, mask=given, other=-float("inf"))
    masses = tl.load(columns + MASSES * num_tiles, mask=given, other=0.0)
    top = tl.max(maxima, axis=0)
    return top, tl.sum(masses * relative_mass(tl.div_rn(maxima, scale), tl.div_rn(top, scale)), axis=0)


@triton.jit
def redraw_tiles(
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
    TILE: tl.constexpr,
    TILES_BLOCK: tl.constexpr,
):
    """Program (r, s) fills columns ABOVE to NEXT_VALUE of tile s of row r, where the row has top-p or min-p alone.

    Next in line are the tokens strictly above the drawn one; if min-p drops that, then all that min-p keeps.
    """
    row = tl.program_id(0)
    tile = tl.program_id(1)
    slot = active_slot(rows, fields, row)
    if slot < 0:
        return
    top_k, top_p, min_p = load_truncation(fields, slot, vocab)
    sampled, temperature = load_temperature(fields, slot)
    if ((sampled & ((top_p < 1) | (min_p > 0))) == 0) | (top_k > 0):
        return
    num_tiles = tl.num_programs(1)
    sweep = (tiles, tile_tokens, num_tiles)
    top, _ = load_mass(sweep, row, temperature, TOP, MASS, TILES_BLOCK)
    _, value = load_drawn(sweep, row, vocab, SCORE, VALUE, DRAWN, TILES_BLOCK)
    threshold = min_p_threshold(top, temperature, min_p)
    out = tiles + row.to(tl.int64) * COLUMNS * num_tiles + tile
    tile_top = tl.load(out + TOP * num_tiles)

    above = 0.0
    kept = 0.0
    score = -float("inf")
    token = tile * TILE
    next_value = -float("inf")
    if (tile_top > value) | ((min_p > 0) & (tile_top >= threshold)):
        source = (
            logits, valid_words, fields, programs, states, bias_ids, bias_values, prompt_mask, output_counts, vocab
        )  # fmt: skip
        quads = tile * (TILE // 4) + tl.arange(0, TILE // 4)
        x = edited_logits(source, row, slot, quads)
        scaled = tl.div_rn(x, temperature)
        mass = relative_mass(scaled, tl.div_rn(top, temperature))
        above = tl.sum(tl.where(x > value, mass, 0.0))
        kept = tl.sum(tl.where(x >= threshold, mass, 0.0))
        in_line = (x >= threshold) & (x > tl.where(value < threshold, -float("inf"), value))
        if tl.max(in_line.to(tl.int32)) > 0:
            noisy = tl.where(in_line, scaled + gumbel_noise(fields, slot, quads), -float("inf"))
            score, token, next_value = best_of(noisy, token_ids(quads), x)
    tl.store(out + ABOVE * num_tiles, above)
    tl.store(out + KEPT * num_tiles, kept)
    tl.store(out + NEXT_SCORE * num_tiles, score)
    tl.store(out + NEXT_VALUE * num_tiles, next_value)
    tl.store(tile_tokens + (row.to(tl.int64) * 2 + NEXT) * num_tiles + tile, token)


def tiles_block(vocab: int, tile: int) -> int:
    """Block that the tiles of a row fit into; the same for many sizes, as each is a compilation."""
    return max(triton.next_power_of_2(triton.cdiv(vocab, tile)), 32)


def builds(shape: ModelShape) -> list[Build]:
    found = []
    for penalties in (False, True):
        signature, constexprs = logits_arguments(shape, penalties)
        signature |= {"tiles": "*fp32", "tile_tokens": "*i32"}
        found.append(
            Build(
                name=f"redraw_tiles{' with penalties' if penalties else ''}",
                kernel=redraw_tiles,
                signature=signature,
                constexprs={**constexprs, "TILE": TILE, "TILES_BLOCK": tiles_block(shape.vocab, TILE)},
                aligned=aligned_arguments(signature, shape),
                num_warps=WARPS,
                num_stages=1,
                options={"enable_fp_fusion": False},
            )
        )
    return found
