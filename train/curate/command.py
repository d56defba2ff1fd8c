"""`s1engine curate`: each stage by itself, and `run`, which chains them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from s1engine.train.curate import options
from s1engine.train.curate.report import Report, funnel
from s1engine.train.curate.rows import check_output, read_rows, write_rows
from s1engine.train.curate.stages import STAGES, check_plan, columns_of

DESCRIPTION = """\
From many questions with reasoning traces to a small training set, in the stages of s1 (arXiv 2501.19393, section 2).
Beside its rows, each stage writes what it removed and why: NAME.report.json and NAME.removed.jsonl."""
EXAMPLES = {
    "quality": "s1engine curate quality --input pool.jsonl --output quality.jsonl --require question answer",
    "decontaminate": "s1engine curate decontaminate --input quality.jsonl --output clean.jsonl --against math500.jsonl",
    "difficulty": (
        "s1engine curate difficulty --input clean.jsonl --output hard.jsonl \\\n"
        "    --model Qwen/Qwen2.5-7B-Instruct Qwen/Qwen2.5-32B-Instruct --tokenizer Qwen/Qwen2.5-7B-Instruct"
    ),
    "label": (
        "s1engine curate label --input hard.jsonl --output labelled.jsonl \\\n"
        "    --endpoint http://localhost:8000/v1 --label-model Qwen/Qwen2.5-32B-Instruct"
    ),
    "select": "s1engine curate select --input labelled.jsonl --output s1k.jsonl --size 1000 --seed 0",
    "run": (
        "s1engine curate run --config curate.toml --size 1000 --output curated/, where curate.toml holds\n"
        '    input = ["pool.jsonl"]\n'
        '    tokenizer = "Qwen/Qwen2.5-7B-Instruct"\n'
        "    [decontaminate]\n"
        '    against = ["math500.jsonl", "aime24.jsonl"]\n'
        "    [difficulty]\n"
        '    model = ["Qwen/Qwen2.5-7B-Instruct"]\n'
        "    [label]\n"
        '    label-model = "Qwen/Qwen2.5-7B-Instruct"'
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "example: s1engine curate run --help"
    stages = parser.add_subparsers(dest="stage", required=True, metavar="stage")

    def add(name: str, help: str, *parts: Callable[[argparse.ArgumentParser], None]) -> argparse.ArgumentParser:
        stage = stages.add_parser(
            name,
            help=help,
            description=help,
            epilog=f"example: {EXAMPLES[name]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        for part in parts:
            part(stage)
        if name != "run":
            options.add_io(stage, "the .jsonl or .parquet file to write")
        return stage

    o = options
    add("quality", "drop API errors, missing fields and bad formatting", o.add_quality)
    add("decontaminate", "drop questions of evaluation sets, and repeated ones", o.add_decontaminate)
    add(
        "difficulty",
        "drop what models solve; measure traces",
        o.add_difficulty,
        o.add_models,
        o.add_replies,
        o.add_seed,
    )
    add("label", "give each question a domain", o.add_label, o.add_models, o.add_replies, o.add_seed)
    add("select", "draw the training set", o.add_select, o.add_seed)
    run = add("run", "all stages, one after the other; run again, it asks models nothing twice")
    run.add_argument("--config", action=o.ReadConfig, help="a .toml or .json file of these options; flags after it win")
    o.add_io(run, "the folder to write: a file and a report for each stage, and funnel.md")
    run.add_argument("--format", choices=("jsonl", "parquet"), default="jsonl", help="of the rows")
    run.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="leave some out (all)")
    for part in (
        o.add_quality,
        o.add_decontaminate,
        o.add_difficulty,
        o.add_label,
        o.add_models,
        o.add_select,
        o.add_seed,
    ):
        part(run)


def run(args: argparse.Namespace) -> int:
    if not args.output:
        raise ValueError("--output: name the folder to write" if args.stage == "run" else "--output: name a file")
    if args.stage == "run":
        return _run_all(args)
    check_output(args.output, args.input)
    rows = read_rows(args.input, args.question_column)
    replies = getattr(args, "replies", None) or Path(args.output).with_suffix(".replies.jsonl")
    kept, report = STAGES[args.stage](rows, columns_of(args, rows), args, Path(replies))
    write_rows(args.output, kept)
    report.write(args.output)
    print(funnel([report]), end="")
    return 0


def _run_all(args: argparse.Namespace) -> int:
    out = Path(args.output)
    rows = read_rows(args.input, args.question_column)
    check_plan(args, rows)
    reports: list[Report] = []
    for number, stage in enumerate((name for name in STAGES if name in args.stages), 1):
        name = f"{number}-{stage}"
        rows, report = STAGES[stage](rows, columns_of(args, rows), args, out / f"{stage}.replies.jsonl")
        reports.append(report)
        write_rows(out / f"{name}.{args.format}", rows)
        report.write(out / f"{name}.{args.format}")
        if not rows:
            print(funnel(reports), end="")
            raise ValueError(f"{stage} removed every row; {out / name}.removed.jsonl says why")
    table = funnel(reports)
    (out / "funnel.md").write_text(table, encoding="utf-8")
    (out / "report.json").write_text(json.dumps([r.as_dict() for r in reports], indent=2, ensure_ascii=False) + "\n")
    print(table, end="")
    return 0
