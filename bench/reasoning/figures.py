"""The figures of s1 (arXiv 2501.19393) and L1 (arXiv 2503.04697) from result rows, as PNGs.

Each function takes the rows of `results`, draws a panel per task, and gives None where the rows hold nothing for it.
Equal rows give equal bytes. A colour is a model, or where there is one model a strategy; a marker is a strategy; bars
are 95 % intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from s1engine.bench.reasoning.panels import COLOURS, LOOKS, Panel, Point, Series, curves, png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
ASKED = {  # strategies whose value is a number of tokens, and which tokens it is about
    "cap": "thinking_tokens",
    "token": "thinking_tokens",
    "token+cap": "thinking_tokens",
    "l1-exact": "output_tokens",
    "l1-max": "output_tokens",
}
OBEYING = ("token", "token+cap", "l1-exact", "l1-max")  # of these, the ones that ask the model
SEQUENTIAL = ("plain", "cap", "ignore")
PARALLEL = ("majority", "best")


def draw(results: list[Row]) -> dict[str, bytes]:
    """The PNG of each figure that the rows have data for, by its name in FIGURES.

    Raises:
        ValueError: matplotlib is not installed.
    """
    drawn = {name: figure(results) for name, figure in FIGURES.items()}
    return {name: png for name, png in drawn.items() if png is not None}


def scaling(results: list[Row]) -> bytes | None:
    """Accuracy over mean thinking tokens, one line a strategy (s1, figures 1 and 4a).

    Strategies that choose among completions are in `parallel`, L1's prompts in `length_accuracy`.
    """

    def point(row: Row) -> Point:
        return _accuracy(row, row["thinking_tokens"])._replace(x_interval=(row["thinking_low"], row["thinking_high"]))

    panels = []
    for task, rows in by_task(results).items():
        its = [row for row in graded(rows) if row["strategy"] not in (*PARALLEL, "l1-exact", "l1-max")]
        panels.append(Panel(_title(task, rows), _series(its, point)))
    return curves(panels, "thinking tokens per problem (mean)", "accuracy, %", percent=True)


def parallel(results: list[Row]) -> bytes | None:
    """Sequential against parallel: accuracy over all tokens generated per problem (s1, figure 4b)."""
    panels = []
    for task, rows in by_task(results).items():
        series = _series(compared(rows), lambda row: _accuracy(row, row["cost_tokens"]))
        for row in voted(rows):
            series.append(Series(row["model"], "vote", [_vote(row, k) for k in vote_sizes(row)]))
        panels.append(Panel(_title(task, rows), series))
    return curves(panels, "tokens generated per problem (mean)", "accuracy, %", percent=True)


def length(results: list[Row]) -> bytes | None:
    """Tokens produced over tokens asked for, the line of obedience, and the length without a budget (L1, figure 4)."""

    def point(row: Row) -> Point:
        interval = (row["thinking_low"], row["thinking_high"]) if ASKED[row["strategy"]] == "thinking_tokens" else None
        return Point(row["value"], produced(row), y_interval=interval)

    panels = []
    for task, rows in _comparing(results).items():
        plain = [(row["model"], row["output_tokens"]) for row in rows if row["strategy"] == "plain"]
        panels.append(Panel(_title(task, rows), _series(asking(rows), point), plain, guide="diagonal"))
    return curves(panels, "tokens asked for", "tokens produced (mean)")


def length_accuracy(results: list[Row]) -> bytes | None:
    """Accuracy over tokens of the whole output, of settings that ask for a length and of no budget (L1, figure 2)."""
    panels = []
    for task, rows in _comparing(results).items():
        its = asking(graded(rows))
        plain = [row for row in graded(rows) if its and row["strategy"] == "plain"]
        series = _series(plain + its, lambda row: _accuracy(row, row["output_tokens"]))
        panels.append(Panel(_title(task, rows), series))
    return curves(panels, "output tokens per problem (mean)", "accuracy, %", percent=True)


def length_error(results: list[Row]) -> bytes | None:
    """How far the mean length is above the one asked for, in percent of it."""
    panels = []
    for task, rows in _comparing(results).items():
        series = _series(asking(rows), lambda row: Point(row["value"], 100 * relative_error(row)))
        panels.append(Panel(_title(task, rows), series, guide="zero"))
    return curves(panels, "tokens asked for", "mean length above the request, %")


def keywords(results: list[Row]) -> bytes | None:
    """Words of verification, exploration and conclusion per 1,000 tokens, by setting (L1, section 5)."""
    rows = in_order(row for row in results if row["kind"] == "keywords")
    if not rows:
        return None
    groups = list(dict.fromkeys(row["group"] for row in rows))
    panels = {place: [r for r in rows if (r["task"], r["model"]) == place] for place in _places(rows)}
    widest = max(len({setting(row) for row in its}) for its in panels.values())

    def fill(figure: Figure) -> None:
        for number, ((task, model), its) in enumerate(panels.items(), start=1):
            axes = figure.add_subplot(len(panels), 1, number)
            names = list(dict.fromkeys(setting(row) for row in its))
            for at, (group, colour) in enumerate(zip(groups, COLOURS, strict=False)):
                bars = [row for row in its if row["group"] == group]
                x = [names.index(setting(row)) + 0.8 * ((at + 0.5) / len(groups) - 0.5) for row in bars]
                heights = [row["per_1000_tokens"] for row in bars]
                axes.bar(x, heights, 0.8 / len(groups), color=colour, label=group if number == 1 else None)
            axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
            axes.margins(x=0.01)
            axes.set_title(f"{task}, {model}", fontsize=10)
            axes.set_ylabel("words per 1,000 tokens")
            axes.grid(alpha=0.3, axis="y")
        figure.legend(loc="outside lower center", ncols=len(groups), frameon=False, fontsize=9)

    return png((min(9.0, max(7.0, 1.5 + 0.4 * widest)), 0.4 + 3.1 * len(panels)), fill)


FIGURES: dict[str, Callable[[list[Row]], bytes | None]] = {
    "scaling": scaling,
    "parallel": parallel,
    "length": length,
    "length-accuracy": length_accuracy,
    "length-error": length_error,
    "keywords": keywords,
}


def by_task(results: list[Row]) -> dict[str, list[Row]]:
    """The rows of settings of each task, in order."""
    rows = [row for row in results if row["kind"] == "setting"]
    return {task: in_order(row for row in rows if row["task"] == task) for task, _ in _places(rows)}


def _comparing(results: list[Row]) -> dict[str, list[Row]]:
    """By task, without the caps of models that nothing is compared with."""
    caps_of = {row["to"] for row in results if row["kind"] == "matched"}
    return {
        task: [row for row in rows if row["strategy"] != "cap" or not caps_of or row["model"] in caps_of]
        for task, rows in by_task(results).items()
    }


def in_order(rows: Iterable[Row]) -> list[Row]:
    """By model as they come, by strategy as in LOOKS, by value, numbers before words."""
    rows = list(rows)
    models = list(dict.fromkeys(row["model"] for row in rows))
    strategies = [*LOOKS, *sorted({row["strategy"] for row in rows} - set(LOOKS))]

    def key(row: Row) -> tuple[int, int, bool, int | str]:
        value = -1 if row["value"] is None else row["value"]
        return models.index(row["model"]), strategies.index(row["strategy"]), isinstance(value, str), value

    return sorted(rows, key=key)


def setting(row: Row) -> str:
    """The setting's strategy and value in a few characters, as "cap 512"."""
    return f"{row['strategy']} {value_label(row)}".strip()


