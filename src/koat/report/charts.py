"""Three kinds of charts as inline SVG: intervals, scatter, lines.

Widths are in percent and heights in pixels, so that a chart fills whatever it stands in and its text keeps its size.
Colours come from the page's style sheet: `s0`, `s1`, ... are the subjects. Shapes differ as colours do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

from koat.report.scales import Scale, format_number, format_percent

NUM_COLOURS = 8
ROW = 46
"""Height of an interval with its label, in pixels."""
FOOT = 22
"""Height of the ticks' labels under a chart."""
UNITS = 1000
"""Width of the box that lines are drawn in; it is stretched to the chart's width."""
PHONE, DESK = 40, 60
"""Letters that fit beside each other above an interval; where there are more, the figures go."""
MOST_NAMES = 6
"""From more points on, a scatter chart has no room for names."""
NAME_WIDTH = 0.026
"""Width of a letter as a share of a small chart's: enough to keep names apart."""
SHAPES = (
    "M-4.5,0A4.5,4.5 0 1 0 4.5,0A4.5,4.5 0 1 0 -4.5,0Z",
    "M-4,-4H4V4H-4Z",
    "M0,-5.6L5.6,0L0,5.6L-5.6,0Z",
    "M0,-5.4L5.2,4L-5.2,4Z",
    "M0,5.4L5.2,-4L-5.2,-4Z",
    "M-1.6,-5H1.6V-1.6H5V1.6H1.6V5H-1.6V1.6H-5V-1.6H-1.6Z",
    "M-5,-2.5L0,-5.5L5,-2.5L3.4,4.5H-3.4Z",
)
"""One more or less than the colours, so that together they tell 56 subjects apart."""
DASHES = ("", "7 3", "2 3", "9 3 2 3", "5 5", "1 4", "12 4", "3 2")


@dataclass(frozen=True, slots=True)
class Interval:
    """A row of an interval chart; `style` is the subject's number, None for a grey one, `dots` are seeds."""

    label: str
    value: float
    low: float
    high: float
    shown: str
    style: int | None = None
    dots: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Point:
    """A point of a scatter chart with its interval; `x` is None for a subject that has no such value."""

    label: str
    x: float | None
    y: float
    low: float
    high: float
    style: int
    shown: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """A line; `is_thin` for one seed of several, `is_faint` for raw values, `marks` are points beside it."""

    label: str
    points: Sequence[tuple[float, float]]
    style: int
    marks: Sequence[tuple[float, float]] = field(default_factory=tuple)
    is_thin: bool = False
    is_faint: bool = False


def draw_intervals(rows: Sequence[Interval], scale: Scale, name: str, *, zero: float | None = None) -> str:
    """Draw a row for each interval: its label above, the interval below, a line at `zero`."""
    height = ROW * len(rows)
    parts = [draw_columns(scale, height, format_percent)]
    if zero is not None:
        parts.append(f'<line class="zero" x1="{at(scale, zero)}" x2="{at(scale, zero)}" y1="0" y2="{height}"/>')
    for number, row in enumerate(rows):
        parts += _draw_row(row, ROW * number, scale)
    return wrap(parts, height + FOOT, name)


def _draw_row(row: Interval, top: float, scale: Scale) -> list[str]:
    middle, style = top + 32, css_class(row.style)
    length = len(row.label) + len(row.shown)
    kind = " narrow" if length > PHONE else ""
    figure = f'<text class="figure{kind}" x="100%" y="{top + 16}" text-anchor="end">{escape(row.shown)}</text>'
    return [
        f'<rect class="cover" x="-1%" y="{top}" width="102%" height="22"/>',
        f'<text class="name" x="0" y="{top + 16}">{escape(row.label)}</text>',
        figure if length <= DESK else "",
        f'<line class="reach {style}" x1="{at(scale, row.low)}" x2="{at(scale, row.high)}" '
        f'y1="{middle}" y2="{middle}"/>',
        *(f'<circle class="seed {style}" cx="{at(scale, dot)}" cy="{middle}" r="2.2"/>' for dot in row.dots),
        draw_marker(at(scale, row.value), middle, row.style, f"{row.label}: {row.shown}"),
    ]


def draw_scatter(points: Sequence[Point], x: Scale, y: Scale, name: str) -> str:
    """Draw points with vertical intervals, and names where there is room; those without `x` are dashed lines."""
    height = 220
    parts = [draw_columns(x, height, format_number), draw_rows(y, height, format_percent)]
    taken: list[tuple[float, float, float]] = []
    for point in points:
        across = None if point.x is None else x.place(point.x)
        down, style = height * (1 - y.place(point.y)), css_class(point.style)
        note = f"{point.label}: {point.shown}"
        if across is None:
            parts.append(
                f'<line class="dashed {style}" x1="0" x2="100%" y1="{down:.1f}" y2="{down:.1f}">'
                f"<title>{escape(note)}</title></line>"
            )
        else:
            top, bottom = (height * (1 - y.place(value)) for value in (point.high, point.low))
            place = percent(across)
            parts.append(f'<line class="reach {style}" x1="{place}" x2="{place}" y1="{top:.1f}" y2="{bottom:.1f}"/>')
            parts.append(draw_marker(place, down, point.style, note))
        if len(points) <= MOST_NAMES:
            parts.append(_draw_name(point.label, across or 0.0, down, taken))
    return wrap(parts, height + FOOT, name)


