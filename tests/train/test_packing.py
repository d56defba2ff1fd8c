"""Rows of a step: every sample once, within the budget, evenly over the ranks, and each step known by its number."""

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from conditions import data_folder
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from s1engine.train.examples import Example
from s1engine.train.packing import QUADRATIC, pack, plan_rows, step_samples, steps_per_epoch

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=60)
COEFFICIENTS = st.sampled_from([0.0, QUADRATIC, 0.01, 1.0])


def example(n: int, seed: int) -> Example:
    rng = np.random.default_rng(seed)
    ids, targets = rng.integers(1, 1000, (2, n), dtype=np.int32)
    return Example(ids, targets, rng.random(n, dtype=np.float32))


@given(st.lists(st.integers(2, 9), min_size=1, max_size=6))
def test_a_row_holds_its_samples_shifted(lengths: list[int]) -> None:
    """Against a loop over the samples, token by token."""
    examples = [example(n, seed) for seed, n in enumerate(lengths)]
    row = pack(examples)
    token_ids, positions, targets, weights = [], [], [], []
    for sample in examples:
        for t in range(len(sample.token_ids)):
            last = t == len(sample.token_ids) - 1
            token_ids.append(int(sample.token_ids[t]))
            positions.append(t)
            targets.append(0 if last else int(sample.targets[t + 1]))
            weights.append(0.0 if last else float(sample.weights[t + 1]))
    assert row.token_ids.tolist() == token_ids and row.positions.tolist() == positions
    assert row.targets.tolist() == targets and row.weights.tolist() == weights
    assert row.sequence_start.tolist() == [0, *np.cumsum(lengths).tolist()]
    dtypes = [str(x.dtype) for x in (row.token_ids, row.positions, row.sequence_start, row.targets, row.weights)]
    assert dtypes == ["torch.int64", "torch.int64", "torch.int32", "torch.int64", "torch.float32"]


def test_a_row_without_samples_trains_nothing() -> None:
    row = pack([])
    assert row.token_ids.tolist() == row.positions.tolist() == row.targets.tolist() == [0]
    assert row.sequence_start.tolist() == [0, 1] and row.weights.tolist() == [0.0]


def costs_of(plan: list[list[list[int]]], lengths: list[int], quadratic: float) -> list[list[float]]:
    return [[sum(lengths[i] + quadratic * lengths[i] ** 2 for i in row) for row in rows] for rows in plan]


@given(LENGTHS, st.integers(300, 1000), st.integers(1, 8), COEFFICIENTS)
def test_every_plan(lengths: list[int], row_tokens: int, ranks: int, quadratic: float) -> None:
    plan = plan_rows(lengths, row_tokens, ranks, quadratic)
    assert plan == plan_rows(lengths, row_tokens, ranks, quadratic)
    assert sorted(i for rows in plan for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= row_tokens for rows in plan for row in rows)
    assert len(plan) == ranks and len({len(rows) for rows in plan}) == 1
    # No two rows of best fit are both at most half full, and no more rows are made than one for each rank needs.
    needed = -(-2 * sum(lengths) // row_tokens)
    assert len(plan[0]) <= -(-needed // ranks)
    costs = costs_of(plan, lengths, quadratic)
    totals = [sum(rows) for rows in costs]
    places = list(zip(*costs, strict=True))
    apart = max(max(place) - min(place) for place in places)
    assert max(totals) - min(totals) <= apart + 1e-9 * max(totals)
    # At each place the ranks compute rows of like cost: none is beneath one that comes later.
    assert all(min(place) >= max(later) * (1 - 1e-9) for place, later in pairwise(places))


@given(LENGTHS, st.integers(1, 8), COEFFICIENTS)
def test_rows_are_even_where_the_budget_does_not_bind(lengths: list[int], ranks: int, quadratic: float) -> None:
    """A sample finds no row only if all are within its cost of the bound, and the first `ranks` find empty ones."""
    plan = plan_rows(lengths, sum(lengths), ranks, quadratic)
    assert len(plan[0]) == 1
    costs = [rows[0] for rows in costs_of(plan, lengths, quadratic)]
    single = sorted((n + quadratic * n * n for n in lengths), reverse=True)
    rest = single[ranks] if len(single) > ranks else 0
    assert max(costs) <= 1.002 * max(single[0], sum(costs) / ranks + rest)


@pytest.mark.parametrize(("quadratic", "companions"), [(0.0, 14), (1e-5, 9)])
def test_attention_counts_in_the_balance(quadratic: float, companions: int) -> None:
    """32,000 tokens and 60 times 1,000 on two ranks: 46,000 each, or fewer beside the long one by its attention."""
    plan = plan_rows([32_000] + [1000] * 60, 60_000, 2, quadratic)
    (with_long,) = (row for rows in plan for row in rows if 0 in row)
    assert len(with_long) == 1 + companions


def test_best_fit_saves_a_row_that_first_fit_takes() -> None:
    assert plan_rows([15, 10, 6, 4, 3, 2], 20, 1) == [[[0, 4, 5], [1, 2, 3]]]


def test_too_few_samples_leave_rows_empty() -> None:
    assert plan_rows([5, 7], 10, 4) == [[[1]], [[0]], [[]], [[]]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([4, 11], 10, 1), "sample 1 has 11 tokens, more than row_tokens=10"),
        (([4, 0], 10, 1), "sample 1 has no tokens"),
        (([], 10, 1), "number of samples is 0"),
        (([4], 0, 1), "row_tokens is 0"),
        (([4], 10, 0), "ranks is 0"),
        (([4], 10, 1, -1.0), "quadratic=-1.0"),
        (([4], 10, 1, float("nan")), "quadratic=nan"),
    ],
)
def test_bad_plans_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_rows(*arguments)