def value_label(row: Row) -> str:
    value = row["value"]
    text = f"{value:,}" if isinstance(value, int) else value or ""
    return {"ignore": f"{text}\N{MULTIPLICATION SIGN}", "majority": f"k={text}", "best": f"k={text}"}.get(
        row["strategy"], text
    )


def graded(rows: list[Row]) -> list[Row]:
    """Without settings that have no problem with a gold answer that can be read."""
    return [row for row in rows if row["accuracy"] is not None]


def compared(rows: list[Row]) -> list[Row]:
    """The settings that sequential and parallel scaling are compared by; none where nothing is parallel."""
    its = [row for row in graded(rows) if row["strategy"] in SEQUENTIAL + PARALLEL]
    return its if voted(rows) or any(row["strategy"] in PARALLEL for row in its) else []


def asking(rows: list[Row]) -> list[Row]:
    """The settings that ask for a number of tokens; none where they are all caps, which cannot be disobeyed."""
    asked = [row for row in rows if row["strategy"] in ASKED and row["value"] > 0]
    return asked if any(row["strategy"] in OBEYING for row in asked) else []


def produced(row: Row) -> float:
    """The mean of the tokens that the setting's value is about."""
    return float(row[ASKED[row["strategy"]]])


def relative_error(row: Row) -> float:
    """(E[n] - N) / N for N tokens asked for and n produced (L1, section 4)."""
    return produced(row) / row["value"] - 1


def voted(rows: list[Row]) -> list[Row]:
    """The settings without a budget that have several samples a problem."""
    return [row for row in rows if row["strategy"] == "plain" and len(row.get("majority_at") or {}) > 1]


def vote_sizes(row: Row) -> list[Any]:
    """The keys of a row's majority_at by size; in a row that was read from JSON they are strings."""
    return sorted(row["majority_at"], key=int)


def _vote(row: Row, k: Any) -> Point:
    vote = row["majority_at"][k]
    label = f"k={k}" if int(k) > 1 else ""  # one vote is the setting itself
    return Point(int(k) * row["output_tokens"], 100 * vote["accuracy"], label, None, _percent(vote))


def _accuracy(row: Row, x: float) -> Point:
    return Point(x, 100 * row["accuracy"], value_label(row), None, _percent(row))


def _percent(row: Row) -> tuple[float, float]:
    return 100 * row["low"], 100 * row["high"]


def _series(rows: list[Row], point: Callable[[Row], Point]) -> list[Series]:
    """One for each model and strategy."""
    keys = dict.fromkeys((row["model"], row["strategy"]) for row in rows)
    return [Series(*key, [point(row) for row in rows if (row["model"], row["strategy"]) == key]) for key in keys]


def _places(rows: list[Row]) -> list[tuple[str, str]]:
    """Tasks and models in the order of their first rows, the models of a task together."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    return sorted(dict.fromkeys((row["task"], row["model"]) for row in rows), key=lambda place: tasks.index(place[0]))


def _title(task: str, rows: list[Row]) -> str:
    counts = sorted({row["problems"] for row in rows})
    return f"{task}, {'-'.join(f'{count:,}' for count in (counts[0], counts[-1])[: len(counts)])} problems"
