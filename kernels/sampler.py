"""Sampling by Gumbel-max with exact truncation and without a sort.

The token is argmax(x / T + gumbel) over the tokens that truncation keeps, the lowest id among equals. Truncation, in
this order, on probabilities of x / T:
  min-p   keeps tokens at least min_p times as probable as the most probable one
  top-k   keeps tokens with fewer than k tokens strictly above them
  top-p   keeps tokens with less than top_p of the mass that is left strictly above them
A token is "above" another by its logit, so equal logits are kept or dropped together. The most probable token always
stays.

Top-p needs no sort: draw from everything, and if too much mass lies above the drawn token, then it and all below are
outside the nucleus, so draw again from what is strictly above. The argmax of one noise vector over a subset is
Gumbel-max on that subset, so this gives the very token that masking first would. The first draw stands with probability
top_p or more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from s1engine.kernels.philox import MAX_GUMBEL, gumbel, gumbel_approximate, gumbel_at, philox_words
from s1engine.kernels.registry import register

# Tokens are looked at in groups. Whole groups are skipped where none of their tokens can win.
_GROUP = 64

# A vocabulary of so few groups is looked at as a whole.
_FEW_GROUPS = 64

# Elements of candidates that are worked on at a time: their intermediates stay in the cache.
_CHUNK_ELEMENTS = 1 << 17

# Smaller temperatures sample as this one does: any two different logits are then further apart than noise can bridge.
_MIN_TEMPERATURE = 2.0**-60

# Approximate scores closer than this, absolutely and relatively, are compared exactly.
_ABSOLUTE_SLACK = 1e-4
_RELATIVE_SLACK = 1e-6


@dataclass(slots=True)
class SamplingBatch:
    """How each of R rows is sampled. Tensors are [R], in the order of the rows.

    temperature  float32, 0 is greedy
    top_k        int64, 0 is off
    top_p        float32 in (0, 1], 1 is off
    min_p        float32 in [0, 1], 0 is off
    seeds        int64, of the sample
    positions    int64, of the token to sample in its whole sequence
    all_greedy, any_top_k, any_top_p, any_min_p   what the host knows of these tensors, to skip work
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    positions: Tensor
    all_greedy: bool
    any_top_k: bool
    any_top_p: bool
    any_min_p: bool


