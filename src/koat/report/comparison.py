"""Comparisons as terminal tables, Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console

from koat.report.sentences import say_comparison, say_conditions, say_refusal, say_smallest
from koat.report.tables import format_score, make_table, print_table

UNPAIRED = (
    "where only counts are known, comparisons are unpaired: what asking the same items would add is lost, and the "
    "differences that can be seen are larger than they need be."
)
CSV_COLUMNS = (
    "task", "scoring", "contract", "left", "right", "better", "unsure", "value", "low", "high", "p", "p_holm",
    "test", "paired", "num_items", "smallest", "needed", "needed_corrected", "only_left", "only_right", "sentence",
)  # fmt: skip
COLUMNS = (
    "subject", "score (95 % interval)", "items", "seeds", "over seeds", "over items", "calibration", "label bias",
)  # fmt: skip


def print_comparison(found: Mapping[str, Any]) -> None:
    """Print scores, what may be said of their differences, and what may not be ranked."""
    console = Console(width=None if Console().is_terminal else 140, highlight=False, markup=False)
    for column in found["columns"]:
        names, rows = list_rows(column)
        print_table(make_table(title_column(column), names, rows))
        for line in list_sentences(found, column):
            console.print(f"- {line}")
        console.print()
    for refusal in found["refusals"]:
        console.print(f"! {say_refusal(refusal)}")
    for note in list_notes(found):
        console.print(f"note: {note}")


def title_column(column: Mapping[str, Any]) -> str:
    """Return what a column is: task, scoring, metric, contract."""
    what = ", ".join(dict.fromkeys([column["task"], column["scoring"], column["metric"]]))
    return f"{what} (contract {column['contract']['hash'][:8]})"


def list_rows(column: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the headings and rows of a column's table; what no row has is left out."""
    table = [list(_show_row(row)) for row in column["rows"]]
    kept = [number for number in range(len(COLUMNS)) if any(row[number] for row in table)]
    return [COLUMNS[number] for number in kept], [[row[number] or "-" for number in kept] for row in table]


def _show_row(row: Mapping[str, Any]) -> Iterator[str]:
    spread, num_seeds = row.get("spread"), len(row["values"])
    yield row["subject"]
    yield format_score(dict(row)) + ("" if row["meaningful"] else "  not meaningful")
    yield f"{row['num_items']:,}"
    yield str(num_seeds) if num_seeds > 1 else ""
    yield f"± {100 * spread['over_seeds']:.1f}" if spread else ""
    yield f"± {100 * spread['over_items']:.1f}" if spread else ""
    yield f"{row['calibration']['error']:.3f}" if "calibration" in row else ""
    yield f"{row['label_bias']['distance']:.3f}" if "label_bias" in row else ""


def list_sentences(found: Mapping[str, Any], column: Mapping[str, Any]) -> Iterator[str]:
    """Yield what may be said about each pair of a column."""
    num_comparisons = found["correction"]["num_comparisons"]
    for comparison in found["comparisons"]:
        same_question = comparison["contract"] == column["contract"]["hash"]
        if same_question and (comparison["task"], comparison["scoring"]) == (column["task"], column["scoring"]):
            parts = [say_comparison(comparison, num_comparisons)]
            parts += [] if comparison["better"] else [say_smallest(comparison)]
            parts += [say_conditions(comparison)]
            yield " ".join(part for part in parts if part)


def list_notes(found: Mapping[str, Any]) -> list[str]:
    """Return what a reader must know beside the figures."""
    notes = list(found["notes"])
    if any(not comparison["paired"] for comparison in found["comparisons"]):
        notes.append(UNPAIRED)
    if any("spread" in row for column in found["columns"] for row in column["rows"]):
        notes.append("over seeds: what another seed would change; over items: what other items would change in a run.")
    number = found["correction"]["num_comparisons"]
    if number > 1:
        notes.append(f"p-values are corrected over {number} comparisons (Holm); each interval stands for itself.")
    return notes


def to_markdown(found: Mapping[str, Any]) -> str:
    """Return a comparison as Markdown."""
    lines: list[str] = []
    for column in found["columns"]:
        names, rows = list_rows(column)
        lines += [f"## {title_column(column)}", "", _join(names), _join(["---"] * len(names))]
        lines += [_join([cell.replace("|", r"\|") for cell in row]) for row in rows]
        lines += ["", *(f"- {line}" for line in list_sentences(found, column)), ""]
    if found["refusals"]:
        lines += ["## Not ranked", "", *(f"- {say_refusal(refusal)}" for refusal in found["refusals"]), ""]
    lines += ["## Notes", "", *(f"- {note}" for note in list_notes(found))] if list_notes(found) else []
    return "\n".join(lines).rstrip() + "\n"


def _join(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def to_csv(found: Mapping[str, Any]) -> str:
    """Return every comparison as a row of CSV, and every refusal as one whose `test` is `refused`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    number = found["correction"]["num_comparisons"]
    writer.writerows({**row, "sentence": say_comparison(row, number)} for row in found["comparisons"])
    writer.writerows({**row, "test": "refused", "sentence": say_refusal(row)} for row in found["refusals"])
    return text.getvalue()
