"""Scores as a table: one row per task and way of scoring, with interval, contract and time."""

from __future__ import annotations

from typing import Any

from koat.report.tables import format_score, make_table, print_table


def list_score_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return a row per score of an evaluation."""
    rows: list[tuple[str, ...]] = []
    for result in report["results"]:
        for scoring, score in result["scores"].items():
            shown = format_score(score) + ("" if score["meaningful"] else "  not meaningful")
            rows.append(
                (
                    result["task"],
                    scoring,
                    str(result["num_shots"]),
                    f"{score['num_items']:,}",
                    shown,
                    f"{result['seconds'] / max(1, result['num_items']):.4f}",
                    result["contracts"][scoring]["hash"][:8],
                )
            )
    return rows


def print_scores(report: dict[str, Any]) -> None:
    """Print an evaluation's scores and its notes."""
    columns = ("task", "scoring", "shots", "items", "accuracy (95 % interval)", "s / item", "contract")
    print_table(make_table(str(report["subject"]), columns, list_score_rows(report), numeric=2))
    for note in dict.fromkeys(note for result in report["results"] for note in result["notes"]):
        print(f"note: {note}")
