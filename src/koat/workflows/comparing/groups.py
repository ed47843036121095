"""Groups of tasks side by side: the tables that a group makes of its tasks' scores, a column for each subject."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from koat.workflows.comparing.scored import Subject

Line = tuple[str, str, int | None, int | None]
"""What a row shows: the task or metric, how it is scored or weighed, shots, items."""
Table = tuple[str, str, str, tuple[str, ...]]
"""What a table is: the group, its title, whose metrics it shows, and the contracts of all that was asked with it."""


def set_groups_side_by_side(subjects: Sequence[Subject]) -> list[dict[str, Any]]:
    """Return the tables of all groups, JSON-safe; subjects share one only where they were asked the same.

    Several seeds count as their mean, which has no interval here.
    """
    tables: dict[Table, dict[Line, dict[str, list[Mapping[str, Any]]]]] = {}
    for subject in subjects:
        for source in subject.sources:
            for group in source.groups:
                for table, line, score in list_lines(group):
                    row = tables.setdefault(table, {}).setdefault(line, {})
                    row.setdefault(subject.name, []).append(score)
    return [describe_table(table, rows) for table, rows in tables.items()]


def list_lines(group: Mapping[str, Any]) -> Iterator[tuple[Table, Line, Mapping[str, Any]]]:
    """Yield a group's rows with the table that each belongs to: those of its views, else its means in both ways."""
    contracts = tuple(group["contracts"])
    for view in group.get("views", ()):
        table = (group["group"], group["title"], view["name"], contracts)
        for row in view["rows"]:
            metric = " ".join(part for part in (row["scoring"], row.get("weighed")) if part)
            yield table, (row["label"], metric, row["num_shots"], row["num_items"]), row
        yield table, ("mean", "mean_of_rows", None, None), {"value": view["mean"]}
    for scoring, mean in group.get("means", {}).items():
        for weigh in ("items", "tasks"):
            line = (scoring, f"alike_{weigh}", None, mean[weigh]["num_items"])
            yield (group["group"], "", "", contracts), line, mean[weigh]


def describe_table(table: Table, rows: Mapping[Line, Mapping[str, Sequence[Mapping[str, Any]]]]) -> dict[str, Any]:
    """Return one table: its names, its subjects, and for each row a score of each subject, None where it has none."""
    group, title, view, _ = table
    names = list(dict.fromkeys(name for cells in rows.values() for name in cells))
    return {
        "group": group, "title": title, "view": view, "subjects": names,
        "rows": [
            {"label": label, "metric": metric, "num_shots": num_shots, "num_items": num_items,
             "cells": [average(cells[name]) if name in cells else None for name in names]}
            for (label, metric, num_shots, num_items), cells in rows.items()
        ],
    }  # fmt: skip


def average(scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean of one score over seeds, with the interval of a single one."""
    first = scores[0]
    bounds = {name: first[name] for name in ("low", "high") if len(scores) == 1 and name in first}
    return {"value": fmean(score["value"] for score in scores), "seeds": len(scores), **bounds}
