"""Decontamination against plain Python sets of word tuples, on the real files, and its cost on 100,000 rows."""

from __future__ import annotations

import json
import random
import re
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from conditions import data_folder
from hypothesis import given
from hypothesis import strategies as st

from s1engine.train.curate.decontaminate import Overlap, Reference, decontaminate, run_hashes
from s1engine.train.curate.rows import Columns

COLUMNS = Columns()


def rows_of(questions: list[str], source: str = "s") -> list[dict[str, Any]]:
    return [{"problem": question, "source": source, "id": str(i)} for i, question in enumerate(questions)]


def grams(question: str, n: int) -> set[tuple[str, ...]]:
    words = question.lower().split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)} or ({tuple(words)} if words else set())


def plain(rows: list[dict[str, Any]], against: list[str], n: int, add_accepted: bool) -> list[str]:
    """Ids that stay, by sets of tuples."""
    known = set().union(*(grams(question, n) for question in against))
    seen: set[tuple[str, ...]] = set()
    kept = []
    for source in dict.fromkeys(row["source"] for row in rows):
        accepted = []
        for row in rows:
            words = tuple(row["problem"].lower().split())
            if row["source"] == source and not grams(row["problem"], n) & known and words not in seen:
                seen.add(words)
                accepted.append(row)
        if add_accepted:
            known = known.union(*(grams(row["problem"], n) for row in accepted))
        kept += [row["id"] for row in accepted]
    return sorted(kept, key=int)


questions = st.lists(st.sampled_from(["a", "b", "c", "D", "d"]), max_size=9).map(" ".join)


@given(
    st.lists(st.tuples(questions, st.sampled_from("xyz")), max_size=12), st.lists(questions, max_size=4), st.booleans()
)
def test_it_keeps_what_plain_sets_keep(pool: list[tuple[str, str]], against: list[str], add_accepted: bool) -> None:
    rows = [{"problem": question, "source": source, "id": str(i)} for i, (question, source) in enumerate(pool)]
    pairs = {"eval": [(str(i), question) for i, question in enumerate(against)]}
    if rows:
        kept, _ = decontaminate(rows, COLUMNS, pairs, n=3, add_accepted=add_accepted)
        assert [row["id"] for row in kept] == plain(rows, against, 3, add_accepted)


def test_a_shared_run_of_eight_words_removes() -> None:
    eight = "Find the  sum of all positive\nintegers n"
    against = {"set": [("e1", f"Today: {eight} such that nothing")]}
    rows = rows_of([f"please {eight.upper()} now", "find the sum of all positive integers such that", "other"])
    kept, report = decontaminate(rows, COLUMNS, against)
    assert [row["id"] for row in kept] == ["1", "2"]
    shared = {"label": "e1", "words": "find the sum of all positive integers n", "runs": 1}
    assert report.dropped[0]["sets"] == {"set": shared} and report.dropped[0]["question_runs"] == 3


def test_short_questions_compare_whole() -> None:
    against = {"set": [("short", "Evaluate $\\log_2 64$."), ("long", "Well, compute 1 + 1 and then rest a while")]}
    rows = rows_of(["evaluate  $\\log_2 64$.", "compute 1 + 1", "Evaluate $\\log_2 32$.", ""])
    kept, report = decontaminate(rows, COLUMNS, against)
    assert [row["id"] for row in kept] == ["1", "2", "3"]
    assert report.notes["questions of fewer than 8 words, compared whole"] == 4


def test_accepted_sources_join_the_reference() -> None:
    first, again = "one two three four five six seven eight nine", "zero one two three four five six seven eight"
    rows = [*rows_of([first], "a"), {"problem": again, "source": "b", "id": "1"}]
    assert [row["id"] for row in decontaminate(rows, COLUMNS, {})[0]] == ["0"]
    assert [row["id"] for row in decontaminate(rows, COLUMNS, {}, add_accepted=False)[0]] == ["0", "1"]
    # Within one source only equal questions go.
    rows = rows_of([first, again, first.upper()], "a")
    kept, report = decontaminate(rows, COLUMNS, {})
    assert [row["id"] for row in kept] == ["0", "1"]
    assert report.steps[0].removed == {"repeated": 1} and report.dropped[0]["label"] == "0"