def real_lengths() -> list[int]:
    """Of every trace in the data folder, by Qwen2.5's tokenizer."""
    texts = []
    for path in sorted((data_folder() / "traces").glob("*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            answers = [row] if "response" in row or "thinking" in row else row["samples"]
            texts += [f"{row.get('problem', '')}\n{a.get('thinking', '')}{a.get('response', '')}" for a in answers]
    tokenizer = AutoTokenizer.from_pretrained(data_folder() / "tokenizers" / "qwen2")
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def test_real_lengths_fill_their_rows() -> None:
    lengths = real_lengths()
    assert len(lengths) > 900 and max(lengths) > 10 * min(lengths)
    longest = max(lengths)
    for row_tokens in (longest, 2 * longest, 4 * longest):
        rows = plan_rows(lengths, row_tokens, 1)[0]
        # Within a row of the fewest there can be.
        assert len(rows) <= -(-sum(lengths) // row_tokens) + 1
        assert sum(lengths) / (len(rows) * row_tokens) >= 0.95


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 5))
def test_an_epoch_holds_every_sample_once(count: int, batch_size: int, seed: int) -> None:
    steps = steps_per_epoch(count, batch_size)
    for epoch in range(2):
        batches = [step_samples(count, batch_size, seed, epoch * steps + s).tolist() for s in range(steps)]
        assert Counter(i for batch in batches for i in batch) == Counter(range(count))
        assert [len(batch) for batch in batches[:-1]] == [batch_size] * (steps - 1)
        again = step_samples(count, batch_size, seed, epoch * steps + steps - 1)
        assert again.tolist() == batches[-1]
    in_order = np.concatenate([step_samples(count, batch_size, seed, s, shuffle=False) for s in range(steps)])
    assert in_order.tolist() == list(range(count))


def test_epochs_and_seeds_differ() -> None:
    first, second = (step_samples(100, 100, 0, step).tolist() for step in (0, 1))
    assert first != second and first != list(range(100)) and first != step_samples(100, 100, 1, 0).tolist()


def test_the_order_never_changes() -> None:
    """Written down: a run that was started with one version of numpy resumes with another."""
    assert step_samples(8, 8, 0, 0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]


def test_the_steps_of_s1() -> None:
    assert 5 * steps_per_epoch(1000, 16) == 315
    assert len(step_samples(1000, 16, 0, 62)) == 1000 - 62 * 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 4, 0, 0), "count=0"), ((4, 0, 0, 0), "batch_size=0"), ((4, 4, -1, 0), "seed=-1"), ((4, 4, 0, -1), "step=-1")],
)
def test_bad_steps_are_refused(arguments: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        step_samples(*arguments)
