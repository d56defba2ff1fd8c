"""Which samples a step holds, how they are packed into rows without padding, and which rank computes which row.

A row is samples laid end to end, at most `row_tokens` of them; positions start again with every sample, and attention
does not cross `sequence_start`. Packing changes neither loss nor gradient, only what a step costs.

Rows are made by best fit decreasing: the longest sample first, each into the fullest row that still takes it. A row's
time is `sum(L) + quadratic * sum(L^2)` over its samples, the second part attention's. The bound on that time is then
brought down by bisection (MULTIFIT: Coffman, Garey and Johnson, 1978) as far as the number of rows allows, so that no
rank waits long for another, and the longest row, which sets the peak of memory, is no longer than it must be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from s1engine.train.examples import Example

QUADRATIC = 1e-5
"""Attention's cost of a sample of L tokens is `QUADRATIC * L^2` tokens' worth of everything else.

Per layer and token the products with P weights take 2 P operations, and attention with on average L / 2 keys 2 L h, of
h = heads * head_dim: the ratio is h / P, 1.0e-5 for Qwen2.5-32B (5120 / 488M), 6e-5 for 0.5B (896 / 14.9M)."""

BISECTIONS = 20


@dataclass(frozen=True)
class PackedRow:
    """S samples of T tokens in all, laid end to end.

    token_ids       int64 [T]
    positions       int64 [T]: from 0 in every sample
    sequence_start  int32 [S + 1]: sample s is sequence_start[s] to sequence_start[s + 1]; from 0 to T
    targets         int64 [T]: what the token after t, of the same sample, is to be predicted as
    weights         float32 [T]: of that prediction in the loss; target and weight are 0 at a sample's last token
    """

    token_ids: Tensor
    positions: Tensor
    sequence_start: Tensor
    targets: Tensor
    weights: Tensor


def pack(examples: Sequence[Example]) -> PackedRow:
    """One row of these samples, in their order.

    None at all gives a row of one token 0 without weight: a rank that has no samples left must still run the model,
    since the others wait for it wherever they communicate.
    """
    if not examples:
        nothing = torch.zeros(1, dtype=torch.int64)
        return PackedRow(nothing, nothing, torch.tensor([0, 1], dtype=torch.int32), nothing, torch.zeros(1))
    lengths = [len(example.token_ids) for example in examples]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    last = starts[1:] - 1
    targets = np.roll(np.concatenate([example.targets for example in examples]).astype(np.int64), -1)
    weights = np.roll(np.concatenate([example.weights for example in examples]).astype(np.float32), -1)
    targets[last], weights[last] = 0, 0
    return PackedRow(
        token_ids=torch.from_numpy(np.concatenate([example.token_ids for example in examples]).astype(np.int64)),
        positions=torch.from_numpy(np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)),
        sequence_start=torch.from_numpy(starts.astype(np.int32)),
        targets=torch.from_numpy(targets),
        weights=torch.from_numpy(weights),
    )


def plan_rows(
    lengths: Sequence[int], row_tokens: int, ranks: int, quadratic: float = QUADRATIC
) -> list[list[list[int]]]:
    """The rows of one optimizer step: `[rank][row]` is a list of indices into `lengths`, ascending.

    Every index is in one row, a row holds at most `row_tokens` tokens, and every rank has the same number of rows, the
    fewest that best fit decreasing finds. Where samples do not suffice for all ranks a row may be empty (see `pack`).
    Rows of like cost stand at the same place on all ranks, since with ZeRO 3 ranks wait for each other in every row,
    and the totals of two ranks differ by no more than two rows at one place do. A pure function of its arguments.

    Raises ValueError for a sample longer than `row_tokens`, and for numbers that cannot be.
    """
    for name, value in (("row_tokens", row_tokens), ("ranks", ranks), ("the number of samples", len(lengths))):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if not 0 <= quadratic < float("inf"):
        raise ValueError(f"quadratic={quadratic}: it must be a number of at least 0")
    if min(lengths) < 1:
        raise ValueError(f"sample {list(lengths).index(min(lengths))} has no tokens; leave it out")
    if max(lengths) > row_tokens:
        raise ValueError(
            f"sample {list(lengths).index(max(lengths))} has {max(lengths)} tokens, more than row_tokens={row_tokens}; "
            f"raise row_tokens, or drop it by max_tokens={row_tokens}"
        )
    costs = [length + quadratic * length * length for length in lengths]
    rows = _even_rows(lengths, costs, row_tokens, ranks)
    return _assign(rows, [sum(costs[i] for i in row) for row in rows], ranks)


def _even_rows(lengths: Sequence[int], costs: Sequence[float], row_tokens: int, ranks: int) -> list[list[int]]:
    """Rows by best fit decreasing, a multiple of `ranks` of them, under the lowest bound on cost that was found."""
    # No two rows of best fit are both at most half full, so this many are always enough.
    most = -(-2 * sum(lengths) // row_tokens)
    best = _best_fit(lengths, costs, row_tokens, float("inf"), most)
    assert best is not None
    count = -(-len(best) // ranks) * ranks
    low = max(sum(costs) / count, max(costs))
    high = max(sum(costs[i] for i in row) for row in best)
    best += [[] for _ in range(count - len(best))]
    for _ in range(BISECTIONS):
        if high <= low * 1.001:
            break
        bound = (low + high) / 2
        found = _best_fit(lengths, costs, row_tokens, bound, count)
        if found is None:
            low = bound
        else:
            best = found + [[] for _ in range(count - len(found))]
            high = max(sum(costs[i] for i in row) for row in best)
    return best


def _best_fit(
    lengths: Sequence[int], costs: Sequence[float], row_tokens: int, bound: float, most: int
) -> list[list[int]] | None:
    """At most `most` rows of at most `row_tokens` tokens and a cost of `bound`; None where they do not suffice."""
    tokens, spent = np.zeros(most, np.int64), np.zeros(most)
    rows: list[list[int]] = [[] for _ in range(most)]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        # Of the rows that take it the fullest, of equally full ones the first; an unused row is the emptiest of all.
        fits = (tokens + lengths[i] <= row_tokens) & (spent + costs[i] <= bound)
        row = int(np.where(fits, tokens, -1).argmax())
        if not fits[row]:
            return None
        rows[row].append(i)
        tokens[row] += lengths[i]
        spent[row] += costs[i]
    return [sorted(row) for row in rows if row]


def _assign(rows: list[list[int]], costs: list[float], ranks: int) -> list[list[list[int]]]:
    """Costliest rows first, `ranks` at a time; of these the costliest goes to the rank that has had the least."""
    plan: list[list[list[int]]] = [[] for _ in range(ranks)]
    totals = [0.0] * ranks
    order = sorted(range(len(rows)), key=lambda r: (-costs[r], r))
    for start in range(0, len(rows), ranks):
        least_first = sorted(range(ranks), key=lambda rank: (totals[rank], rank))
        for rank, row in zip(least_first, order[start : start + ranks], strict=True):
            plan[rank].append(rows[row])
            totals[rank] += costs[row]
    return plan


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Optimizer steps of an epoch, the last of them smaller where `batch_size` does not divide `count`.

    As s1 trained: 1,000 samples, 16 a step and 5 epochs are 63 * 5 = 315 steps.
    """
    for name, value in (("count", count), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value}: it must be at least 1")
    return -(-count // batch_size)


def step_samples(count: int, batch_size: int, seed: int, step: int, shuffle: bool = True) -> np.ndarray:
    """The samples of optimizer step `step` (from 0), indices below `count`, int64.

    Every epoch is another permutation, or the order of the file where `shuffle` is off. A pure function of its
    arguments, so that a run resumes exactly knowing no more than the number of its step.
    """
    if step < 0 or seed < 0:
        raise ValueError(f"step={step}, seed={seed}: both must be at least 0")
    epoch, place = divmod(step, steps_per_epoch(count, batch_size))
    order = np.arange(count)
    if shuffle:
        # Sorted by raw bits, which no version of numpy changes; what its `permutation` does with them may change.
        order = np.argsort(np.random.PCG64([seed, epoch]).random_raw(count), kind="stable")
    return order[place * batch_size : (place + 1) * batch_size]
