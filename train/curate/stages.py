"""From the command line's options to each stage's arguments, and what has to hold before a long run begins."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s1engine.train.curate.decontaminate import decontaminate
from s1engine.train.curate.difficulty import Solving, difficulty, grade_attempts, trace_lengths
from s1engine.train.curate.endpoint import Endpoint
from s1engine.train.curate.labels import label
from s1engine.train.curate.quality import quality
from s1engine.train.curate.replies import Asking, Model, Replies
from s1engine.train.curate.report import Report
from s1engine.train.curate.rows import ROLES, Columns, Row, question_key, read_rows, text
from s1engine.train.curate.select import Selection, select

if TYPE_CHECKING:
    from s1engine import ThinkingBudget

Result = tuple[list[Row], Report]


def check_plan(args: argparse.Namespace, rows: Sequence[Row]) -> None:
    """Raises ValueError for what a later stage would lack, before an earlier one has done its work."""
    columns = columns_of(args, rows)
    for stage in args.stages:
        if stage == "quality":
            columns.require(rows, *(role for role in args.require if role in ROLES))
        if stage == "difficulty":
            _check_difficulty(args, rows, columns)
        if stage == "label":
            _check_label(args, rows, columns)
    if "select" in args.stages:
        _selection(args)
        if "label" not in args.stages:
            columns.require(rows, "domain")
        if not ("difficulty" in args.stages and args.tokenizer) and not columns.has(rows, "length"):
            raise ValueError(
                f"select: it draws by the length of traces; give --tokenizer to measure them with, or --length-column "
                f"(looked for {columns.length})"
            )
    if "decontaminate" in args.stages:
        _against(args.against)


def columns_of(args: argparse.Namespace, rows: Sequence[Row]) -> Columns:
    return Columns.find(rows, {role: getattr(args, f"{role}_column") for role in ROLES})


def _quality(rows: list[Row], columns: Columns, args: argparse.Namespace, replies: Path) -> Result:
    return quality(rows, columns, args.require)


def _decontaminate(rows: list[Row], columns: Columns, args: argparse.Namespace, replies: Path) -> Result:
    return decontaminate(rows, columns, _against(args.against), n=args.words, add_accepted=args.add_accepted)


def _against(sources: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Evaluation sets by name: each its (label, question) pairs."""
    if not sources:
        raise ValueError("--against: name the evaluation sets whose questions may not be trained on")
    sets = {}
    for source in sources:
        rows = read_rows([source])
        columns = Columns.find(rows)
        columns.require(rows, "question")
        name = Path(source).stem if Path(source).exists() else source
        questions = [text(row, columns.question) for row in rows]
        labels = [str(row.get("id", question_key(question))) for row, question in zip(rows, questions, strict=True)]
        sets[name if name not in sets else source] = list(zip(labels, questions, strict=True))
    return sets


def _check_difficulty(args: argparse.Namespace, rows: Sequence[Row], columns: Columns) -> None:
    if args.tokenizer:
        columns.require(rows, "trace")
    if args.model:
        from s1engine import SamplingParams

        columns.require(rows, "question", "answer")
        SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens, thinking=_budget(args))
    if not args.model and not args.tokenizer and not _gradable(rows, columns):
        raise ValueError("difficulty: nothing to do; give --model to solve with, or --tokenizer to measure traces with")


def _gradable(rows: Sequence[Row], columns: Columns) -> bool:
    """Whether there are attempts to grade, and nobody has graded them yet."""
    return columns.has(rows, "attempt") and columns.has(rows, "answer") and not columns.has(rows, "correct")


