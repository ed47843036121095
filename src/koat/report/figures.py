"""The charts of a report, from what was gathered for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from koat.report.charts import Interval, Line, Point, draw_intervals, draw_lines, draw_scatter
from koat.report.scales import Scale, fit_cost_scale, fit_scale, format_number, format_percent
from koat.report.tables import format_score
from koat.report.words import say

Styles = Mapping[str, int]
"""Each subject's number, which gives it colour and shape."""
MOST_POINTS = 240
"""Points of a line; more cannot be seen."""
LOG_LOSS = 6
"""From this ratio of the largest to the smallest loss on, their scale is logarithmic."""
MOST_RAW = 4
"""With more subjects than these, raw losses would hide the smoothed ones."""
GIB = 1024**3
COSTS = (
    ("runs", "trainable_parameters", "trainable_parameters", 1.0),
    ("runs", "training_seconds", "training_seconds", 1.0),
    ("runs", "peak_bytes", "peak_bytes", 1 / GIB),
    ("costs", "seconds_per_item", "seconds_per_item", 1000.0),
    ("costs", "peak_bytes", "eval_bytes", 1 / GIB),
)
"""Where a cost is kept and under which name, what the page calls it, and its factor."""


def draw_scores(column: Mapping[str, Any], styles: Styles) -> str:
    """Draw each subject's score with its interval, and its seeds."""
    rows = [
        Interval(
            row["subject"], row["value"], row["low"], row["high"], format_score(dict(row)), styles[row["subject"]],
            row["values"] if len(row["values"]) > 1 else (),
        )
        for row in column["rows"]
    ]  # fmt: skip
    ends = [value for row in rows for value in (row.low, row.high, *row.dots)]
    return draw_intervals(rows, fit_scale(ends, floor_at=0, ceil_at=1), name_chart("scores", column))


def draw_differences(comparisons: Sequence[Mapping[str, Any]], column: Mapping[str, Any], styles: Styles) -> str:
    """Draw the interval of each difference against zero, from the lower score to the higher."""
    rows = []
    for made in comparisons:
        low, value, high, names = made["low"], made["value"], made["high"], (made["left"], made["right"])
        if value < 0:
            low, value, high, names = -high, -value, -low, names[::-1]
        shown = f"{_sign(value)} ({_sign(low)} … {_sign(high)})"
        style = styles[made["better"]] if made["better"] else None
        rows.append(Interval(f"{names[0]} → {names[1]}", value, low, high, shown, style))
    ends = [0.0, *(end for row in rows for end in (row.low, row.high))]
    return draw_intervals(rows, fit_scale(ends), name_chart("differences", column), zero=0)


def _sign(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "−")


def find_costs(facts: Mapping[str, Any], number: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield each cost that at least two subjects of a column have: its name, and its mean over seeds by subject."""
    for place, key, kind, factor in COSTS:
        found = {}
        for row in facts["found"]["columns"][number]["rows"]:
            name = row["subject"]
            held = facts["runs"][name] if place == "runs" else [facts["costs"][number][name]]
            values = [factor * entry[key] for entry in held if entry.get(key)]
            if values:
                found[name] = sum(values) / len(values)
        if len(found) > 1:
            yield kind, found


def draw_cost(column: Mapping[str, Any], kind: str, values: Mapping[str, float], styles: Styles) -> tuple[str, bool]:
    """Draw scores against a cost; return the chart and whether its scale is logarithmic."""
    points = []
    for row in column["rows"]:
        name, cost = row["subject"], values.get(row["subject"])
        shown = format_score(dict(row)) + ("" if cost is None else f", {format_number(cost)}")
        points.append(Point(name, cost, row["value"], row["low"], row["high"], styles[name], shown))
    x = fit_cost_scale(values.values())
    y = fit_scale((end for point in points for end in (point.low, point.high)), floor_at=0, ceil_at=1)
    return draw_scatter(points, x, y, name_chart(f"axis_{kind}", column)), x.is_log


def draw_training(runs: Mapping[str, Sequence[Mapping[str, Any]]], styles: Styles) -> tuple[str, bool]:
    """Draw the losses of all runs, empty where none recorded any; return whether their scale is logarithmic."""
    lines = [line for name, held in runs.items() for line in make_lines(name, held, styles[name])]
    if not lines:
        return "", False
    lines.sort(key=lambda line: not line.is_faint)
    if sum(line.is_faint for line in lines) > MOST_RAW:
        lines = [line for line in lines if not line.is_faint]
    steps = [step for line in lines for step, _ in line.points]
    losses = [loss for line in lines if not line.is_faint for _, loss in (*line.points, *line.marks)]
    is_log = 0 < min(losses) < max(losses) / LOG_LOSS
    y = Scale(min(losses) * 0.9, max(losses) * 1.1, is_log=True) if is_log else fit_scale([0, *losses])
    return draw_lines(lines, Scale(0, max(steps)), y, name_chart("training")), is_log


def make_lines(name: str, runs: Sequence[Mapping[str, Any]], style: int) -> Iterator[Line]:
    """Yield a subject's smoothed losses, a line a seed, and the raw ones of the first."""
    drawn = [run for run in runs if run["curve"]["training"]]
    for number, run in enumerate(drawn):
        raw, label = run["curve"]["training"], f"{name}, {run['seed']}" if len(drawn) > 1 else name
        if number == 0:
            yield Line(label, thin_out(raw), style, is_faint=True)
        marks = thin_out(run["curve"]["validation"], 12)
        yield Line(label, thin_out(smooth(raw)), style, marks, is_thin=len(drawn) > 1)


def smooth(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return an exponential moving average over about a fiftieth of the points, unbiased at its start."""
    keep = 1 - 1 / max(2.0, len(points) / 50)
    total = weight = 0.0
    found = []
    for step, loss in points:
        total, weight = keep * total + loss, keep * weight + 1
        found.append((step, total / weight))
    return found


def thin_out(points: Sequence[tuple[int, float]], most: int = MOST_POINTS) -> list[tuple[int, float]]:
    """Return at most about `most` of the points, evenly spaced, the last among them."""
    stride = -(-len(points) // most)
    return [*points[:-1:stride], *points[-1:]] if stride > 1 else list(points)


def draw_calibration(column: Mapping[str, Any], styles: Styles) -> str:
    """Draw how often answers are right against how sure they are, empty where that is not known."""
    lines = [
        Line(row["subject"], points, styles[row["subject"]], points)
        for row in column["rows"]
        if "calibration" in row
        for points in [[(held["confidence"], held["accuracy"]) for held in row["calibration"]["bins"]]]
    ]
    if not lines:
        return ""
    x = fit_scale([point[0] for line in lines for point in line.points], floor_at=0, ceil_at=1)
    name = name_chart("calibration", column)
    return draw_lines(lines, x, Scale(0, 1), name, format_x=format_percent, format_y=format_percent, diagonal=True)


def name_chart(key: str, column: Mapping[str, Any] | None = None) -> str:
    """Return what a chart shows, in both languages: an attribute can hold no switch."""
    what = f"{say(key, 'en')} / {say(key, 'ko')}"
    return f"{what}: {column['task']}, {column['scoring']}" if column else what
