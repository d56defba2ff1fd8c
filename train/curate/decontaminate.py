"""Decontamination: a question that shares a run of eight words with an evaluation set goes, then repeated questions.

As the s1 authors do it (simplescaling/s1, data/decontaminate_util.py), words are lowercased and split at white space,
and each source's accepted questions join what later sources are compared with. Unlike theirs, a question of fewer than
eight words is compared whole; it would otherwise never match.

Word runs are held as 64-bit hashes in sorted arrays (12 bytes a run): time grows with the number of words, times a
logarithm, and memory with the number of different runs in what is compared with.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import chain

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from s1engine.train.curate.report import Report
from s1engine.train.curate.rows import Columns, Row, question_key, text

WORDS = 8
CHUNK = 4096
"""Questions that are hashed at a time."""
Hashes = npt.NDArray[np.uint64]
Owners = npt.NDArray[np.int32]
_MULTIPLIER = 0x9E3779B97F4A7C15  # odd: every word of a run counts with all of its bits


def words_of(question: str) -> list[str]:
    return question.lower().split()


@lru_cache(maxsize=1 << 17)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def run_hashes(questions: Sequence[str], n: int = WORDS) -> tuple[Hashes, npt.NDArray[np.int64]]:
    """Hashes of the runs of `n` words of all questions, end to end, and where each question's begin. In every process
    the same.

    A question of w >= n words has w - n + 1: run i starts at word i. One of fewer words has one, of the whole. One
    without words has none: it begins where the next one does.
    """
    split = [words_of(question) for question in questions]
    counts = np.array([len(words) for words in split], dtype=np.int64)
    words = np.fromiter(map(_word_hash, chain.from_iterable(split)), np.uint64, count=counts.sum())
    widths = np.minimum(counts, n)
    runs = counts - widths + (counts > 0)
    starts = np.cumsum(runs) - runs
    width = np.repeat(widths, runs)
    word = np.arange(len(width)) + np.repeat(np.cumsum(counts) - counts - starts, runs)  # the first of each run
    hashes = np.zeros(len(width), dtype=np.uint64)
    for offset in range(n):
        inside = width > offset
        hashes[inside] = hashes[inside] * np.uint64(_MULTIPLIER) + words[word[inside] + offset]
    return hashes, starts


@dataclass
class Overlap:
    """What a question shares with a set: how many runs, the first of them, and a question of the set that has it."""

    label: str
    words: str
    runs: int


class Reference:
    """The questions that must not recur, by named set. Sorted tables of doubling size, so that adding stays cheap."""

    def __init__(self, n: int = WORDS) -> None:
        self.n = n
        self._sets: list[str] = []
        self._owner_sets: list[int] = []  # per question: its set
        self._owner_labels: list[str] = []  # per question: what it is called in a report
        self._tables: list[tuple[Hashes, Owners]] = []

    def add(self, name: str, questions: Sequence[str], labels: Sequence[str]) -> None:
        """Add a set of questions; `labels` name them in reports."""
        self._sets.append(name)
        first = len(self._owner_labels)
        self._owner_sets += [len(self._sets) - 1] * len(questions)
        self._owner_labels += labels
        hashes, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int32)]
        for start in range(0, len(questions), CHUNK):
            chunk, starts = run_hashes(questions[start : start + CHUNK], self.n)
            hashes.append(chunk)
            counts = np.diff(starts, append=len(chunk))
            owners.append(np.repeat(np.arange(first + start, first + start + len(starts), dtype=np.int32), counts))
        unique, where = np.unique(np.concatenate(hashes), return_index=True)
        self._tables.append((unique, np.concatenate(owners)[where]))
        while len(self._tables) > 1 and len(self._tables[-2][0]) <= 2 * len(self._tables[-1][0]):
            (low, low_owners), (high, high_owners) = self._tables[-2:]
            merged = np.concatenate((low, high))
            order = np.argsort(merged, kind="stable")
            self._tables[-2:] = [(merged[order], np.concatenate((low_owners, high_owners))[order])]

    def matches(self, questions: Sequence[str]) -> list[dict[str, Overlap]]:
        """For each question: the sets that it shares runs with, by name."""
        hashes, starts = run_hashes(questions, self.n)
        order = np.argsort(hashes)  # a search for sorted values stays within the cache
        needles = hashes[order]
        found: list[dict[int, Overlap]] = [{} for _ in questions]
        for known, owners in self._tables:
            if not len(known):
                continue
            left = np.searchsorted(known, needles)
            hits = np.flatnonzero(known[np.minimum(left, len(known) - 1)] == needles)
            hits = hits[np.argsort(order[hits])]
            right = np.searchsorted(known, needles[hits], side="right")
            at = order[hits]
            of = np.searchsorted(starts, at, side="right") - 1
            for low, high, question, word in zip(left[hits], right, of, at - starts[of], strict=True):
                for owner in owners[low:high]:
                    member = self._owner_sets[owner]
                    if member not in found[question]:
                        shared = " ".join(words_of(questions[question])[word : word + self.n])
                        found[question][member] = Overlap(self._owner_labels[owner], shared, 0)
                    found[question][member].runs += 1
        return [{self._sets[member]: each[member] for member in sorted(each)} for each in found]


def decontaminate(
    rows: Sequence[Row],
    columns: Columns,
    against: Mapping[str, Sequence[tuple[str, str]]],
    *,
    n: int = WORDS,
    add_accepted: bool = True,
) -> tuple[list[Row], Report]:
    """The rows, in order, whose questions share no run of `n` words with `against` and are not repeated.

    against: name of an evaluation set -> its (label, question) pairs.
    add_accepted: each source's accepted questions are compared with those of later sources, as if in `against`; sources
    come in the order of their first rows. Within a source only questions that are equal as words are repeated.
    """
    columns.require(rows, "question")
    if n < 1:
        raise ValueError(f"--words {n}: must be at least 1")
    report = Report("decontaminate", len(rows))
    reference = Reference(n)
    for name, pairs in against.items():
        reference.add(name, [question for _, question in pairs], [label for label, _ in pairs])
    by_source: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        by_source.setdefault(text(row, columns.source), []).append(i)

    kept: list[int] = []
    first: dict[bytes, int] = {}  # words of a question -> the row that had them first
    contaminated: list[tuple[int, dict[str, Overlap]]] = []
    repeated: list[tuple[int, int]] = []
    with tqdm(total=len(rows), desc="decontaminate", unit="row", leave=False) as bar:
        for source, members in by_source.items():
            accepted = []
            for chunk in _chunks(members):
                questions = [text(rows[i], columns.question) for i in chunk]
                for i, question, found in zip(chunk, questions, reference.matches(questions), strict=True):
                    if found:
                        contaminated.append((i, found))
                        continue
                    same = hashlib.blake2b(" ".join(words_of(question)).encode("utf-8", "surrogatepass")).digest()
                    if first.setdefault(same, i) != i:
                        repeated.append((i, first[same]))
                    else:
                        accepted.append(i)
                bar.update(len(chunk))
            kept += accepted
            if add_accepted:
                questions = [text(rows[i], columns.question) for i in accepted]
                reference.add(f"source {source}", questions, [_label(rows[i], columns) for i in accepted])

    for i, found in sorted(contaminated, key=lambda pair: pair[0]):
        runs = max(1, len(words_of(text(rows[i], columns.question))) - n + 1)
        sets = {name: asdict(overlap) for name, overlap in found.items()}
        report.drop(rows[i], columns, "shared run", question_runs=runs, sets=sets)
    for i, earlier in sorted(repeated):
        report.drop(rows[i], columns, "repeated", label=_label(rows[earlier], columns))
    report.step("contamination", len(kept))
    short = sum(len(words_of(text(row, columns.question))) < n for row in rows)
    report.notes["questions compared with"] = {name: len(pairs) for name, pairs in against.items()}
    report.notes["rows that share a run, by set"] = dict(Counter(name for _, found in contaminated for name in found))
    report.notes[f"questions of fewer than {n} words, compared whole"] = short
    return [rows[i] for i in sorted(kept)], report


def _chunks(members: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(members), CHUNK):
        yield members[start : start + CHUNK]


def _label(row: Row, columns: Columns) -> str:
    return str(row.get("id", question_key(text(row, columns.question))))