def _difficulty(rows: list[Row], columns: Columns, args: argparse.Namespace, replies: Path) -> Result:
    from s1engine.bench.reasoning.grading import Grader

    _check_difficulty(args, rows, columns)
    notes: dict[str, Any] = {}
    if args.tokenizer:
        from transformers import AutoTokenizer

        rows = trace_lengths(rows, columns, AutoTokenizer.from_pretrained(args.tokenizer))
        lengths = [row[columns.length] for row in rows if row[columns.length] is not None]
        notes["traces"] = {"measured": len(lengths), "tokens": sum(lengths), "longest": max(lengths, default=0)}
    solving = Solving(args.suffix, args.temperature, args.kind, args.drop_unreadable)
    settings = {**_engine_settings(args), "max_tokens": args.max_tokens, "seed": args.seed, **_budget_options(args)}

    def load(model: str) -> Model:
        return _engine_model(args, model, max_tokens=args.max_tokens, thinking=_budget(args))

    with Grader() as grader:
        if _gradable(rows, columns):
            rows = grade_attempts(rows, columns, grader, args.kind)
            verdicts = [row[columns.correct] for row in rows]
            notes["attempts"] = {
                "right": verdicts.count(True),
                "wrong": verdicts.count(False),
                "not to be graded": verdicts.count(None),
            }
        if args.model:
            kept, report = difficulty(rows, columns, args.model, load, Replies(replies), grader, settings, solving)
        else:
            kept, report = rows, Report("difficulty", len(rows))
            report.step("difficulty", len(rows))
    report.notes = notes | report.notes
    return kept, report


def _engine_model(args: argparse.Namespace, model: str, **options: Any) -> Model:
    from s1engine.train.curate.engine_model import EngineModel

    return EngineModel(model, device=args.device, max_num_seqs=args.max_num_seqs, **options, **_engine_settings(args))


def _engine_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What changes the replies of a model of this engine."""
    return {
        "dtype": args.dtype,
        "quantization": args.quantization,
        "max_model_len": args.max_model_len,
        "thinking_format": args.thinking_format,
    }


def _budget_options(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("thinking_tokens", "ignore_end", "min_answer_tokens")}


def _budget(args: argparse.Namespace) -> ThinkingBudget | None:
    from s1engine import ThinkingBudget

    if tuple(_budget_options(args).values()) == (None, 0, 0):
        return None
    return ThinkingBudget(
        max_tokens=args.thinking_tokens, ignore_end=args.ignore_end, min_answer_tokens=args.min_answer_tokens
    )


def _check_label(args: argparse.Namespace, rows: Sequence[Row], columns: Columns) -> None:
    if args.endpoint and not args.label_model:
        raise ValueError("--endpoint: give --label-model as well, the model's name there")
    if not args.label_model and not columns.has(rows, "domain"):
        raise ValueError(
            f"label: give --label-model (with --endpoint, where it is on a server), or --domain-column for labels that "
            f"are there (looked for {columns.domain})"
        )
    if args.endpoint:
        _endpoint(args)


def _endpoint(args: argparse.Namespace) -> Endpoint:
    return Endpoint(
        args.endpoint,
        args.label_model,
        api_key=os.environ.get(args.api_key_env),
        max_tokens=args.label_max_tokens,
        concurrency=args.concurrency,
    )


def _label(rows: list[Row], columns: Columns, args: argparse.Namespace, replies: Path) -> Result:
    _check_label(args, rows, columns)
    if not args.label_model:
        return label(rows, columns, None)

    def load() -> Model:
        if args.endpoint:
            return _endpoint(args)
        return _engine_model(args, args.label_model, max_tokens=args.label_max_tokens, answer_only=True)

    settings = {"endpoint": args.endpoint, "max_tokens": args.label_max_tokens, "seed": args.seed}
    if not args.endpoint:
        settings |= _engine_settings(args)
    known = Replies(replies)
    asking = Asking(load, known, args.label_model, settings, args.label_temperature)
    return label(rows, columns, asking)


def _selection(args: argparse.Namespace) -> Selection:
    return Selection(
        args.size,
        args.uniform_until,
        args.math_tokens,
        args.gpqa_share,
        args.aime_source,
        args.gpqa_source,
        args.math_source,
        args.seed,
    )


def _select(rows: list[Row], columns: Columns, args: argparse.Namespace, replies: Path) -> Result:
    return select(rows, columns, _selection(args))


STAGES: dict[str, Callable[[list[Row], Columns, argparse.Namespace, Path], Result]] = {
    "quality": _quality,
    "decontaminate": _decontaminate,
    "difficulty": _difficulty,
    "label": _label,
    "select": _select,
}
