"""Scales, ticks and charts against places worked out by hand."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from koat.report.charts import (
    FOOT,
    NUM_COLOURS,
    ROW,
    SHAPES,
    Interval,
    Line,
    Point,
    draw_intervals,
    draw_lines,
    draw_scatter,
)
from koat.report.scales import Scale, fit_cost_scale, fit_scale, format_number, format_percent


class Elements(HTMLParser):
    """Collects every element with its attributes, and text by the element it stands in."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.texts.append((self.found[-1][0], data))

    def pick(self, tag: str, kind: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.found if name == tag and kind in attrs.get("class", "").split()]


def test_a_linear_scale_places_and_ticks() -> None:
    scale = Scale(0.5, 0.75)
    assert [scale.place(value) for value in (0.5, 0.6, 0.75)] == pytest.approx([0, 0.4, 1])
    assert scale.list_ticks() == pytest.approx([0.5, 0.55, 0.6, 0.65, 0.7, 0.75])
    assert Scale(-0.4, 0.6).list_ticks() == pytest.approx([-0.4, -0.2, 0, 0.2, 0.4, 0.6])


def test_a_logarithmic_scale_places_and_ticks() -> None:
    scale = Scale(1, 10_000, is_log=True)
    assert [scale.place(value) for value in (1, 10, 10_000)] == pytest.approx([0, 0.25, 1])
    assert scale.list_ticks() == [1, 10, 100, 1000, 10_000]
    assert Scale(2, 40, is_log=True).list_ticks() == [3, 10, 30]


def test_scales_end_at_round_values_within_their_bounds() -> None:
    assert fit_scale([0.512, 0.599]) == Scale(pytest.approx(0.5), pytest.approx(0.6))
    fitted = fit_scale([0.93, 1.0], floor_at=0, ceil_at=1)
    assert (fitted.low, fitted.high) == pytest.approx((0.92, 1.0))
    alike = fit_scale([5.0, 5.0])
    assert alike.low < 5 < alike.high
    zeros = fit_scale([0.0, 0.0], floor_at=0, ceil_at=1)
    assert (zeros.low, zeros.high) == (0, 1)


def test_costs_far_apart_are_logarithmic() -> None:
    assert not fit_cost_scale([10, 190]).is_log
    assert fit_cost_scale([10, 190]).low == 0
    assert fit_cost_scale([19_360, 8_820_160]).is_log


def test_numbers_are_short() -> None:
    assert [format_number(value) for value in (0.0512, 14.25, 19_360, 999_900, 5.8e9)] == [
        "0.0512", "14.2", "19.4k", "1M", "5.8G",
    ]  # fmt: skip
    assert [format_percent(share) for share in (0.5, -0.4, 0.925)] == ["50", "-40", "92.5"]


def test_intervals_stand_where_they_should() -> None:
    rows = [
        Interval("A", 0.6, 0.5, 0.7, "60.0 %", 0, (0.58, 0.62)),
        Interval("B", 0.55, 0.5, 0.75, "55.0 %", None),
    ]
    chart = Elements(draw_intervals(rows, Scale(0.5, 0.75), "scores", zero=0.5))
    first, second = chart.pick("line", "reach")
    assert (first["x1"], first["x2"]) == ("0.00%", "80.00%")
    assert (second["x1"], second["x2"], second["class"]) == ("0.00%", "100.00%", "reach plain")
    assert [float(line["y1"]) for line in (first, second)] == [32, 32 + ROW]
    assert [dot["cx"] for dot in chart.pick("circle", "seed")] == ["32.00%", "48.00%"]
    assert [mark["x"] for mark in chart.pick("svg", "mark")] == ["40.00%", "20.00%"]
    assert chart.pick("line", "zero")[0]["x1"] == "0.00%"
    assert ("title", "A: 60.0 %") in chart.texts
    whole = chart.found[0][1]
    assert (whole["role"], whole["aria-label"], whole["height"]) == ("img", "scores", str(2 * ROW + FOOT))


