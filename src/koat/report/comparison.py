"""Comparisons as terminal tables, Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from koat.evaluation.published import COUNTED
from koat.report.groups import list_group_rows, list_headings, title_group
from koat.report.sentences import (
    name_subject,
    say_comparison,
    say_conditions,
    say_note,
    say_reasons,
    say_refusal,
    say_smallest,
)
from koat.report.tables import format_score, make_console, make_table, print_table
from koat.report.words import Language, say

CSV_COLUMNS = (
    "task", "scoring", "contract", "left", "right", "better", "unsure", "value", "low", "high", "p", "p_holm",
    "test", "paired", "num_items", "smallest", "needed", "only_left", "only_right", "sentence",
)  # fmt: skip
COLUMNS = ("subject", "score", "num_items", "seeds", "over_seeds", "over_items", "calibration_error", "label_bias")


def print_comparison(found: Mapping[str, Any], language: Language = "en") -> None:
    """Print scores, what may be said of their differences, and what may not be ranked."""
    console = make_console(highlight=False)
    for column in found["columns"]:
        names, rows = list_rows(column, language)
        print_table(make_table(title_column(column, language), names, rows))
        for line in list_sentences(found, column, language):
            console.print(f"- {line}")
        console.print()
    for table in found["groups"]:
        headings, rows = list_headings(table, language), list_group_rows(table, language)
        print_table(make_table(title_group(table, language), headings, rows, numeric=2))
    for refusal in found["refusals"]:
        console.print(f"! {say_refusal(refusal, language)}")
    for note in list_notes(found, language):
        console.print(f"{say('note', language)}: {note}")


def title_column(column: Mapping[str, Any], language: Language = "en") -> str:
    """Return what a column is: task, scoring, metric, contract."""
    what = ", ".join(dict.fromkeys([column["task"], column["scoring"], column["metric"]]))
    return f"{what} ({say('contract', language)} {column['contract']['hash'][:8]})"


def list_rows(
    column: Mapping[str, Any], language: Language = "en", shown: Sequence[str] = COLUMNS
) -> tuple[list[str], list[list[str]]]:
    """Return the headings and rows of a column's table; what no row has is left out."""
    table = [list(_show_row(row, language)) for row in column["rows"]]
    kept = [number for number, name in enumerate(COLUMNS) if name in shown and any(row[number] for row in table)]
    names = [say(COLUMNS[number], language) for number in kept]
    return names, [[row[number] or "-" for number in kept] for row in table]


def _show_row(row: Mapping[str, Any], language: Language) -> Iterator[str]:
    spread, num_seeds = row.get("spread"), len(row["values"])
    yield name_subject(row["subject"], language)
    yield format_score(dict(row)) + ("" if row["meaningful"] else f"  {say('not_meaningful_short', language)}")
    yield f"{row['num_items']:,}"
    yield str(num_seeds) if num_seeds > 1 else ""
    yield f"± {100 * spread['over_seeds']:.1f}" if spread else ""
    yield f"± {100 * spread['over_items']:.1f}" if spread else ""
    yield f"{row['calibration']['error']:.3f}" if "calibration" in row else ""
    yield f"{row['label_bias']['distance']:.3f}" if "label_bias" in row else ""


def list_sentences(found: Mapping[str, Any], column: Mapping[str, Any], language: Language = "en") -> Iterator[str]:
    """Yield what may be said about each pair of a column."""
    for comparison in list_comparisons(found, column):
        yield say_whole(comparison, found["correction"]["num_comparisons"], language)


def list_comparisons(found: Mapping[str, Any], column: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the comparisons that were made in a column."""
    key = (column["task"], column["scoring"], column["contract"]["hash"])
    return [made for made in found["comparisons"] if (made["task"], made["scoring"], made["contract"]) == key]


def say_whole(comparison: Mapping[str, Any], num_comparisons: int, language: Language = "en") -> str:
    """Return all there is to say about a pair: what was found, what could have been, the conditions."""
    parts = [say_comparison(comparison, num_comparisons, language)]
    parts += [] if comparison["better"] else [say_smallest(comparison, language)]
    parts += [say_conditions(comparison, language)]
    return " ".join(part for part in parts if part)


def list_notes(found: Mapping[str, Any], language: Language = "en") -> list[str]:
    """Return what a reader must know beside the figures."""
    rows = [(column, row) for column in found["columns"] for row in column["rows"]]
    notes = [say_note(note, language) for note in found["notes"]]
    means = sorted({column["metric"] for column, row in rows if not row["by_item"] and column["metric"] not in COUNTED})
    notes += [say("note_mean", language, name=name) for name in means]
    alone = dict.fromkeys(row["subject"] for _, row in rows if len(row["seeds"]) == 1 and row["seeds"] != [None])
    if alone and found["comparisons"]:
        notes.append(say("note_one_seed", language, names=", ".join(alone)))
    mixed = {row["subject"]: row["mixed_conditions"] for _, row in rows if row["mixed_conditions"]}
    for name, reasons in mixed.items():
        named = name_subject(name, language)
        notes.append(say("note_mixed", language, name=named, reasons=say_reasons(reasons.values(), language)))
    if any(not comparison["paired"] for comparison in found["comparisons"]):
        notes.append(say("note_unpaired", language))
    if any("spread" in row for _, row in rows):
        notes.append(say("note_spread", language))
    number = found["correction"]["num_comparisons"]
    if number > 1:
        notes.append(say("note_holm", language, number=number))
    return notes


def to_markdown(found: Mapping[str, Any], language: Language = "en") -> str:
    """Return a comparison as Markdown."""
    lines: list[str] = []
    for table in found["groups"]:
        headings, rows = list_headings(table, language), list_group_rows(table, language)
        lines += [f"## {title_group(table, language)}", "", *_tabulate(headings, rows), ""]
    for column in found["columns"]:
        lines += [f"## {title_column(column, language)}", "", *_tabulate(*list_rows(column, language))]
        lines += ["", *(f"- {line}" for line in list_sentences(found, column, language)), ""]
    if found["refusals"]:
        lines += [f"## {say('refusals', language)}", ""]
        lines += [*(f"- {say_refusal(refusal, language)}" for refusal in found["refusals"]), ""]
    notes = list_notes(found, language)
    lines += [f"## {say('notes', language)}", "", *(f"- {note}" for note in notes)] if notes else []
    return "\n".join(lines).rstrip() + "\n"


def _tabulate(names: list[str], rows: list[list[str]]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield _join(names)
    yield _join(["---"] * len(names))
    for row in rows:
        yield _join([cell.replace("|", r"\|") for cell in row])


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
