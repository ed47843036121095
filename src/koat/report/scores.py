"""Scores as tables: a row per task and way of scoring, means over groups, and tables of metrics others published."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from koat.report.tables import format_score, make_table, print_table

COLUMNS = ("task", "scoring", "shots", "items", "score (95 % interval)", "s / item", "contract")


def list_score_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a row per score of an evaluation; metrics over all items together stand without interval."""
    rows: list[tuple[str, ...]] = []
    for result in report["results"]:
        shots, items = str(result["num_shots"]), f"{result['num_items']:,}"
        seconds = f"{result['seconds'] / max(1, result['num_items']):.4f}"
        for scoring, score in result["scores"].items():
            shown = format_value(score) + ("" if score["meaningful"] else "  not meaningful")
            contract = result["contracts"][scoring]["hash"][:8]
            rows.append((result["task"], scoring, shots, items, shown, seconds, contract))
        for scoring, value in result["values"].items():
            rows.append((result["task"], scoring, shots, items, f"{value:,.4g}", seconds, "-"))
    return rows


def format_value(score: Mapping[str, Any]) -> str:
    """Return a share in percent with its interval; another number as it is, with its own."""
    if score["low"] >= 0 and score["high"] <= 1:
        return format_score(dict(score))
    return f"{score['value']:,.4g} ({score['low']:,.4g}–{score['high']:,.4g})"


def list_mean_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a row per group and scoring: the mean that weighs items, and the one that weighs tasks."""
    return [
        (group["group"], scoring, str(len(group["tasks"])), f"{mean['items']['num_items']:,}",
         format_value(mean["items"]), format_value(mean["tasks"]))
        for group in report["groups"]
        for scoring, mean in group.get("means", {}).items()
    ]  # fmt: skip


def list_view_rows(group: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield the rows of a group's tables: whose metrics they are, each task's score, and their mean."""
    for view in group["views"]:
        for row in view["rows"]:
            metric = " ".join(part for part in (row["scoring"], row["weighed"]) if part)
            yield view["name"], row["label"], metric, str(row["num_shots"]), f"{row['num_items']:,}", format_value(row)
        yield view["name"], "mean", f"of {len(view['rows'])}", "", "", f"{100 * view['mean']:.1f} %"


def print_scores(report: Mapping[str, Any]) -> None:
    """Print an evaluation's scores, the means and tables of its groups, and its notes."""
    print_table(make_table(str(report["subject"]), COLUMNS, list_score_rows(report), numeric=2))
    means = list_mean_rows(report)
    if means:
        columns = ("group", "scoring", "tasks", "items", "each item alike", "each task alike")
        print_table(make_table("means", columns, means, numeric=2))
    for group in report["groups"]:
        if "views" in group:
            columns = ("metrics of", "task", "metric", "shots", "items", "score (95 % interval)")
            print_table(make_table(f"{group['group']}: {group['title']}", columns, list_view_rows(group), numeric=3))
    for note in list_notes(report):
        print(f"note: {note}")


def list_notes(report: Mapping[str, Any]) -> list[str]:
    """Return what a reader must know; what several tasks say alike stands once, with their names."""
    said: dict[str, list[str]] = {}
    for result in report["results"]:
        for note in dict.fromkeys(result["notes"]):
            said.setdefault(note, []).append(result["task"])
    several = len(report["results"]) > 1
    return [*report["notes"], *(f"{join_tasks(tasks)}: {note}" if several else note for note, tasks in said.items())]


def join_tasks(names: Sequence[str], shown: int = 3) -> str:
    """List tasks by name, at most `shown` of them."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
