"""Truncation of the sampler on a GPU: the token of one row, from what its two sweeps left of each tile.

Where they do not settle it, and for top-k, only those groups of tokens are looked at that can still matter: what counts
lies at a floor or above, and so does the maximum of its group.
"""

import triton
import triton.language as tl

from s1engine.kernels.logit_edits_triton import edited_logits, token_ids
from s1engine.kernels.sampler_redraw_triton import load_drawn, min_p_threshold
from s1engine.kernels.sampler_scores_triton import (
    ABOVE,
    COLUMNS,
    GROUP,
    KEPT,
    NEXT,
    NEXT_SCORE,
    NEXT_VALUE,
    best_of,
    gumbel_noise,
    relative_mass,
)
from s1engine.kernels.triton_build import Build, ModelShape

SEARCH_GROUPS = 128  # groups searched at a time; as many are searched in registers
SWEEP_GROUPS = 64  # groups drawn from at a time

_GROUP = tl.constexpr(GROUP)
_GROUP_QUADS = tl.constexpr(GROUP // 4)


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
    settled = False
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
            first = False
    return token


def groups_block(vocab: int) -> int:
    """Block that the groups of a row fit into; the same for many sizes, as each is a compilation."""
    return max(triton.next_power_of_2(triton.cdiv(vocab, GROUP)), 256)


def builds(shape: ModelShape) -> list[Build]:
    """None: these functions are part of the kernel that calls them."""
    return []
