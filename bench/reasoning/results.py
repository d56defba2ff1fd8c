"""From the samples of a run to its results: a row a setting, a summary a strategy, and keywords.

A setting is (model, task, strategy, value). The same samples give the same rows, in whatever order they come. Every
interval is a 95 % bootstrap over problems.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from s1engine.bench.reasoning import metrics
from s1engine.bench.reasoning.bootstrap import Estimate, estimates
from s1engine.bench.reasoning.keywords import KEYWORDS, count_own_keywords
from s1engine.bench.reasoning.matched import Outcome, matched
from s1engine.bench.reasoning.results_table import table
from s1engine.bench.reasoning.voting import majority_curve, pass_at, same_value

__all__ = ["results", "table"]

Row = dict[str, Any]
COUNTS = ("thinking_tokens", "answer_tokens", "output_tokens", "cost_tokens")
FIELDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("model", "task", "strategy", "problem", "text", "thinking", "finish_reason"), (str,)),
    **dict.fromkeys(("sample", *COUNTS), (int,)),
    **dict.fromkeys(("thinking_stop", "extracted"), (str, type(None))),
    "value": (int, str, type(None)),
    "correct": (bool, type(None)),
    "forced": (list, tuple),
}
STEPS = ("step", "step+cap")
CLASSES = ("class", "class+cap")
LENGTHS = ("l1-exact", "l1-max")
# How small a value may be: of tokens or steps at most, and of l1-exact's tokens.
AT_MOST = {"cap": 0, "reject": 0, "token": 1, "token+cap": 1, "step": 1, "step+cap": 1, "l1-max": 1}
ASKED = {**AT_MOST, "l1-exact": 1}
# What a strategy scales, where that is not the thinking tokens of the completion that it gives.
SCALED = {"majority": "cost_tokens", "best": "cost_tokens", "l1-exact": "output_tokens", "l1-max": "output_tokens"}
DIGITS = 6  # after the point


class Setting(NamedTuple):
    model: str
    task: str
    strategy: str
    value: int | str | None

    @property
    def order(self) -> tuple[Any, ...]:
        kind = (type(None), int, str).index(type(self.value))
        return self.model, self.task, self.strategy, kind, self.value or 0


class Sample(NamedTuple):
    """What is kept of a sample: no text."""

    number: int
    correct: bool | None
    extracted: str | None
    counts: tuple[int, ...]  # as COUNTS
    by_budget: bool
    cut: bool


@dataclass
class Samples:
    """Those of a setting, by problem."""

    problems: dict[str, list[Sample]] = field(default_factory=lambda: defaultdict(list))
    words: Counter[str] = field(default_factory=Counter)

    @property
    def lengths(self) -> list[int]:
        """Output tokens of each sample."""
        return [sample.counts[2] for sample in self.all]

    @property
    def all(self) -> list[Sample]:
        return [sample for samples in self.problems.values() for sample in samples]

    def add(self, row: Mapping[str, Any]) -> None:
        sample = Sample(
            number=row["sample"],
            correct=row["correct"],
            extracted=row["extracted"],
            counts=tuple(row[name] for name in COUNTS),
            by_budget=row["thinking_stop"] == "budget",
            cut=row["finish_reason"] == "length",
        )
        self.problems[row["problem"]].append(sample)
        self.words.update(count_own_keywords(row["text"], row["thinking"], row["forced"]))

    def sort(self) -> None:
        self.problems = dict(sorted(self.problems.items()))
        for problem, samples in self.problems.items():
            samples.sort(key=lambda sample: sample.number)
            if len({sample.number for sample in samples}) < len(samples):
                raise ValueError(f"problem {problem!r} has two samples of one number in one setting: leave one out")

    def means(self, name: str) -> list[float]:
        """Of a count: over the samples of each problem."""
        at = COUNTS.index(name)
        return [_mean([sample.counts[at] for sample in samples]) for samples in self.problems.values()]


Settings = Mapping[Setting, Samples]
Accuracies = Mapping[Setting, Mapping[str, float]]  # by problem


def results(samples: Iterable[Mapping[str, Any]], caps_of: str | None = None) -> list[Row]:
    """Rows of results, each with its "kind": "setting", "summary", "matched" and "keywords", in this order.

    Where a sample has no verdict ("correct" is null: the gold answer cannot be read), its problem is left out of what
    depends on one, in every setting of the task; "bad_gold" tells how many problems that are. What cannot be told is
    null: Scaling of runs with equal tokens, Control of a strategy that sets no bound.

    Args:
        samples: the rows of a run; read once, and no text is kept.
        caps_of: the model with whose caps settings that ask for a length are compared, see `matched`.

    Raises:
        ValueError: a row lacks a field, has one of a wrong type, or is there twice.
    """
    found: dict[Setting, Samples] = defaultdict(Samples)
    for i, row in enumerate(samples):
        _check(row, i)
        found[Setting(*(row[name] for name in Setting._fields))].add(row)
    settings = {setting: found[setting] for setting in sorted(found, key=lambda setting: setting.order)}
    bad_gold: dict[str, set[str]] = defaultdict(set)
    for setting, of_setting in settings.items():
        of_setting.sort()
        for problem, of_problem in of_setting.problems.items():
            if any(sample.correct is None for sample in of_problem):
                bad_gold[setting.task].add(problem)
    accuracies = {
        setting: {
            problem: _mean([bool(sample.correct) for sample in of_problem])
            for problem, of_problem in of_setting.problems.items()
            if problem not in bad_gold[setting.task]
        }
        for setting, of_setting in settings.items()
    }
    rows = [_setting_row(setting, settings, accuracies) for setting in settings]
    rows += _summary_rows(settings, accuracies)
    rows += _matched_rows(settings, accuracies, caps_of)
    rows += [row for setting, of_setting in settings.items() for row in _keyword_rows(setting, of_setting)]
    return [_rounded(row) for row in rows]


def _check(row: Mapping[str, Any], i: int) -> None:
    for name, types in FIELDS.items():
        if name not in row:
            raise ValueError(f"samples[{i}] has no {name!r}: give every field of a sample")
        if type(row[name]) not in types:
            wanted = " or ".join("null" if each is type(None) else each.__name__ for each in types)
            raise ValueError(f"samples[{i}][{name!r}]={row[name]!r}: give {wanted}")
    strategy, value = row["strategy"], row["value"]
    if strategy in ASKED and (type(value) is not int or value < ASKED[strategy]):
        raise ValueError(f"samples[{i}]['value']={value!r}: give {strategy!r} an integer from {ASKED[strategy]} on")
    if strategy in CLASSES and value not in ("short", "long"):
        raise ValueError(f"samples[{i}]['value']={value!r}: give {strategy!r} 'short' or 'long'")


def _setting_row(setting: Setting, settings: Settings, accuracies: Accuracies) -> Row:
    samples, accuracy = settings[setting], accuracies[setting]
    rows, depth = samples.all, min(map(len, samples.problems.values()))
    ks = sorted({*(2**i for i in range(depth.bit_length())), depth}) if depth > 1 and accuracy else []
    other = _compared_with(setting, settings)
    gains = [] if other is None else _gains(accuracy, accuracies[other])
    vectors = {"thinking": samples.means("thinking_tokens"), "accuracy": list(accuracy.values()), "gain": gains}
    curves = [_vote_curve(samples.problems[problem]) for problem in accuracy] if ks else []
    vectors |= {f"maj@{k}": [curve[k - 1] for curve in curves] for k in ks}
    known = {name: vector for name, vector in vectors.items() if vector}
    found = dict(zip(known, estimates(list(known.values())), strict=True))
    return {
        "kind": "setting",
        **setting._asdict(),
        "problems": len(samples.problems),
        "samples": len(rows),
        "bad_gold": len(samples.problems) - len(accuracy),
        **(_interval(found["accuracy"]) if accuracy else dict.fromkeys(("accuracy", "low", "high"))),
        **{name: _mean(samples.means(name)) for name in COUNTS},
        "thinking_low": found["thinking"].low,
        "thinking_high": found["thinking"].high,
        "ended_by_budget": _mean([sample.by_budget for sample in rows]),
        "no_answer": _mean([sample.extracted is None for sample in rows]),
        "cut": _mean([sample.cut for sample in rows]),
        "difference": {
            "to": {"strategy": other.strategy, "value": other.value},
            "problems": len(gains),
            **_interval(found["gain"]),
        }
        if other is not None and gains
        else None,
        "pass_at": {
            str(k): _mean([pass_at([bool(sample.correct) for sample in samples.problems[p]], k) for p in accuracy])
            for k in ks
        },
        "majority_at": {str(k): _interval(found[f"maj@{k}"]) for k in ks},
        "deviation": _length_error([setting], settings) if setting.strategy in LENGTHS else None,
    }


def _compared_with(setting: Setting, settings: Settings) -> Setting | None:
    """The plain one of its model and task; without that, the setting of its strategy that thinks most."""
    if setting.strategy == "plain":
        return None
    plain = Setting(setting.model, setting.task, "plain", None)
    if plain in settings:
        return plain
    others = [other for other in settings if other[:3] == setting[:3]]
    most = max(others, key=lambda other: _mean(settings[other].means("thinking_tokens")))
    return None if most == setting else most


def _gains(accuracy: Mapping[str, float], other: Mapping[str, float]) -> list[float]:
    """On the problems that both have."""
    return [value - other[problem] for problem, value in accuracy.items() if problem in other]


def _vote_curve(samples: Sequence[Sample]) -> list[float]:
    answers = [sample.extracted for sample in samples]
    return majority_curve(answers, [bool(sample.correct) for sample in samples], same_value).tolist()


def _summary_rows(settings: Settings, accuracies: Accuracies) -> list[Row]:
    strategies: dict[tuple[str, str, str], list[Setting]] = defaultdict(list)
    for setting in settings:
        if accuracies[setting] and setting.value is not None:
            strategies[setting[:3]].append(setting)
    rows: list[Row] = []
    for (model, task, strategy), runs in strategies.items():
        if len(runs) < 2:
            continue
        percents = [100 * _mean(list(accuracies[run].values())) for run in runs]
        tokens = [_mean(settings[run].means(SCALED.get(strategy, "thinking_tokens"))) for run in runs]
        row = {
            "kind": "summary",
            "model": model,
            "task": task,
            "strategy": strategy,
            "runs": len(runs),
            "control": _control(runs, tokens, settings),
            "scaling_log2": metrics.scaling(tokens, percents),
            "scaling_linear": metrics.scaling(tokens, percents, log2=False),
            "performance": metrics.performance(percents) / 100,
        }
        if strategy in LENGTHS:
            lengths = {_asked(run): settings[run].lengths for run in runs}
            row["deviation"] = {**_length_error(runs, settings), "spread": metrics.spread(lengths)}
        rows.append(row)
    return rows


def _matched_rows(settings: Settings, accuracies: Accuracies, caps_of: str | None) -> list[Row]:
    outcomes = {
        setting: Outcome(
            accuracies[setting], dict(zip(its.problems, its.means("output_tokens"), strict=True)), its.lengths
        )
        for setting, its in settings.items()
    }
    rows: list[Row] = []
    for setting in settings:
        caps = {
            _asked(other) if other.value is not None else None: outcome
            for other, outcome in outcomes.items()
            if other[:2] == (caps_of, setting.task) and other.strategy in ("cap", "plain")
        }
        if setting.strategy in LENGTHS and any(cap is not None for cap in caps):
            for found in matched(_asked(setting), outcomes[setting], caps):
                rows.append({"kind": "matched", **setting._asdict(), "to": caps_of, **found})
    return rows


def _control(runs: Sequence[Setting], used: Sequence[float], settings: Settings) -> float | None:
    """Control of runs of one strategy by the tokens that they used; None where it bounds none."""
    strategy = runs[0].strategy
    plain = Setting(*runs[0][:2], "plain", None)
    if strategy in AT_MOST:
        unit = metrics.TOKENS_A_STEP if strategy in STEPS else 1
        return metrics.control(used, [(0.0, unit * _asked(run)) for run in runs])
    if strategy in CLASSES and plain in settings:
        natural = _mean(settings[plain].means("thinking_tokens"))
        return metrics.control(used, [(0.0, natural) if run.value == "short" else (natural, math.inf) for run in runs])
    return None


def _asked(run: Setting) -> int:
    assert isinstance(run.value, int)  # see _check
    return run.value


def _length_error(runs: Sequence[Setting], settings: Settings) -> Row:
    """Of output tokens against those asked for, over all samples of runs of one strategy."""
    lengths = [length for run in runs for length in settings[run].lengths]
    return asdict(metrics.length_error(lengths, [_asked(run) for run in runs for _ in settings[run].lengths]))


def _keyword_rows(setting: Setting, samples: Samples) -> list[Row]:
    """One a group; none where nothing was thought."""
    tokens = sum(sample.counts[0] for sample in samples.all)
    rows = []
    for group, keywords in KEYWORDS.items() if tokens else ():
        words = {word: samples.words[word] for word in keywords if samples.words[word]}
        rate = 1000 * sum(words.values()) / tokens
        rows.append({"kind": "keywords", **setting._asdict(), "group": group, "per_1000_tokens": rate, "words": words})
    return rows


def _interval(found: Estimate) -> Row:
    return {"accuracy": found.mean, "low": found.low, "high": found.high}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)  # exactly rounded: the same in any order


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return round(value, DIGITS) + 0.0 if isinstance(value, float) else value  # -0.0 becomes 0.0
