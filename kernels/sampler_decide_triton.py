"""The decision of the sampler on a GPU: one program a row chooses the token and writes it to its slot.

Where the two sweeps do not settle it, and for top-k, the program looks only at those groups of tokens that can still
matter: what counts lies at a floor or above, and so does the maximum of its group.
"""

import triton
import triton.language as tl

from s1engine.kernels.logit_edits_triton import (
    active_slot,
    aligned_arguments,
    edited_logits,
    logits_arguments,
    machine_bans,
    stop_bans,
    token_ids,
)
from s1engine.kernels.sampler_redraw_triton import load_drawn, load_mass, load_truncation, min_p_threshold, tiles_block
from s1engine.kernels.sampler_scores_triton import (
    ABOVE,
    COLUMNS,
    DRAWN,
    GROUP,
    KEPT,
    MASS,
    NEXT,
    NEXT_SCORE,
    NEXT_VALUE,
    RAW_MASS,
    RAW_MAX,
    SCORE,
    TILE,
    TOP,
    VALUE,
    best_of,
    gumbel_noise,
    load_temperature,
    relative_mass,
)
from s1engine.kernels.slot_layout import FIELD_WIDTH, MAX_BIASES, RESULT_WIDTH, Field, Result
from s1engine.kernels.slot_step_triton import advance_slot, store_idle_result
from s1engine.kernels.triton_build import Build, ModelShape

SEARCH_GROUPS = 128  # groups searched at a time; as many are searched in registers
SWEEP_GROUPS = 64  # groups drawn from at a time
WARPS = 8