def sample(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """One token a row.

    logits  float32 [R, V], with bias, bans and penalties applied; finite or -inf; not modified
    Returns int64 [R]. A row with nothing but -inf gives token 0.
    """
    return _sample_op(
        logits, batch.temperature, batch.top_k, batch.top_p, batch.min_p, batch.seeds, batch.positions,
        batch.all_greedy, batch.any_top_k, batch.any_top_p, batch.any_min_p,
    )  # fmt: skip


def processed_logits(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """The logits that `sample` draws from: divided by the temperature, dropped tokens -inf. Greedy rows as they are.

    logits  float32 [R, V]; returns the same shape
    """
    out = logits.clone()
    for row in torch.nonzero(_is_sampled(batch.temperature, logits.amax(1))).flatten().tolist():
        one = slice(row, row + 1)
        temperature = batch.temperature[one].clamp_min(_MIN_TEMPERATURE)
        kept = logits[one].clone()
        kept.masked_fill_(kept < _min_p_threshold(kept.amax(1), temperature, batch.min_p[one]), -math.inf)
        if batch.any_top_k:
            kept.masked_fill_(kept < _top_k_threshold(kept, batch.top_k[one]), -math.inf)
        if batch.top_p[row] < 1:
            kept.masked_fill_(kept < _top_p_threshold(kept, temperature, batch.top_p[one]), -math.inf)
        torch.div(kept, temperature, out=out[one])
    return out


def _sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    all_greedy: bool,
    any_top_k: bool,
    any_top_p: bool,
    any_min_p: bool,
) -> Tensor:
    num_groups = -(-logits.size(1) // _GROUP)
    if logits.size(1) % _GROUP:
        logits = functional.pad(logits, (0, num_groups * _GROUP - logits.size(1)), value=-math.inf)
    groups = logits.view(len(logits), num_groups, _GROUP)
    group_max = groups.amax(2)
    out = _first_argmax(groups, group_max)
    if all_greedy:
        return out

    rows = torch.nonzero(_is_sampled(temperature, group_max.amax(1))).flatten()
    if not len(rows):
        return out
    group_max, seeds, positions = group_max[rows], seeds[rows], positions[rows]
    temperature, top_p, min_p = temperature[rows].clamp_min(_MIN_TEMPERATURE), top_p[rows], min_p[rows]
    top_k = top_k[rows].masked_fill(top_k[rows] >= logits.size(1), 0)
    top = group_max.amax(1)

    # `floor`: tokens below it cannot be drawn, for one reason or another, and need not be looked at.
    best = top / temperature + gumbel_at(seeds, positions, out[rows])
    reach = best - MAX_GUMBEL - _ABSOLUTE_SLACK - _RELATIVE_SLACK * best.abs()
    floor = reach * temperature
    limit = torch.full_like(top, math.inf, dtype=torch.float64)
    if any_top_p:
        # Top-p counts shares of what min-p and top-k leave: all of that has to be looked at, or summed up beforehand.
        nucleus, few_left = top_p < 1, (top_k > 0) | (min_p > 0) | (num_groups <= _FEW_GROUPS)
        floor.masked_fill_(nucleus & few_left, -math.inf)
        for index in torch.nonzero(nucleus & ~few_left).flatten().tolist():
            one = slice(index, index + 1)
            total = _row_sum(_mass(groups[int(rows[index])].view(1, -1) / temperature[one]))
            limit[one] = total * top_p[one].double()
            # Tokens of less than this mass hold less than 1 - top_p together, so none of them is in the nucleus.
            least = (total - limit[one]) / logits.size(1)
            bound = top[one] + temperature[one] * least.log() - _ABSOLUTE_SLACK * temperature[one]
            floor[one] = torch.maximum(floor[one], (bound - _RELATIVE_SLACK * bound.abs()).float())
    if any_min_p:
        floor = torch.maximum(floor, _min_p_threshold(top, temperature, min_p))
    if any_top_k:
        floor = torch.maximum(floor, _top_k_threshold(group_max, top_k))

    for part in _chunks((group_max >= floor.unsqueeze(1)).sum(1).tolist()):
        values, tokens = _candidates(groups, rows[part], group_max[part], floor[part])
        if any_min_p:
            values.masked_fill_(values < floor[part].unsqueeze(1), -math.inf)
        if any_top_k:
            values.masked_fill_(values < _top_k_threshold(values, top_k[part]).unsqueeze(1), -math.inf)
        out[rows[part]] = _draw(
            values, tokens, temperature[part], top_p[part], limit[part], seeds[part], positions[part], any_top_p
        )
    return out


def _draw(
    values: Tensor,
    tokens: Tensor,
    temperature: Tensor,
    top_p: Tensor,
    limit: Tensor,
    seeds: Tensor,
    positions: Tensor,
    any_top_p: bool,
) -> Tensor:
    """Draw from candidates [R, N] with logits `values` (-inf: none) in whole counters of four consecutive `tokens`.

    limit  float64 [R], mass that may lie above a token; inf: top_p of that of the candidates
    """
    scaled = values / temperature.unsqueeze(1)
    words = philox_words(seeds.unsqueeze(1), positions.unsqueeze(1), tokens[:, ::4] >> 2).view(values.shape)
    scores = gumbel_approximate(words).add_(scaled)
    drawn = _exact_argmax(scores, scaled, words)
    if any_top_p:
        mass = _mass(scaled)
        limit = torch.where(limit.isinf() & (top_p < 1), _row_sum(mass) * top_p.double(), limit)
        while True:
            at_most_drawn = values <= values.gather(1, drawn)
            above = _row_sum(mass.masked_fill(at_most_drawn, 0.0))
            rejected = (above >= limit) & (above > 0)
            if not rejected.any():
                break
            scores.masked_fill_(at_most_drawn & rejected.unsqueeze(1), -math.inf)
            drawn = _exact_argmax(scores, scaled, words)
    return tokens.gather(1, drawn).squeeze(1)


def _exact_argmax(scores: Tensor, scaled: Tensor, words: Tensor) -> Tensor:
    """Index [R, 1] of each row's best candidate: the approximate `scores` leave some in question, exact ones decide."""
    best = scores.amax(1, keepdim=True)
    in_question = scores >= best - _ABSOLUTE_SLACK - _RELATIVE_SLACK * best.abs()
    row, index = torch.nonzero(in_question).unbind(1)
    exact = scaled[row, index] + gumbel(words[row, index])
    winning = exact.new_full((len(scores),), -math.inf).scatter_reduce_(0, row, exact, "amax")
    wins = exact == winning[row]
    first = index.new_full((len(scores),), scores.size(1)).scatter_reduce_(0, row[wins], index[wins], "amin")
    return first.unsqueeze(1)


def _candidates(groups: Tensor, rows: Tensor, group_max: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and ids, both [R, N], of the tokens in groups that reach the floor; -inf fills up short rows.

    groups  [.., G, 64] of all rows, of which `rows` [R] are looked at; group_max [R, G] and floor [R] are theirs
    """
    reaches = group_max >= floor.unsqueeze(1)
    counts = reaches.sum(1, keepdim=True)
    group = torch.nonzero(reaches)[:, 1]
    place = torch.arange(int(counts.max()), device=rows.device)
    group = group[(counts.cumsum(0) - counts + place).clamp_(max=len(group) - 1)]
    values = groups[rows.unsqueeze(1), group]
    values[place >= counts] = -math.inf
    tokens = group.unsqueeze(2) * _GROUP + torch.arange(_GROUP, device=rows.device)
    return values.flatten(1), tokens.flatten(1)


def _chunks(counts: list[int]) -> Iterator[slice]:
    """Split rows with `counts` candidate groups into runs of at most _CHUNK_ELEMENTS, all padded to the longest."""
    start = longest = 0
    for end, count in enumerate(counts):
        if end > start and max(longest, count) * (end + 1 - start) * _GROUP > _CHUNK_ELEMENTS:
            yield slice(start, end)
            start, longest = end, 0
        longest = max(longest, count)
    yield slice(start, len(counts))


def _first_argmax(groups: Tensor, group_max: Tensor) -> Tensor:
    """Index [R] of the first maximum of [R, G, 64]. torch vectorises the maximum, not its index: so the group first."""
    group = group_max.argmax(1)
    row = torch.arange(len(group), device=group.device)
    return group * _GROUP + groups[row, group].argmax(1)


def _is_sampled(temperature: Tensor, top: Tensor) -> Tensor:
    """Whether a row is sampled [R]. One without a finite maximum has no distribution to sample from."""
    return (temperature > 0) & top.isfinite()


def _min_p_threshold(top: Tensor, temperature: Tensor, min_p: Tensor) -> Tensor:
    """The lowest logit that min-p lets pass, float32 [R]; `top` is the highest."""
    return (top + temperature * min_p.double().log()).float()


def _top_k_threshold(values: Tensor, top_k: Tensor) -> Tensor:
    """The k-th highest of values [R, N], float32 [R]; -inf where that is off or where there are fewer."""
    size = values.size(1)
    largest = int(top_k.masked_fill(top_k > size, 0).max())
    if largest == 0:
        return torch.full_like(values[:, 0], -math.inf)
    kth = values.topk(largest, dim=1).values.gather(1, (top_k.clamp(1, largest) - 1).unsqueeze(1)).squeeze(1)
    return kth.where((top_k > 0) & (top_k <= size), -math.inf)


def _top_p_threshold(values: Tensor, temperature: Tensor, top_p: Tensor) -> Tensor:
    """The lowest of values [1, N] that top-p < 1 lets pass, float32 [1]."""
    mass = _mass(values / temperature)
    total = _row_sum(mass)
    limit = total * top_p.double()
    # Tokens of less than this mass hold less than 1 - top_p together, so none of them is in the nucleus.
    relevant = int((mass >= (total - limit) / values.size(1)).sum())
    ordered = values.topk(max(relevant, 1), dim=1).values
    mass = _mass(ordered / temperature)
    kept = (mass.cumsum(1) - mass < limit).sum(1).clamp_min_(1)
    return ordered[0, kept - 1]


def _mass(scaled: Tensor) -> Tensor:
    """Probability relative to the row's most probable token, float64."""
    return (scaled.double() - scaled.amax(1, keepdim=True)).exp_()


def _row_sum(mass: Tensor) -> Tensor:
    """Sums of rows [R, N], in an order that neither the other rows nor the number of threads change."""
    mass = functional.pad(mass, (0, -mass.size(1) % _GROUP)) if mass.size(1) % _GROUP else mass
    return mass.view(len(mass), -1, _GROUP).sum(2).cumsum(1)[:, -1]


def _fake_sample(logits: Tensor, temperature: Tensor, *_: object) -> Tensor:
    return logits.new_empty(logits.size(0), dtype=torch.int64)


_sample_op = register(
    "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seeds, "
    "Tensor positions, bool all_greedy, bool any_top_k, bool any_top_p, bool any_min_p) -> Tensor",
    _sample,
    _fake_sample,
)
