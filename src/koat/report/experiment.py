"""An experiment on a terminal: its cells as a table, its progress, how it ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from koat.report.comparison import print_comparison
from koat.report.progress import ProgressLine, TrainingDisplay
from koat.report.tables import make_table, print_table
from koat.report.words import Language


def print_cells(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print what an experiment takes and how far it is."""
    columns = ("cell", "base", "method", "trained parameters", "training", "evaluations")
    cells = [
        (
            row["cell"],
            row["base"],
            row["method"] or "as it is",
            f"{row['trainable_parameters']:,}",
            row["training"] or "-",
            f"{row['num_evaluated']} of {row['num_evaluations']}",
        )
        for row in rows
    ]
    done = sum(row["training"] in ("", "done") and row["num_evaluated"] == row["num_evaluations"] for row in rows)
    print_table(make_table(f"{len(rows)} cells, {done} done", columns, cells, numeric=3))


class ExperimentDisplay:
    """Shows training steps and evaluated items of one cell after another."""

    def __init__(self) -> None:
        self._training: dict[str, TrainingDisplay] = {}
        self._items: dict[tuple[str, str], ProgressLine] = {}

    def show_step(self, cell: str, record: Any) -> None:
        """Show a training step."""
        self._training.setdefault(cell, TrainingDisplay(cell)).show(record)

    def show_item(self, cell: str, task: str, done: int, total: int) -> None:
        """Show how many items of a task are done."""
        self._items.setdefault((cell, task), ProgressLine(f"{cell}: {task}")).update(done, total)


def print_outcome(comparison: Mapping[str, Any], report: Path | None, language: Language = "en") -> None:
    """Print the comparison and where the report is."""
    if comparison:
        print_comparison(comparison, language)
    if report is not None:
        print(f"report: {report}")