def test_figures_that_do_not_fit_beside_a_name_are_left_out() -> None:
    def list_figures(length: int) -> list[dict[str, str]]:
        rows = [Interval("n" * length, 0.5, 0.4, 0.6, "50.0 %", 0)]
        return Elements(draw_intervals(rows, Scale(0, 1), "")).pick("text", "figure")

    assert [figure["class"] for figure in list_figures(10)] == ["figure"]
    assert [figure["class"] for figure in list_figures(40)] == ["figure narrow"]
    assert list_figures(60) == []


def test_points_stand_where_they_should_and_names_keep_apart() -> None:
    points = [
        Point("LoRA", 100, 0.7, 0.6, 0.8, 0, "70 %"),
        Point("IA3", 10, 0.7, 0.65, 0.75, 1),
        Point("prefix", 10, 0.7, 0.65, 0.75, 2),
        Point("base", None, 0.5, 0.4, 0.6, 3),
    ]
    chart = Elements(draw_scatter(points, Scale(1, 10_000, is_log=True), Scale(0.4, 0.8), "cost"))
    assert [(mark["x"], mark["y"]) for mark in chart.pick("svg", "mark")] == [
        ("50.00%", "55.0"), ("25.00%", "55.0"), ("25.00%", "55.0"),
    ]  # fmt: skip
    reach = chart.pick("line", "reach")[0]
    assert (reach["y1"], reach["y2"]) == ("0.0", "110.0")
    assert chart.pick("line", "dashed")[0]["y1"] == "165.0"
    names = {(text["x"], text["y"]) for text in chart.pick("text", "name")}
    assert len(names) == 4 and ("25.00%", "61.0") in names


def test_lines_stand_where_they_should() -> None:
    lines = [
        Line("A", [(0, 4.0), (50, 2.0), (100, 1.0)], 0, [(100, 1.5)]),
        Line("A, raw", [(0, 9.0), (100, 1.0)], 0, is_faint=True),
        Line("one", [(5, 1.0)], 1),
    ]
    chart = Elements(draw_lines(lines, Scale(0, 100), Scale(0, 4), "loss", diagonal=False))
    drawn = chart.pick("polyline", "line")
    assert drawn[0]["points"] == "0.0,0.0 500.0,130.0 1000.0,195.0"
    assert drawn[1]["points"].startswith("0.0,0.0 "), "what lies above the scale is drawn at its edge"
    assert [line["class"] for line in drawn] == ["line s0", "line s0 faint"]
    assert (chart.pick("svg", "mark")[0]["x"], chart.pick("svg", "mark")[0]["y"]) == ("100.00%", "162.5")


def test_the_diagonal_is_where_both_are_equal() -> None:
    chart = Elements(draw_lines([Line("A", [(0.5, 1), (1, 1)], 0)], Scale(0.5, 1), Scale(0, 1), "", diagonal=True))
    assert chart.pick("polyline", "equal")[0]["points"] == "0.0,130.0 1000.0,0.0"


def test_names_are_escaped() -> None:
    name = '<script>"&'
    point, interval = Point(name, 1, 0.5, 0.4, 0.6, 0), Interval(name, 0.5, 0.4, 0.6, name)
    for chart in (
        draw_scatter([point], Scale(0, 2), Scale(0, 1), name),
        draw_intervals([interval], Scale(0, 1), name),
        draw_lines([Line(name, [(0, 0), (1, 1)], 0, [(0, 1)])], Scale(0, 1), Scale(0, 1), name),
    ):
        assert "<script" not in chart and "&lt;script&gt;" in chart
        assert Elements(chart).found[0][1]["aria-label"] == name


def test_fifty_subjects_look_different() -> None:
    looks = {(number % NUM_COLOURS, number % len(SHAPES)) for number in range(50)}
    assert len(looks) == 50
    assert len(set(SHAPES)) == len(SHAPES)
