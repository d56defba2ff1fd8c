"""Figures: which there are, what they draw at which place, and that equal rows give equal bytes."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from itertools import combinations
from typing import Any

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from result_rows import keyword_rows, setting_row

from s1engine.bench.reasoning import figures, panels
from s1engine.bench.reasoning.panels import Panel, Point, Series

Row = dict[str, Any]
VOTES = {
    "majority_at": {
        "8": {"accuracy": 0.75, "low": 0.7, "high": 0.8},
        "1": {"accuracy": 0.5, "low": 0.4, "high": 0.625},
    },
    "pass_at": {"1": 0.5, "8": 0.9},
}
CAPS = [setting_row("cap", cap, thinking_tokens=0.9 * cap, accuracy=cap / 100) for cap in (8, 64, 16)]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Row]], list[Panel]]:
    """The panels that a figure would draw."""
    found: list[Panel] = []
    monkeypatch.setattr(figures, "curves", lambda panels, *labels, **options: found.extend(panels))

    def panels_of(figure: Callable[[list[Row]], Any], rows: list[Row]) -> list[Panel]:
        found.clear()
        figure(rows)
        return [panel for panel in found if any(one.points for one in panel.series)]

    return panels_of


@pytest.fixture
def canvas(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn, as matplotlib has them."""
    found = []

    def png(size: tuple[float, float], fill: Callable[[Figure], None]) -> bytes:
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        fill(figure)
        found.append(figure)
        return b""

    monkeypatch.setattr(panels, "png", png)
    return found


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        ([], set()),
        ([setting_row()], {"scaling"}),
        (CAPS, {"scaling"}),
        ([setting_row(**VOTES)], {"scaling", "parallel"}),
        ([setting_row("majority", 4)], {"parallel"}),
        ([setting_row("token", 64)], {"scaling", "length", "length-accuracy", "length-error"}),
        ([setting_row("l1-max", 64)], {"length", "length-accuracy", "length-error"}),
        ([setting_row("l1-max", 64, accuracy=None, low=None, high=None)], {"length", "length-error"}),
        (keyword_rows("cap", 8), {"keywords"}),
    ],
)
def test_a_figure_is_only_made_where_its_data_exist(rows: list[Row], names: set[str]) -> None:
    assert set(figures.draw(rows)) == names


def test_equal_rows_give_equal_bytes_whatever_the_users_settings_are() -> None:
    rows = [setting_row(**VOTES), *CAPS, setting_row("l1-exact", 64), *keyword_rows()]
    first = figures.draw(rows)
    assert set(first) == set(figures.FIGURES)
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red"}):
        before = dict(matplotlib.rcParams)
        assert figures.draw(rows) == first
        assert dict(matplotlib.rcParams) == before
    for png in first.values():
        assert _chunks(png) <= {"IHDR", "pHYs", "IDAT", "IEND"}  # no text: no date, no version


def _chunks(png: bytes) -> set[str]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    kinds, at = set(), 8
    while at < len(png):
        length, kind = struct.unpack_from(">I4s", png, at)
        kinds.add(kind.decode())
        at += 12 + length
    return kinds


def test_scaling_is_accuracy_over_thinking_tokens_in_order_of_the_values(drawn: Any) -> None:
    rows = [*CAPS, setting_row("ignore", 2), setting_row(), setting_row("best", 4), setting_row("l1-max", 64)]
    (panel,) = drawn(figures.scaling, rows)
    assert [one.strategy for one in panel.series] == ["plain", "cap", "ignore"]
    assert [(p.x, p.y, p.label) for p in panel.series[1].points] == [
        (pytest.approx(7.2), pytest.approx(8), "8"),
        (pytest.approx(14.4), pytest.approx(16), "16"),
        (pytest.approx(57.6), pytest.approx(64), "64"),
    ]
    assert panel.series[0].points == [Point(32.25, 50, "", (30.5, 34.75), (40, 62.5))]
    assert panel.series[2].points[0].label == "2\N{MULTIPLICATION SIGN}"


