"""Settings that ask for a length against caps, on outcomes small enough to compare by hand."""

import pytest
from result_rows import Row, sample_row

from s1engine.bench.reasoning.matched import Outcome, matched
from s1engine.bench.reasoning.results import results, table

PROBLEMS = ("p0", "p1", "p2", "p3")


def outcome(right: str, tokens: tuple[int, ...]) -> Outcome:
    accuracy = {problem: float(mark == "x") for problem, mark in zip(PROBLEMS, right, strict=True)}
    return Outcome(accuracy, dict(zip(PROBLEMS, map(float, tokens), strict=True)), tokens)


CAPS = {
    8: outcome("....", (10, 10, 10, 10)),
    16: outcome("x...", (12, 20, 20, 20)),
    32: outcome("xx..", (12, 24, 40, 40)),
    None: outcome("xxx.", (12, 24, 44, 80)),
}


def test_by_budget_the_cap_may_not_be_longer_than_the_request() -> None:
    """Of caps whose longest outputs have 10, 20 and 40 tokens, a request for 30 is compared with the second."""
    found = matched(30, outcome("xxx.", (30, 30, 30, 30)), CAPS)[0]
    assert (found["by"], found["caps"], found["output_tokens"]) == ("budget", [16], 18.0)
    assert (found["cap_accuracy"], found["accuracy"]) == (0.25, 0.5)
    assert found["low"] == 0.0 and found["high"] == 1.0  # two of four problems gained; all or none may be drawn


@pytest.mark.parametrize(("longer", "caps"), [(1, [8]), (2, [])])
def test_by_budget_one_output_in_a_hundred_may_be_longer(longer: int, caps: list[int]) -> None:
    problems = [f"p{i}" for i in range(100)]
    lengths = [30] * (100 - longer) + [300] * longer
    cap = Outcome(dict.fromkeys(problems, 0.5), dict(zip(problems, map(float, lengths), strict=True)), lengths)
    found = [its["caps"] for its in matched(30, cap, {8: cap}) if its["by"] == "budget"]
    assert found == ([caps] if caps else [])


def test_by_mean_two_caps_are_mixed_to_the_same_length() -> None:
    """Means are 10, 18, 29 and 40 tokens: 23.5 is half 18 and half 29."""
    found = matched(24, outcome("xxx.", (24, 24, 23, 23)), CAPS)[1]
    assert (found["by"], found["caps"], found["output_tokens"]) == ("mean", [16, 32], 23.5)
    assert (found["cap_accuracy"], found["accuracy"]) == (0.375, 0.375)


@pytest.mark.parametrize(("length", "caps"), [(90, [None]), (40, [None]), (29, [32]), (3, [8])])
def test_by_mean_at_the_ends_and_on_a_cap(length: int, caps: list[int | None]) -> None:
    assert matched(90, outcome("xxx.", (length,) * 4), CAPS)[-1]["caps"] == caps


def test_no_cap_is_small_enough() -> None:
    assert [found["by"] for found in matched(9, outcome("....", (9, 9, 9, 9)), CAPS)] == ["mean"]


def test_only_problems_that_all_have_are_compared() -> None:
    less = Outcome({"p0": 1.0}, {"p0": 30.0}, [30])
    assert [found["problems"] for found in matched(30, less, CAPS)] == [1, 1]
    assert matched(30, Outcome({"q": 1.0}, {"q": 30.0}, [30]), CAPS) == []


def rows_of(strategy: str, value: int | None, right: int, tokens: int, model: str) -> list[Row]:
    same = {"model": model, "output_tokens": tokens}
    return [sample_row(strategy, value, problem=f"p{i}", correct=i < right, **same) for i in range(4)]


def comparison(rows: list[Row], model: str, by: str) -> Row:
    (row,) = [row for row in rows if row["kind"] == "matched" and row["model"] == model and row["by"] == by]
    return row


def test_results_have_a_row_for_each_request_of_each_model() -> None:
    rows = rows_of("cap", 8, 1, 20, "base") + rows_of("plain", None, 2, 60, "base")
    rows += [row for model in ("base", "l1") for row in rows_of("l1-exact", 40, 3, 40, model)]
    found = results(rows, "base")
    budget = comparison(found, "l1", "budget")
    assert (budget["to"], budget["caps"], budget["accuracy"]) == ("base", [8], 0.5)
    mean = comparison(found, "base", "mean")
    assert (mean["caps"], mean["cap_accuracy"], mean["accuracy"]) == ([8, None], 0.375, 0.375)
    assert "8 and none" in table(found)
    assert not [row for row in results(rows) if row["kind"] == "matched"]
    assert not [row for row in results(rows, "l1") if row["kind"] == "matched"]  # it has no caps
