"""The report of an evaluation: one HTML file with figures, tables and the worst samples, whole in itself."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from s1engine.bench.reasoning import figures, tables
from s1engine.bench.reasoning.transcript import ENDS, definitions, escape, transcript, worst

Row = dict[str, Any]
CAPTIONS = {
    "scaling": (
        "Accuracy over thinking tokens",
        "Bars are 95 % intervals. Beside a point stands its setting's value: tokens of a cap, number of ignored ends.",
    ),
    "parallel": (
        "Sequential against parallel",
        "The same accuracies over all tokens generated per problem, beside the majority of k samples without a budget.",
    ),
    "length": (
        "Length produced over length asked for",
        "The line is obedience. L1, no budget: tokens of the whole output; caps and other requests: thinking tokens.",
    ),
    "length-accuracy": ("Accuracy over length", "Over the tokens of the whole output, for all strategies alike."),
    "length-error": ("Error of length", "Mean length above the one asked for, in percent of it."),
    "keywords": ("Patterns of reasoning", "Words of each group per 1,000 tokens of the model's own thinking."),
}
STYLE = """
:root { color-scheme: light dark; --ground: #fff; --text: #1c1e21; --dim: #5c6370; --line: #d5d9df; --stripe: #f5f6f8;
  --mark: #ffe08a; --wrong: #b3261e; --right: #1b7a3d }
@media (prefers-color-scheme: dark) { :root { --ground: #16181c; --text: #e4e6ea; --dim: #9aa1ad; --line: #363b44;
  --stripe: #1d2025; --mark: #7a5c00; --wrong: #ff8a80; --right: #7fd89a } }
body { background: var(--ground); color: var(--text); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 68rem; padding: 1rem }
h1, h2, h3, h4 { line-height: 1.2; margin: 2rem 0 .5rem } h1 { margin-top: .5rem }
h2 { border-top: 2px solid var(--line); padding-top: 1rem }
p { max-width: 46rem } a { color: inherit } nav a { margin-right: 1rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: .5rem 0 }
dt { color: var(--dim) } dd { margin: 0; overflow-wrap: anywhere }
figure { margin: 0 } figcaption { color: var(--dim); margin-bottom: .5rem }
img { background: #fff; border-radius: 6px; display: block; height: auto; max-width: 100%; min-width: 34rem }
.scroll { margin: 1rem 0; overflow-x: auto }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums }
caption { color: var(--dim); padding-bottom: .3rem; text-align: left }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .5rem; text-align: right; vertical-align: bottom }
th { font-weight: 600 } td { white-space: nowrap } tbody tr:nth-child(even) { background: var(--stripe) }
.t { text-align: left }
details { border: 1px solid var(--line); border-radius: 6px; margin: .4rem 0; padding: .4rem .7rem }
summary { cursor: pointer; overflow-wrap: anywhere } .wrong { color: var(--wrong) } .right { color: var(--right) }
pre { background: var(--stripe); border-radius: 6px; font-size: .8125rem; line-height: 1.45; margin: .5rem 0;
  padding: .6rem; overflow-wrap: anywhere; white-space: pre-wrap }
mark { background: var(--mark); border-radius: 3px; color: inherit; outline: 1px solid var(--dim) }
.cut { color: var(--dim); font-style: italic }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr } dd { margin-bottom: .3rem } }
"""
# A model's text is escaped; were it not, this still loads and runs nothing.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(
    path: str | Path, title: str, samples: Iterable[Row], results: list[Row], facts: dict[str, str]
) -> dict[str, bytes]:
    """Writes the report. Equal input gives equal bytes. Returns its figures, PNG, by "TASK-NAME".

    Args:
        samples: rows of samples; read once, and few are kept.
        results: rows of results, of every kind.
        facts: what was run, in order: name and value, as model, device, versions, settings.

    Raises:
        ValueError: results has no setting, a sample's forced spans do not fit its text, or matplotlib is not installed.
    """
    by_task = figures.by_task(results)
    if not by_task:
        raise ValueError(f"results has {len(results)} rows and none of kind 'setting': give the rows of a run")
    links = "".join(f'<a href="#task-{at}">{escape(task)}</a> ' for at, task in enumerate(by_task))
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n',
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n",
        f'<nav>{links}<a href="#samples">Samples</a></nav>\n',
        definitions(facts),
        "<p>Intervals are 95 %, by bootstrap over problems. A difference is paired: over the same problems, against "
        "the setting that its row names. Where every problem has the same result the interval has no width; the result "
        "is not certain for that.</p>\n",
    ]
    drawn = {task: figures.draw([row for row in results if row["task"] == task]) for task in by_task}
    for at, (task, rows) in enumerate(by_task.items()):
        of_task = [row for row in results if row["task"] == task]
        parts += [f'<h2 id="task-{at}">{escape(task)}</h2>\n', *_task(of_task, rows, drawn[task])]
    parts += _samples(samples)
    Path(path).write_text("".join(parts) + "</body>\n</html>\n", encoding="utf-8", newline="\n")
    return {f"{task}-{name}": png for task, pngs in drawn.items() for name, png in pngs.items()}


def _task(results: list[Row], rows: list[Row], drawn: dict[str, bytes]) -> Iterable[str]:
    def figure(name: str) -> str:
        heading, caption = CAPTIONS[name]
        source = "data:image/png;base64," + b64encode(drawn[name]).decode()
        image = f'<img alt="{heading}; the numbers are in the table below" src="{source}">'
        return (
            f"<h3>{heading}</h3>\n<figure><figcaption>{caption}</figcaption>\n"
            f'<div class="scroll">{image}</div></figure>\n'
        )

    yield figure("scaling") if "scaling" in drawn else f"<h3>{CAPTIONS['scaling'][0]}</h3>\n"
    yield tables.settings(rows)
    yield "<h3>Thinking and answer</h3>\n" + tables.lengths(rows)
    if "parallel" in drawn:
        yield figure("parallel") + tables.parallel(rows)
    asking = figures.asking(rows)
    if asking:
        yield "".join(figure(name) for name in ("length", "length-accuracy", "length-error") if name in drawn)
        yield tables.requests(asking)
    matched = [row for row in results if row["kind"] == "matched"]
    if matched:
        yield "<h3>At the same lengths as caps</h3>\n" + tables.matched(matched)
    summaries = [row for row in results if row["kind"] == "summary"]
    if summaries:
        yield "<h3>Summary</h3>\n" + tables.summaries(summaries)
    if "keywords" in drawn:
        yield figure("keywords") + tables.keywords([row for row in results if row["kind"] == "keywords"])


def _samples(samples: Iterable[Row]) -> Iterable[str]:
    yield '<h2 id="samples">Samples</h2>\n'
    chosen = worst(samples)
    if not chosen:
        yield "<p>There are none.</p>\n"
        return
    yield (
        f"<p>Of each setting the wrong ones with the most thinking tokens come first; {len(chosen)} are shown. "
        "<mark>Marked text</mark> was written by the engine, not by the model. Of a text of more than "
        f"{2 * ENDS:,} characters the two ends are shown.</p>\n"
    )
    for task, of_task in groupby(chosen, key=lambda row: str(row["task"])):
        yield f"<h3>{escape(task)}</h3>\n"
        yield from map(transcript, of_task)
