"""How the time of an evaluation grows with items and with shots: measured points, as tables and as a plot."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.measure import Check, Table

COLOURS = {"koat": "#c2410c", "HFLM": "#475569"}


@dataclass(frozen=True)
class Point:
    """Seconds of both sides at one number of items or shots, and whether they computed the same."""

    amount: int
    koat: float
    peer: float
    check: Check


@dataclass
class Growth:
    """Points along one axis: `axis` grows, `fixed` says what stays."""

    axis: str
    fixed: str
    points: list[Point] = field(default_factory=list)

    @property
    def title(self) -> str:
        """What is measured, for a table or a plot."""
        return f"seconds against {self.axis}, {self.fixed}"


def tabulate(growth: Growth) -> Table:
    """Return the points as a table; where both sides differ there are no seconds."""
    rows = [
        (
            str(point.amount),
            f"{point.koat:.2f}",
            f"{point.peer:.2f}",
            f"{point.peer / point.koat:.1f}",
            str(point.check),
        )
        if point.check.passed
        else (str(point.amount), "-", "-", "-", str(point.check))
        for point in growth.points
    ]
    return Table(f"MMLU, {growth.title}", (growth.axis, "koat, s", "HFLM, s", "ratio", "check"), rows)


def draw_growth(path: Path, growths: list[Growth], subtitle: str) -> None:
    """Write a plot of both sides' seconds, one panel an axis. Raises ImportError without matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    # Text stays text, and the same figures give the same file.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "koat", "font.family": "sans-serif", "font.size": 10})
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(growths), figsize=(4.4 * len(growths), 3.4), squeeze=False)
    for panel, growth in zip(panels[0], growths, strict=True):
        points = [point for point in growth.points if point.check.passed]
        amounts = [point.amount for point in points]
        for name, seconds in (("HFLM", [each.peer for each in points]), ("koat", [each.koat for each in points])):
            panel.plot(amounts, seconds, marker="o", color=COLOURS[name])
            panel.annotate(name, (amounts[-1], seconds[-1]), (-4, 7), textcoords="offset points", ha="right",
                           color=COLOURS[name])  # fmt: skip
        panel.set(xlabel=f"{growth.axis}, {growth.fixed}", ylabel="seconds", xlim=(0, None), ylim=(0, None))
        panel.margins(y=0.15)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    figure.suptitle(subtitle, fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
