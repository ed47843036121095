"""Terminal tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def make_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], numeric: int = 1) -> Table:
    """Make a table whose columns from number `numeric` on are aligned to the right."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number >= numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def print_table(table: Table, width: int | None = None) -> None:
    """Print a table to standard output, wide enough for a log as well."""
    make_console(width).print(table)


def make_console(width: int | None = None, *, highlight: bool = True) -> Console:
    """Make a console that prints texts as they are: a name may hold `[r=8]`, a setting `[INST]`, a task `:cat:`."""
    if width is None and not Console().is_terminal:
        width = 140
    return Console(width=width, highlight=highlight, markup=False, emoji=False)


def format_bytes(count: float) -> str:
    """Return a size in words, in binary units: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit in {"B", "KiB"} else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def format_score(score: dict[str, Any]) -> str:
    """Return a score in percent with its interval: 71.2 % (67.1-75.0)."""
    return f"{100 * score['value']:.1f} % ({100 * score['low']:.1f}–{100 * score['high']:.1f})"
