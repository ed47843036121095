"""Tables of groups of tasks, for the terminal, Markdown and the page."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from koat.report.sentences import name_subject
from koat.report.tables import format_score
from koat.report.words import Language, say

MEAN_OVER_TASKS = re.compile(r"(.+) mean over (\d+) tasks")
HEADINGS = ("task", "metric", "shots", "num_items")


def title_group(table: Mapping[str, Any], language: Language = "en") -> str:
    """Return what a table shows: the group, and whose metrics."""
    parts = [table["group"], *([say("metrics_of", language, view=table["view"])] if table["view"] else [])]
    return ", ".join(parts)


def list_headings(table: Mapping[str, Any], language: Language = "en") -> list[str]:
    """Return the headings of a table."""
    return [*(say(name, language) for name in HEADINGS), *(name_subject(name, language) for name in table["subjects"])]


def list_group_rows(table: Mapping[str, Any], language: Language = "en") -> list[list[str]]:
    """Return a table's rows as text."""
    return [
        [_say(row["label"], language), _say(row["metric"], language), _show(row["num_shots"]), _show(row["num_items"]),
         *(_show_score(cell) for cell in row["cells"])]
        for row in table["rows"]
    ]  # fmt: skip


def _say(text: str, language: Language) -> str:
    """Return a text that koat wrote in a language; names of tasks and metrics stay as they are."""
    if weighed := MEAN_OVER_TASKS.fullmatch(text):
        return say("mean_over_tasks", language, metric=weighed[1], number=weighed[2])
    return say(text, language) if text in ("mean", "mean_of_rows", "alike_items", "alike_tasks") else text


def _show(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _show_score(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return "-"
    return format_score(dict(cell)) if "low" in cell else f"{100 * cell['value']:.1f} %"