def _draw_name(label: str, across: float, down: float, taken: list[tuple[float, float, float]]) -> str:
    """Draw a name beside its place, further down where others stand; `taken` are their (left, right, height)."""
    width, turned = NAME_WIDTH * (len(label) + 2), across > 0.5
    left, right = (across - width, across) if turned else (across, across + width)
    height = down - 7
    while any(abs(height - other) < 13 and left < end and begin < right for begin, end, other in taken):
        height += 13
    taken.append((left, right, height))
    end = ' text-anchor="end" dx="-9"' if turned else ' dx="9"'
    return f'<text class="name" x="{percent(across)}" y="{height:.1f}"{end}>{escape(label)}</text>'


def draw_lines(
    lines: Sequence[Line], x: Scale, y: Scale, name: str, *,
    format_x: Callable[[float], str] = format_number, format_y: Callable[[float], str] = format_number,
    diagonal: bool = False,
) -> str:  # fmt: skip
    """Draw lines and the marks beside them; `diagonal` adds the line on which both values are equal."""
    height = 260
    drawn = [_draw_line(line, x, y, height) for line in lines if len(line.points) > 1]
    if diagonal:
        ends = (max(x.low, y.low), min(x.high, y.high))
        path = " ".join(f"{UNITS * x.place(end):.1f},{height * (1 - y.place(end)):.1f}" for end in ends)
        drawn.insert(0, f'<polyline class="line equal" points="{path}"/>')
    parts = [
        draw_columns(x, height, format_x),
        draw_rows(y, height, format_y),
        f'<svg class="stretched" viewBox="0 0 {UNITS} {height}" width="100%" height="{height}" '
        f'preserveAspectRatio="none">{"".join(drawn)}</svg>',
    ]
    for line in lines:
        for across, down in line.marks:
            note = f"{line.label}: {format_x(across)}, {format_y(down)}"
            parts.append(draw_marker(at(x, across), height * (1 - y.place(down)), line.style, note, small=True))
    return wrap(parts, height + FOOT, name)


def _draw_line(line: Line, x: Scale, y: Scale, height: float) -> str:
    path = " ".join(
        f"{UNITS * x.place(across):.1f},{height * (1 - min(1, max(0, y.place(down)))):.1f}"
        for across, down in line.points
    )
    kind = " faint" if line.is_faint else " thin" if line.is_thin else ""
    dash = DASHES[line.style % len(DASHES)]
    dashed = f' stroke-dasharray="{dash}"' if dash and not line.is_faint else ""
    return (
        f'<polyline class="line {css_class(line.style)}{kind}" points="{path}"{dashed}>'
        f"<title>{escape(line.label)}</title></polyline>"
    )


# Parts ---------------------------------------------------------------------------------------------------------


def draw_columns(scale: Scale, height: float, show: Callable[[float], str]) -> str:
    """Draw the vertical lines of a grid with their values underneath."""
    return "".join(
        f'<line class="grid" x1="{at(scale, tick)}" x2="{at(scale, tick)}" y1="0" y2="{height}"/>'
        f'<text class="tick" x="{at(scale, tick)}" y="{height + 16}" text-anchor="middle">{escape(show(tick))}</text>'
        for tick in scale.list_ticks()
    )


def draw_rows(scale: Scale, height: float, show: Callable[[float], str]) -> str:
    """Draw the horizontal lines of a grid with their values on the left."""
    places = [(tick, height * (1 - scale.place(tick))) for tick in scale.list_ticks()]
    return "".join(
        f'<line class="grid" x1="0" x2="100%" y1="{place:.1f}" y2="{place:.1f}"/>'
        f'<text class="tick" x="0" dx="-8" y="{place + 4:.1f}" text-anchor="end">{escape(show(tick))}</text>'
        for tick, place in places
    )


def draw_marker(x: str, y: float, style: int | None, note: str = "", *, small: bool = False) -> str:
    """Draw a subject's marker, which says `note` when it is pointed at."""
    shape = SHAPES[(style or 0) % len(SHAPES)]
    title = f"<title>{escape(note)}</title>" if note else ""
    size = ' transform="scale(0.75)"' if small else ""
    return f'<svg x="{x}" y="{y:.1f}" class="mark {css_class(style)}"><path d="{shape}"{size}/>{title}</svg>'


def draw_keys(num_subjects: int) -> str:
    """Draw each subject's marker once, unseen, for `refer_key` to show."""
    marks = "".join(
        f'<symbol id="key{style}" viewBox="-7 -7 14 14" class="mark {css_class(style)}">'
        f'<path d="{SHAPES[style % len(SHAPES)]}"/></symbol>'
        for style in range(num_subjects)
    )
    return f'<svg class="keys" width="0" height="0" aria-hidden="true">{marks}</svg>'


def refer_key(style: int) -> str:
    """Return a subject's marker, small, for legends and tables; it stands where `draw_keys` was drawn."""
    return f'<svg class="key" aria-hidden="true"><use href="#key{style}"/></svg>'


def css_class(style: int | None) -> str:
    """Return the class that colours a subject."""
    return "plain" if style is None else f"s{style % NUM_COLOURS}"


def percent(share: float) -> str:
    """Return a share of the width as SVG has it, within what is drawn."""
    return f"{100 * min(1.0, max(0.0, share)):.2f}%"


def at(scale: Scale, value: float) -> str:
    """Return where a value stands across the width."""
    return percent(scale.place(value))


def wrap(parts: Sequence[str], height: float, name: str) -> str:
    """Return a whole chart; `name` says what it shows to those who cannot see it."""
    return (
        f'<svg class="chart" role="img" aria-label="{escape(name)}" width="100%" height="{height:g}">'
        f"{''.join(parts)}</svg>"
    )