_GROUP = tl.constexpr(GROUP)
_GROUP_QUADS = tl.constexpr(GROUP // 4)
_FIELD_WIDTH = tl.constexpr(FIELD_WIDTH)
_MAX_BIASES = tl.constexpr(MAX_BIASES)
_RESULT_WIDTH = tl.constexpr(RESULT_WIDTH)
_RESULT_LOGPROB = tl.constexpr(int(Result.LOGPROB))
_RESULT_RANK = tl.constexpr(int(Result.RANK))
_NUM_BIASES = tl.constexpr(int(Field.NUM_BIASES))
_WANTS_LOGPROB = tl.constexpr(int(Field.WANTS_LOGPROB))


@triton.jit
def ordered_keys(x):
    """int32 keys in the order of float32 values; equal values have equal keys."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def middle_key(low, high):
    """A key above low and not above high, which is above low itself."""
    return (low + (high.to(tl.int64) - low + 1) // 2).to(tl.int32)


@triton.jit
def kth_key(keys, k, low, high):
    """The highest key from low to high that at least k of the keys reach; low if there is none."""
    while low < high:
        middle = middle_key(low, high)
        enough = tl.sum((keys >= middle).to(tl.int32)) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low


@triton.jit
def load_candidates(source, row, slot, groups, start, count, GROUPS: tl.constexpr):
    """(quads, edited logits, which of them count) of a list of `count` groups, from `start` on: [Q], [Q, 4], [Q, 1]"""
    i = tl.arange(0, GROUPS * _GROUP_QUADS)
    place = start + i // _GROUP_QUADS
    given = place < count
    quads = tl.load(groups + place, mask=given, other=0) * _GROUP_QUADS + i % _GROUP_QUADS
    x = edited_logits(source, row, slot, quads)
    return quads, x, given[:, None]


@triton.jit
def kth_candidate(source, row, slot, groups, count, k, low, high, SEARCH_GROUPS: tl.constexpr):
    """The key of the k-th highest edited logit in a list of groups, as in `kth_key`."""
    if count <= SEARCH_GROUPS:
        _quads, x, given = load_candidates(source, row, slot, groups, 0, count, SEARCH_GROUPS)
        low = kth_key(ordered_keys(tl.where(given, x, -float("inf"))), k, low, high)
    else:
        while low < high:
            middle = middle_key(low, high)
            reaching = 0
            start = 0
            while start < count:
                _quads, x, given = load_candidates(source, row, slot, groups, start, count, SEARCH_GROUPS)
                reaching += tl.sum((given & (ordered_keys(x) >= middle)).to(tl.int32))
                start += SEARCH_GROUPS
            low = tl.where(reaching >= k, middle, low)
            high = tl.where(reaching >= k, high, middle - 1)
    return low


@triton.jit
def draw_candidate(source, row, slot, groups, count, low, temperature, top, SWEEP_GROUPS: tl.constexpr):
    """(token, its edited logit, mass) of the draw from those in a list of groups whose key is `low` or above.

    (-1, -inf, 0) where there are none. Their mass is relative to that of the logit `top`.
    """
    mass = 0.0
    score = -float("inf")
    token = -1
    value = -float("inf")
    start = 0
    while start < count:
        quads, x, given = load_candidates(source, row, slot, groups, start, count, SWEEP_GROUPS)
        in_line = given & (ordered_keys(x) >= low)
        if tl.max(in_line.to(tl.int32)) > 0:
            scaled = tl.div_rn(x, temperature)
            mass += tl.sum(tl.where(in_line, relative_mass(scaled, tl.div_rn(top, temperature)), 0.0))
            noisy = tl.where(in_line, scaled + gumbel_noise(source[2], slot, quads), -float("inf"))
            best, best_token, best_value = best_of(noisy, token_ids(quads), x)
            better = best > score
            score = tl.where(better, best, score)
            token = tl.where(better, best_token, token)
            value = tl.where(better, best_value, value)
        start += SWEEP_GROUPS
    return token, value, mass


@triton.jit
def truncated_token(
    source, row, slot, sweep, group_max, groups, temperature, top, mass, token, value, top_k, top_p, min_p,
    TILES_BLOCK: tl.constexpr, GROUPS_BLOCK: tl.constexpr, SEARCH_GROUPS: tl.constexpr, SWEEP_GROUPS: tl.constexpr,
):  # fmt: skip
    """The token of a row with top-k, top-p or min-p, of which the first sweep drew `token`, whose logit is `value`."""
    tiles, _, num_tiles = sweep
    vocab = source[9]
    num_groups = (vocab + _GROUP - 1) // _GROUP
    group = tl.arange(0, GROUPS_BLOCK)
    maxima = tl.load(group_max + row.to(tl.int64) * num_groups + group, mask=group < num_groups, other=-float("inf"))
    keys = ordered_keys(maxima)
    threshold = min_p_threshold(top, temperature, min_p)

    # What has a key below `low` is out. `limit` is the mass from which on what lies below it is out.
    low = ordered_keys(threshold)
    limit = float("inf")
    first = top_k > 0
    settled = top_k < 0
    if first:
        # The k-th highest group maximum is at most the k-th highest logit.
        low = kth_key(keys, top_k, low, ordered_keys(top))
    else:
        tile = tl.arange(0, TILES_BLOCK)
        columns = tiles + row.to(tl.int64) * COLUMNS * num_tiles + tile
        above = tl.sum(tl.load(columns + ABOVE * num_tiles, mask=tile < num_tiles, other=0.0), axis=0)
        kept = tl.sum(tl.load(columns + KEPT * num_tiles, mask=tile < num_tiles, other=0.0), axis=0)
        limit = tl.where(top_p < 1, tl.where(min_p > 0, kept, mass) * top_p, limit)
        next_token, next_value = load_drawn(sweep, row, vocab, NEXT_SCORE, NEXT_VALUE, NEXT, TILES_BLOCK)
        stands = (value >= threshold) & (((above >= limit) & (above > 0)) == 0)
        token = tl.where(stands, token, next_token)
        settled = stands | (top_p >= 1)
        low = ordered_keys(next_value) + 1

    if settled == 0:
        groups += row.to(tl.int64) * num_groups
        reaching = ((keys >= low) & (group < num_groups)).to(tl.int32)
        count = tl.sum(reaching, axis=0)
        tl.store(groups + tl.cumsum(reaching, axis=0) - 1, group, mask=reaching != 0)
        tl.debug_barrier()
        if first:
            low = kth_candidate(source, row, slot, groups, count, top_k, low, ordered_keys(top), SEARCH_GROUPS)
        # A round draws from what is at `low` or above. How much mass that is tells whether the token drawn before,
        # which lies right below, stands.
        while settled == 0:
            next_token, next_value, mass = draw_candidate(
                source, row, slot, groups, count, low, temperature, top, SWEEP_GROUPS
            )
            stands = (first == 0) & (((mass >= limit) & (mass > 0)) == 0)
            settled = stands | (next_token < 0) | (first & (top_p >= 1))
            token = tl.where(stands | (next_token < 0), token, next_token)
            limit = tl.where(first & (top_p < 1), mass * top_p, limit)
            low = ordered_keys(next_value) + 1
            first = first & (top_k < 0)
    return token


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


def groups_block(vocab: int) -> int:
    """Block that the groups of a row fit into; the same for many sizes, as each is a compilation."""
    return max(triton.next_power_of_2(triton.cdiv(vocab, GROUP)), 256)


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
            "SEARCH_GROUPS": SEARCH_GROUPS,
            "SWEEP_GROUPS": SWEEP_GROUPS,
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