def test_tasks_are_panels_and_models_are_lines(drawn: Any) -> None:
    rows = [setting_row(model=model, task=task) for model in ("b", "a") for task in ("t", "s")]
    found = drawn(figures.scaling, rows)
    assert [(panel.title, [one.model for one in panel.series]) for panel in found] == [
        ("t, 50 problems", ["b", "a"]),
        ("s, 50 problems", ["b", "a"]),
    ]


def test_a_vote_of_k_costs_k_outputs(drawn: Any) -> None:
    rows = [setting_row(**VOTES), setting_row("cap", 8, cost_tokens=20.5, **VOTES), setting_row("majority", 4)]
    (panel,) = drawn(figures.parallel, rows)
    found = {one.strategy: one.points for one in panel.series}
    assert set(found) == {"plain", "cap", "majority", "vote"}
    assert [(p.x, p.y, p.label) for p in found["vote"]] == [(40.5, 50, ""), (324, 75, "k=8")]
    assert found["vote"][1].y_interval == (pytest.approx(70), pytest.approx(80))
    assert found["cap"][0].x == 20.5


def test_lengths_count_the_output_for_l1_and_the_thinking_for_a_cap(drawn: Any) -> None:
    rows = [setting_row(), setting_row("l1-exact", 81), setting_row("cap", 43), setting_row("cap", 0)]
    (panel,) = drawn(figures.length, rows)
    assert [(one.strategy, [p[:2] for p in one.points]) for one in panel.series] == [
        ("cap", [(43, 32.25)]),
        ("l1-exact", [(81, 40.5)]),
    ]
    assert panel.levels == [("tiny", 40.5)]
    (panel,) = drawn(figures.length_error, rows)
    assert [one.points[0].y for one in panel.series] == [-25, -50]
    (panel,) = drawn(figures.length_accuracy, rows)
    assert [(one.strategy, one.points[0].x) for one in panel.series] == [
        ("plain", 40.5),
        ("cap", 40.5),
        ("l1-exact", 40.5),
    ]


@pytest.mark.parametrize("figure", [figures.length, figures.length_accuracy, figures.length_error])
def test_of_models_that_are_compared_with_caps_only_those_caps_are_drawn(drawn: Any, figure: Any) -> None:
    asked = [setting_row("l1-exact", 16, model="l1")]
    rows = CAPS + [cap | {"model": "l1"} for cap in CAPS] + asked
    lines = {(one.model, one.strategy) for one in drawn(figure, rows)[0].series}
    assert lines == {("tiny", "cap"), ("l1", "cap"), ("l1", "l1-exact")}
    compared = {"kind": "matched", "model": "l1", "task": "sums", "to": "tiny"}
    lines = {(one.model, one.strategy) for one in drawn(figure, [*rows, compared])[0].series}
    assert lines == {("tiny", "cap"), ("l1", "l1-exact")}


def test_models_that_were_only_run_without_a_budget_have_their_length_drawn(canvas: list[Figure]) -> None:
    rows = [setting_row("l1-max", 64, model=name) for name in "ab"] + [setting_row(model="c", output_tokens=77.0)]
    figures.length(rows)
    assert [77, 77] in [list(line.get_ydata()) for line in canvas[0].axes[0].lines]
    assert [text.get_text() for text in canvas[0].legends[0].get_texts()][-3:] == ["a", "b", "c"]


def test_settings_without_an_accuracy_are_left_out(drawn: Any) -> None:
    none = dict.fromkeys(("accuracy", "low", "high"))
    (panel,) = drawn(figures.scaling, [setting_row("cap", 8, **none), setting_row("cap", 16)])
    assert [point.label for point in panel.series[0].points] == ["16"]


