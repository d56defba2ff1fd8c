"""Selection: from the difficult questions to the training set, as the s1 authors' notebook does it.

1. Kept first: AIME and GPQA questions whose trace is right; questions of MATH whose trace is right and long.
2. Up to `uniform_until` rows: a domain drawn uniformly, then a row of it, with weight 2^-rank by trace length (rank 0
   is the longest).
3. Up to `size` rows: the domain drawn from the benchmarks' mix instead: as often as it occurs among the AIME rows, plus
   as often as among the GPQA rows, scaled so that these weigh half as much together.

Rows that were kept first stay among those drawn, as in the notebook: drawing one again uses it up and adds nothing.
Unlike there, scaled GPQA counts are not rounded down, and where no benchmark domain is left, the draw is uniform again.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from tqdm import tqdm

from s1engine.train.curate.labels import UNLABELLED
from s1engine.train.curate.report import Report, Step
from s1engine.train.curate.rows import Columns, Row, question_key, text

RANKS = 64
"""How many ranks are told apart: in float64, weights beyond the 53rd add nothing to the sum of those before."""


@dataclass(frozen=True)
class Selection:
    """Sizes in rows, `math_tokens` in tokens; each source pattern is looked for in the source, whatever its case."""

    size: int = 1000
    uniform_until: int = 700
    math_tokens: int = 5600
    gpqa_share: float = 0.5
    aime_source: str = "aime"
    gpqa_source: str = "gpqa"
    math_source: str = "openaimath"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"--size {self.size}: must be at least 1")
        if not 0 <= self.uniform_until <= self.size:
            raise ValueError(f"--uniform-until {self.uniform_until}: must be between 0 and --size {self.size}")
        if self.gpqa_share < 0:
            raise ValueError(f"--gpqa-share {self.gpqa_share}: must not be negative")
        for name in ("aime_source", "gpqa_source", "math_source"):
            if not getattr(self, name):
                raise ValueError(f"--{name.replace('_', '-')}: an empty pattern is in every source")


def select(rows: Sequence[Row], columns: Columns, selection: Selection | None = None) -> tuple[list[Row], Report]:
    """The selected rows, sorted by the hash of their question.

    The same rows and seed give the same selection in whatever order the rows come. Rows that are UNLABELLED or have no
    trace length are left out. Fewer than `size` rows come back where there are no more.
    Raises ValueError where the rows that are kept first alone are more than `size`.
    """
    selection = selection or Selection()
    columns.require(rows, "question", "domain", "length")
    report = Report("select", len(rows))
    usable = []
    for row in sorted(rows, key=lambda row: _stable_key(row, columns)):
        if text(row, columns.domain) in ("", UNLABELLED):
            report.drop(row, columns, UNLABELLED)
        elif row.get(columns.length) is None:
            report.drop(row, columns, "no trace length")
        elif not isinstance(row[columns.length], int):
            raise ValueError(
                f"{columns.length} is {row[columns.length]!r} in a row; a length is a whole number of tokens"
            )
        else:
            usable.append(row)
    report.step("usable", len(usable))

    kept = {i for i, row in enumerate(usable) if _is_kept(row, columns, selection)}
    if len(kept) > selection.size:
        raise ValueError(f"--size {selection.size}: {len(kept)} rows are kept before any is drawn; raise --size")
    report.steps.append(Step("kept first", len(kept), {}))
    chosen, counts = _draw(usable, columns, selection, kept)
    for i, row in enumerate(usable):
        if i not in chosen:
            report.drop(row, columns, "not drawn")
    report.step("selected", len(chosen))
    selected = [usable[i] for i in sorted(chosen)]
    report.notes = {
        **counts,
        "tokens of the traces": sum(row[columns.length] for row in selected),
        "domains": len({text(row, columns.domain) for row in selected}),
        "rows by source": dict(Counter(text(row, columns.source) for row in selected).most_common()),
    }
    return selected, report


def benchmark_weights(rows: Sequence[Row], columns: Columns, selection: Selection) -> dict[str, float]:
    """The benchmarks' mix: domain -> AIME rows in it + GPQA rows in it, scaled to `gpqa_share` of the AIME rows."""
    aime = Counter(text(r, columns.domain) for r in rows if selection.aime_source.lower() in _source(r, columns))
    gpqa = Counter(text(r, columns.domain) for r in rows if selection.gpqa_source.lower() in _source(r, columns))
    scale = selection.gpqa_share * aime.total() / gpqa.total() if gpqa and aime else 1.0
    return {domain: aime[domain] + scale * gpqa[domain] for domain in sorted(aime | gpqa)}


def _draw(
    rows: Sequence[Row], columns: Columns, selection: Selection, kept: set[int]
) -> tuple[set[int], dict[str, int]]:
    rng = random.Random(selection.seed)
    pools: dict[str, list[int]] = {}  # longest trace first; rows of one length in their stable order
    for i in sorted(range(len(rows)), key=lambda i: -rows[i][columns.length]):
        pools.setdefault(text(rows[i], columns.domain), []).append(i)
    uniform: Mapping[str, float] = dict.fromkeys(sorted(pools), 1.0)
    benchmark = benchmark_weights(rows, columns, selection)
    by_rank = list(accumulate(2.0**-rank for rank in range(RANKS)))
    chosen = set(kept)
    counts = {
        "drawn from uniform domains": 0,
        "drawn from the benchmarks' mix": 0,
        "drawn uniformly for want of one": 0,
    }
    with tqdm(total=selection.size, initial=len(chosen), desc="select", unit="row", leave=False) as bar:
        while len(chosen) < selection.size and pools:
            phase, weights = "drawn from uniform domains", uniform
            if len(chosen) >= selection.uniform_until:
                phase, weights = "drawn from the benchmarks' mix", benchmark
            domains = [domain for domain in weights if domain in pools and weights[domain] > 0]
            if not domains:
                phase, weights = "drawn uniformly for want of one", uniform
                domains = [domain for domain in weights if domain in pools]
            domain = rng.choices(domains, [weights[d] for d in domains])[0]
            pool = pools[domain]
            drawn = pool.pop(rng.choices(range(min(len(pool), RANKS)), cum_weights=by_rank[: len(pool)])[0])
            if not pool:
                del pools[domain]
            if drawn not in chosen:
                chosen.add(drawn)
                counts[phase] += 1
                bar.update()
    return chosen, counts


def _is_kept(row: Row, columns: Columns, selection: Selection) -> bool:
    if row.get(columns.correct) is not True:
        return False
    source = _source(row, columns)
    if selection.aime_source.lower() in source or selection.gpqa_source.lower() in source:
        return True
    return selection.math_source.lower() in source and row[columns.length] > selection.math_tokens


def _source(row: Row, columns: Columns) -> str:
    return text(row, columns.source).lower()


def _stable_key(row: Row, columns: Columns) -> tuple[str, str]:
    return question_key(text(row, columns.question)), json.dumps(row, sort_keys=True, default=str)
