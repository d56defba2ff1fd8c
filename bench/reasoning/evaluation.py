"""An evaluation: models, tasks and settings in, samples, results and a report out; resumable at any point.

What is solved goes to a journal at once, so that a run which is killed goes on where it was. When all is solved it is
graded and written in a fixed order: in deterministic mode the same bytes come out, however often it was broken off.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from tqdm import tqdm

from s1engine.bench.reasoning.asking import Asker
from s1engine.bench.reasoning.grading import Grader
from s1engine.bench.reasoning.jobs import run_jobs
from s1engine.bench.reasoning.journal import Journal, Row, read_rows, write_rows
from s1engine.bench.reasoning.results import results
from s1engine.bench.reasoning.settings import Setting
from s1engine.bench.reasoning.strategies import FORCED, Case, Job, job
from s1engine.bench.reasoning.tasks import Problem

AUTO_CAPS = 8
# Jobs that run or wait at a time, for each sequence that the engine runs: there is always one to take a free slot.
JOBS_PER_SLOT = 2


@dataclass
class Evaluation:
    """What is to be solved.

    models    how to make the asker of each label; one is loaded at a time
    tasks     problems of each
    settings  and how many samples each has
    auto_caps so many samples of "cap" at eighths of the median natural length, which the samples of "plain" give
    identity  what must agree where a run goes on: all that has a say in the samples
    """

    models: dict[str, Callable[[], Asker]]
    tasks: dict[str, list[Problem]]
    settings: dict[Setting, int]
    auto_caps: int = 0
    identity: Row = field(default_factory=dict)


@dataclass(frozen=True)
class Unit:
    """What is solved and written down together: settings of one sample of a problem that come from one job."""

    model: str
    task: str
    settings: tuple[Setting, ...]
    problem: Problem
    sample: int

    @property
    def key(self) -> str:
        return f"{self.model}/{self.task}/{' '.join(map(str, self.settings))}/{self.problem.id}/{self.sample}"


def evaluate(evaluation: Evaluation, out: Path) -> tuple[list[Row], list[Row]]:
    """Solve what is not solved yet, and write samples.jsonl and results.jsonl into `out`. Returns both.

    Raises ValueError where `out` holds another run.
    """
    out.mkdir(parents=True, exist_ok=True)
    samples_file, journal_file = out / "samples.jsonl", out / "journal.jsonl"
    has_begun = samples_file.exists() or (journal_file.exists() and journal_file.stat().st_size > 0)
    _identify(out / "run.json", evaluation.identity, has_begun)
    if samples_file.exists():
        samples = read_rows(samples_file)
    else:
        with Journal(journal_file) as journal:
            rows = [row for label in evaluation.models for row in _solve(evaluation, label, journal, out)]
        samples = _graded(rows, evaluation.tasks)
        write_rows(samples_file, samples)
    journal_file.unlink(missing_ok=True)
    found = results(samples, next(iter(evaluation.models), None))
    write_rows(out / "results.jsonl", found)
    return samples, found


def _identify(path: Path, identity: Row, has_begun: bool) -> None:
    """Write the run's identity down, or compare it with the one that has begun: also in the order of its parts."""
    if not has_begun or not path.exists():
        write = json.dumps(identity, indent=1, ensure_ascii=False)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(write + "\n", encoding="utf-8")
        partial.replace(path)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    differ = [key for key in {**before, **identity} if json.dumps(before.get(key)) != json.dumps(identity.get(key))]
    if differ:
        shown = "; ".join(f"{key} was {before.get(key)!r}, is {identity.get(key)!r}" for key in differ)
        raise ValueError(f"--out {path.parent}: it holds another run ({shown}); give another folder")


def _solve(evaluation: Evaluation, label: str, journal: Journal, out: Path) -> Iterator[Row]:
    """The rows of one model, in their order. It is loaded only where something is left to solve."""
    asker: Asker | None = None
    started, solved, tokens = time.monotonic(), 0, 0
    for stage in (_first_stage, _second_stage):
        units = stage(evaluation, label, journal)
        todo = [unit for unit in units if unit.key not in journal.units]
        if todo:
            if asker is None:
                asker = evaluation.models[label]()
                asker.check([*evaluation.settings, *([Setting("cap")] if evaluation.auto_caps else [])])
            by_key = {unit.key: unit for unit in todo}
            cases: dict[str, Case] = {}
            at_once = JOBS_PER_SLOT * asker.llm.engine.config.max_num_seqs
            with tqdm(total=len(units), initial=len(units) - len(todo), desc=label, unit="unit") as bar:
                for key, answers in run_jobs(asker.llm.engine, _jobs(asker, todo, cases), at_once):
                    unit, case = by_key[key], cases.pop(key)
                    journal.add(key, [asker.row(unit.task, case, answer) for answer in answers])
                    solved += 1
                    tokens += sum(answer.cost_tokens for answer in answers)
                    bar.set_postfix_str(f"{tokens / (time.monotonic() - started):.0f} tok/s", refresh=False)
                    bar.update()
    if solved:
        spent = {"model": label, "units": solved, "seconds": round(time.monotonic() - started, 3), "tokens": tokens}
        with (out / "timings.jsonl").open("a") as file:
            file.write(json.dumps(spent) + "\n")
    done = [*_first_stage(evaluation, label, journal), *_second_stage(evaluation, label, journal)]
    for unit in done:
        yield from journal.units[unit.key]


