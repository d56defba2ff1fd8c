"""First sweep of the sampler on a GPU: edits, noise, and the best that each tile of the vocabulary has to offer.

A row's vocabulary is cut into tiles of a fixed size and into groups of 64 tokens, whatever the batch: what a program
computes depends on its row alone.
"""

import triton
import triton.language as tl

from s1engine.kernels.logit_edits_triton import (
    active_slot,
    aligned_arguments,
    edit_logits,
    float_field,
    logits_arguments,
    raw_logits,
    token_ids,
)
from s1engine.kernels.slot_layout import FIELD_WIDTH, Field
from s1engine.kernels.triton_build import Build, ModelShape

TILE = 4096  # tokens of one program; results do not depend on it but for the rounding of sums
GROUP = 64
WARPS = 8

# Columns of what the sweeps leave of each tile, float32 [rows, TILE_COLUMNS, tiles].
RAW_MAX = tl.constexpr(0)  # of the logits before all edits
RAW_MASS = tl.constexpr(1)  # sum of exp(logit - RAW_MAX)
TOP = tl.constexpr(2)  # the highest edited logit
MASS = tl.constexpr(3)  # sum of exp((edited logit - TOP) / temperature)
SCORE = tl.constexpr(4)  # the best of edited logit / temperature + noise
VALUE = tl.constexpr(5)  # the edited logit of its token
ABOVE = tl.constexpr(6)  # mass strictly above the drawn token
KEPT = tl.constexpr(7)  # mass that min-p keeps
NEXT_SCORE = tl.constexpr(8)  # the best of those that could replace the drawn token
NEXT_VALUE = tl.constexpr(9)
COLUMNS = tl.constexpr(10)
TILE_COLUMNS = 10

# The tokens of SCORE and NEXT_SCORE, int32 [rows, 2, tiles].
DRAWN = tl.constexpr(0)
NEXT = tl.constexpr(1)

_GROUP = tl.constexpr(GROUP)
NO_TOKEN = tl.constexpr(2**31 - 1)
_MIN_TEMPERATURE = tl.constexpr(2.0**-60)
_LARGEST_UNIFORM = tl.constexpr(1.0 - 2.0**-24)

_FIELD_WIDTH = tl.constexpr(FIELD_WIDTH)
_LENGTH = tl.constexpr(int(Field.LENGTH))
_SEED = tl.constexpr(int(Field.SEED_LOW) // 2)
_TEMPERATURE = tl.constexpr(int(Field.TEMPERATURE))


@triton.jit
def load_temperature(fields, slot):
    """(whether the row is sampled, temperature to divide by: 1 for a greedy row)."""
    # Compared as bits: a device may take a temperature that is not a normal float for 0.
    sampled = tl.load(fields + slot.to(tl.int64) * _FIELD_WIDTH + _TEMPERATURE) > 0
    temperature = tl.maximum(float_field(fields, slot, _TEMPERATURE), _MIN_TEMPERATURE)
    return sampled, tl.where(sampled, temperature, 1.0)


@triton.jit
def gumbel(words):
    """-log(-log(1 - u)) in float32 of random words uint32; off by less than 1e-6 times 1 + its size."""
    u = tl.minimum((words.to(tl.float32) + 0.5) * (2.0**-32), _LARGEST_UNIFORM)
    # -log(1 - u) without losing a small u: what 1 - u loses by rounding, the quotient gives back.
    rest = 1.0 - u
    lost = 1.0 - rest
    exponential = tl.where(lost == 0.0, u, -tl.log(rest) * (u / tl.where(lost == 0.0, 1.0, lost)))
    return -tl.log(exponential)


@triton.jit
def gumbel_noise(fields, slot, quads):
    """Noise float32 [Q, 4] of the tokens of quads int32 [Q] at the slot's next position: that of philox.py."""
    seed = tl.load(fields.to(tl.pointer_type(tl.int64)) + slot.to(tl.int64) * (_FIELD_WIDTH // 2) + _SEED)
    zeros = tl.zeros_like(quads)
    position = zeros + tl.load(fields + slot.to(tl.int64) * _FIELD_WIDTH + _LENGTH)
    w0, w1, w2, w3 = tl.philox(seed, quads, position, zeros, zeros)
    return gumbel(tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape([quads.shape[0], 4]))


@triton.jit
def best_of(scores, ids, values):
    """(highest score, lowest id that has it, value of that id), scalars. NO_TOKEN where all scores are NaN."""
    score = tl.max(scores)
    token = tl.min(tl.where(scores == score, ids, NO_TOKEN))
    return score, token, tl.max(tl.where(ids == token, values, -float("inf")))


@triton.jit
def relative_mass(scaled, top):
    """exp(scaled - top); zeros where top is -inf, that is where there is nothing at all."""
    return tl.exp(scaled - tl.where(top == -float("inf"), 0.0, top))


@triton.jit
def score_tiles(
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
    TILE: tl.constexpr,
):
    """Program (r, s) fills columns RAW_MAX to VALUE of tile s of row r, and the maxima of its groups."""
    row = tl.program_id(0)
    tile = tl.program_id(1)
    slot = active_slot(rows, fields, row)
    if slot < 0:
        return
    num_tiles = tl.num_programs(1)
    out = tiles + row.to(tl.int64) * COLUMNS * num_tiles + tile
    quads = tile * (TILE // 4) + tl.arange(0, TILE // 4)
    source = (
        logits, valid_words, fields, programs, states, bias_ids, bias_values, prompt_mask, output_counts, vocab
    )  # fmt: skip
    raw = raw_logits(logits, valid_words, vocab, row, quads)
    x = edit_logits(source, slot, quads, raw)
    raw_max = tl.max(raw)
    tl.store(out + RAW_MAX * num_tiles, raw_max)
    tl.store(out + RAW_MASS * num_tiles, tl.sum(relative_mass(raw, raw_max)))

    num_groups = (vocab + _GROUP - 1) // _GROUP
    group = tile * (TILE // _GROUP) + tl.arange(0, TILE // _GROUP)
    maxima = tl.max(tl.max(x, axis=1).reshape([TILE // _GROUP, _GROUP // 4]), axis=1)
    tl.store(group_max + row.to(tl.int64) * num_groups + group, maxima, mask=group < num_groups)

    sampled, temperature = load_temperature(fields, slot)
    top = tl.max(maxima)
    scaled = tl.div_rn(x, temperature)
    tl.store(out + TOP * num_tiles, top)
    tl.store(out + MASS * num_tiles, tl.sum(relative_mass(scaled, tl.div_rn(top, temperature))))
    scores = scaled
    if sampled:
        scores += gumbel_noise(fields, slot, quads)
    score, token, value = best_of(scores, token_ids(quads), x)
    tl.store(out + SCORE * num_tiles, score)
    tl.store(out + VALUE * num_tiles, value)
    tl.store(tile_tokens + (row.to(tl.int64) * 2 + DRAWN) * num_tiles + tile, token)


def builds(shape: ModelShape) -> list[Build]:
    found = []
    for penalties in (False, True):
        signature, constexprs = logits_arguments(shape, penalties)
        signature |= {"tiles": "*fp32", "tile_tokens": "*i32", "group_max": "*fp32"}
        found.append(
            Build(
                name=f"score_tiles{' with penalties' if penalties else ''}",
                kernel=score_tiles,
                signature=signature,
                constexprs={**constexprs, "TILE": TILE},
                aligned=aligned_arguments(signature, shape),
                num_warps=WARPS,
                num_stages=1,
                options={"enable_fp_fusion": False},
            )
        )
    return found