@pytest.mark.parametrize(
    ("tokens", "scale"), [([100, 400], "linear"), ([100, 600], "log"), ([0, 100, 600], "symlog"), ([0], "linear")]
)
def test_a_wide_range_of_tokens_is_drawn_over_log2(canvas: list[Figure], tokens: list[int], scale: str) -> None:
    figures.scaling([setting_row("cap", cap, thinking_tokens=float(cap), thinking_low=cap) for cap in tokens])
    axes = canvas[0].axes[0]
    assert axes.get_xscale() == scale
    assert scale == "linear" or axes.xaxis.get_transform().base == 2
    assert sorted(axes.lines[0].get_xdata()) == tokens


def test_a_colour_is_a_model_or_with_one_model_a_strategy(canvas: list[Figure]) -> None:
    one = [setting_row("cap", 8), setting_row("ignore", 1, thinking_tokens=50)]
    figures.scaling(one)
    figures.scaling(one + [row | {"model": "other"} for row in one])

    def colours(figure: Figure) -> list[Any]:
        return [line.get_color() for line in figure.axes[0].lines if line.get_linestyle() != "None"]

    alone, two = colours(canvas[0]), colours(canvas[1])
    assert alone[0] != alone[1]
    assert two[0] == two[1] != two[2] == two[3]
    assert [text.get_text() for text in canvas[1].legends[0].get_texts()][-2:] == ["tiny", "other"]


def test_labels_cover_neither_each_other_nor_a_marker(canvas: list[Figure]) -> None:
    accuracies = [0.1, 0.15, 0.22, 0.3, 0.36, 0.41, 0.45, 0.48]
    rows = [
        setting_row("cap", 1000 * k, model=model, thinking_tokens=900.0 * k + shift, accuracy=accuracy + shift / 4000)
        | {
            "low": accuracy - 0.1,
            "high": accuracy + 0.1,
            "thinking_low": 880.0 * k,
            "thinking_high": 920.0 * k + 2 * shift,
        }
        for model, shift in (("a", 0), ("b", 60))
        for k, accuracy in enumerate(accuracies, start=1)
    ]
    figures.scaling(rows)
    axes = canvas[0].axes[0]
    labels = [text for text in axes.texts if isinstance(text, Annotation)]
    assert len(labels) == len(rows)
    boxes = [Text.get_window_extent(label) for label in labels]
    places = [axes.transData.transform(label.xy) for label in labels]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    assert not any(box.contains(*place) for box in boxes for place in places)
    frame = axes.get_window_extent()
    assert all(frame.contains(*corner) for box in boxes for corner in box.corners())


def test_intervals_are_drawn_to_their_ends(canvas: list[Figure]) -> None:
    figures.scaling([setting_row("cap", 8)])
    ends = [segment.tolist() for bars in canvas[0].axes[0].collections for segment in bars.get_segments()]
    assert sorted(ends) == [[[30.5, 50], [34.75, 50]], [[32.25, 40], [32.25, 62.5]]]


def test_keywords_are_bars_by_group_of_each_setting(monkeypatch: pytest.MonkeyPatch, canvas: list[Figure]) -> None:
    monkeypatch.setattr(figures, "png", panels.png)
    figures.keywords([*keyword_rows("cap", 64), *keyword_rows("cap", 8, per_1000_tokens=2.0)])
    axes = canvas[0].axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["cap 8", "cap 64"]
    middles = [round(bar.get_x() + bar.get_width() / 2) for bar in axes.patches]
    heights = [bar.get_height() for bar in axes.patches]
    assert sorted(zip(middles, heights, strict=True)) == [(0, 2), (0, 2), (0, 2), (1, 0), (1, 11.25), (1, 46.25)]


def test_names_are_no_formulas() -> None:
    assert figures.draw([setting_row(task="$\\frac{$"), *keyword_rows(model="$\\x$")])


def test_panels_are_left_out_where_they_have_no_points() -> None:
    assert panels.curves([Panel("empty", [Series("tiny", "cap", [])])], "x", "y") is None


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    with pytest.raises(ValueError, match=r"s1engine\[eval\]"):
        figures.draw([setting_row()])