def _jobs(asker: Asker, units: list[Unit], cases: dict[str, Case]) -> Iterator[tuple[str, Job]]:
    for unit in units:
        case = cases[unit.key] = asker.case(unit.problem, unit.sample, list(unit.settings))
        yield unit.key, job(case, unit.settings)


def _first_stage(evaluation: Evaluation, label: str, journal: Journal) -> list[Unit]:
    """All settings that are known; where caps are not, all that do not share a trunk with them but the natural one."""
    settings = evaluation.settings
    if evaluation.auto_caps:
        settings = {setting: count for setting, count in settings.items() if setting.strategy != "ignore"}
    return _units(evaluation, label, dict.fromkeys(evaluation.tasks, settings))


def _second_stage(evaluation: Evaluation, label: str, journal: Journal) -> list[Unit]:
    """The caps that follow from the natural lengths, by task, and what shares a trunk with them."""
    if not evaluation.auto_caps:
        return []
    natural = {Setting("plain"): evaluation.settings[Setting("plain")]}
    ignoring = {s: count for s, count in evaluation.settings.items() if s.strategy == "ignore"}
    settings: dict[str, dict[Setting, int]] = {}
    for task in evaluation.tasks:
        rows = [row for unit in _units(evaluation, label, {task: natural}) for row in journal.units[unit.key]]
        median = statistics.median(row["thinking_tokens"] for row in rows)
        caps = [max(1, round(median * k / AUTO_CAPS)) for k in range(1, AUTO_CAPS + 1)]
        settings[task] = {**{Setting("cap", cap): evaluation.auto_caps for cap in caps}, **ignoring}
    return _units(evaluation, label, settings)


def _units(evaluation: Evaluation, label: str, settings: dict[str, dict[Setting, int]]) -> list[Unit]:
    """Units of settings, by task: those that one sweep gives go together."""
    units = []
    for task, counts in settings.items():
        together = sorted(counts, key=lambda setting: setting.strategy not in FORCED)
        for forced, group in groupby(together, key=lambda setting: setting.strategy in FORCED):
            members = list(group)
            for problem in evaluation.tasks[task]:
                for sample in range(max(counts[setting] for setting in members)):
                    wanted = [setting for setting in members if sample < counts[setting]]
                    for chosen in [tuple(wanted)] if forced else [(setting,) for setting in wanted]:
                        units.append(Unit(label, task, chosen, problem, sample))
    return units


def _graded(rows: list[Row], tasks: dict[str, list[Problem]]) -> list[Row]:
    """Rows with their grades, sorted by model, task, setting, problem and sample, each in the order of its first."""
    problems = {(task, problem.id): problem for task in tasks for problem in tasks[task]}
    of = [problems[row["task"], row["problem"]] for row in rows]
    with Grader() as grader:
        grades = grader.grade(
            [row["text"] if row["readable"] else "" for row in rows],
            [problem.answer for problem in of],
            [problem.kind for problem in of],
            [problem.choices for problem in of],
        )
    ranks: dict[Any, int] = {}

    def rank(*key: Any) -> int:
        return ranks.setdefault(key, len(ranks))

    graded = []
    for row, problem, grade in zip(rows, of, grades, strict=True):
        row = {key: value for key, value in row.items() if key != "readable"}
        row |= {"extracted": grade.extracted, "gold": problem.answer, "correct": grade.correct, "reason": grade.reason}
        place = (row["model"], row["task"])
        order = (rank(*place), rank(*place, row["strategy"], row["value"]), rank(row["task"], row["problem"]))
        graded.append((*order, row["sample"], row))
    graded.sort(key=lambda entry: entry[:-1])
    return [entry[-1] for entry in graded]