def test_hashes_tell_words_and_their_order_apart() -> None:
    rng = random.Random(0)
    words = [f"w{i}" for i in range(50)]
    texts = list({" ".join(rng.choices(words, k=8)) for _ in range(20_000)})
    assert len({*run_hashes(texts)[0].tolist()}) == len(texts)
    hashes, starts = run_hashes(["a b", "", "b a", "a b c d", "A\tb ", "x a b c"], 3)
    assert starts.tolist() == [0, 1, 1, 2, 4, 5] and len(hashes) == 7
    assert hashes[0] == hashes[4] and hashes[2] == hashes[6] and len({*hashes.tolist()}) == 5
    # Hashes are not salted: a report is the same in every process.
    assert hashes[0] == run_hashes(["a b"])[0][0] == 17600707320206839748


def test_every_set_that_shares_is_named() -> None:
    reference = Reference(2)
    reference.add("a", ["x y z", "p q"], ["a0", "a1"])
    reference.add("b", ["y z w", "", "x y"], ["b0", "b1", "b2"])
    assert reference.matches(["y z", "", "q p", "w x y z"]) == [
        {"a": Overlap("a0", "y z", 1), "b": Overlap("b0", "y z", 1)},
        {},
        {},
        {"a": Overlap("a0", "x y", 2), "b": Overlap("b2", "x y", 2)},
    ]


@pytest.fixture(scope="module")
def data() -> Path:
    return data_folder()


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_known_overlaps_of_s1k_are_found(data: Path) -> None:
    """s1K as published has five questions of MATH500 and OlympiadBench, by equality of letters and digits.

    Of the further hits, two are the same question in other words (s1k-0191, s1k-0156, read by eye); the others share a
    phrase, most of them AIME's "where $m$ and $n$ are relatively prime positive integers".
    """
    rows = read(data / "train" / "s1k_questions.jsonl")
    sets = {name: read(data / "eval" / f"{name}.jsonl") for name in ("math500", "olympiadbench_maths_en")}
    against = {name: [(row["id"], row["problem"]) for row in members] for name, members in sets.items()}
    _, report = decontaminate(rows, Columns.find(rows), against)
    found = {row["id"]: row for row in report.dropped if row["reason"] == "shared run"}

    def letters(question: str) -> str:
        return re.sub(r"[^a-z0-9]", "", question.lower())

    for name, number in (("math500", 3), ("olympiadbench_maths_en", 2)):
        equal = {letters(row["problem"]) for row in sets[name]}
        known = {row["id"] for row in rows if letters(row["problem"]) in equal}
        assert len(known) == number
        assert all(name in found[each]["sets"] for each in known)
        known_grams = set().union(*(grams(row["problem"], 8) for row in sets[name]))
        assert {each for each, row in found.items() if name in row["sets"]} == {
            row["id"] for row in rows if grams(row["problem"], 8) & known_grams
        }
    assert {"s1k-0191", "s1k-0156"} <= found.keys()


def generated(count: int) -> list[dict[str, Any]]:
    rng = random.Random(0)
    vocabulary = [f"word{i}" for i in range(30_000)]
    return rows_of([" ".join(rng.choices(vocabulary, k=rng.randint(3, 120))) for _ in range(count)])


@pytest.mark.slow
def test_a_hundred_thousand_rows_take_less_than_a_minute() -> None:
    rows = generated(100_000)
    for i, row in enumerate(rows):
        row["source"] = str(i % 16)
    against = {"eval": [(str(i), row["problem"]) for i, row in enumerate(rows[:5000])]}
    started = time.thread_time()
    kept, report = decontaminate(rows, COLUMNS, against)
    assert time.thread_time() - started < 60
    long = sum(len(row["problem"].split()) >= 1 for row in rows[5000:])
    assert report.rows_out == len(kept) == long


def test_time_and_memory_grow_with_the_rows() -> None:
    """Eight times the rows, not sixty-four times the cost; tens of bytes for a run of words."""
    seconds, peaks, runs = [], [], []
    for count in (1000, 8000):
        rows = generated(count)
        tracemalloc.start()
        decontaminate(rows, COLUMNS, {"eval": []})
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        started = time.thread_time()
        decontaminate(rows, COLUMNS, {"eval": []})
        seconds.append(time.thread_time() - started)
        runs.append(sum(max(1, len(row["problem"].split()) - 7) for row in rows))
    assert seconds[1] < 30 * seconds[0]
    assert peaks[1] - peaks[0] < 100 * (runs[1] - runs[0])
