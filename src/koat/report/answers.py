"""The short answer of a comparison: for each score who leads, whom that beats, and from whom it cannot be told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from koat.report.comparison import list_comparisons
from koat.report.sentences import MILLION, format_points, round_up
from koat.report.words import LANGUAGES, Language, say


def find_leader(column: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the row with the highest score, of those that are meaningful where there are any."""
    rows = [row for row in column["rows"] if row["meaningful"]] or column["rows"]
    return max(rows, key=lambda row: float(row["value"]))


def say_answer(found: Mapping[str, Any], column: Mapping[str, Any]) -> dict[Language, str]:
    """Return in one sentence, in each language, what a column's scores come to."""
    leader = find_leader(column)
    pairs = [made for made in list_comparisons(found, column) if leader["subject"] in (made["left"], made["right"])]
    return {language: _join(leader, pairs, language) for language in LANGUAGES}


def _join(leader: Mapping[str, Any], pairs: Sequence[Mapping[str, Any]], language: Language) -> str:
    score = f"{100 * leader['value']:.1f} %, {100 * leader['low']:.1f}–{100 * leader['high']:.1f}"
    first = say("leads" if pairs else "alone", language, leader=leader["subject"], score=score)
    groups: dict[tuple[str, int], list[str]] = {}
    for pair in pairs:
        kind = "beats" if pair["better"] else "seems" if pair["unsure"] else "ties"
        groups.setdefault((kind, pair["num_items"]), []).append(say_other(pair, leader["subject"], kind, language))
    # The names of the kinds sort from the surest to the least sure.
    said = [
        say(kind, language, others=", ".join(others), items=f"{num_items:,}")
        for (kind, num_items), others in sorted(groups.items())
    ]
    return f"{first}: {'; '.join(said)}." if said else f"{first}."


def say_other(comparison: Mapping[str, Any], leader: str, kind: str, language: Language) -> str:
    """Return the other one of a pair, and by how much it lies behind or how many items would tell."""
    is_left, needed = comparison["left"] == leader, comparison["needed"]
    other = comparison["right" if is_left else "left"]
    if kind != "ties":
        low, high = (-comparison["high"], -comparison["low"]) if is_left else (comparison["low"], comparison["high"])
        return say("by", language, other=other, low=format_points(low), high=format_points(high))
    if needed is not None and comparison["num_items"] < needed <= MILLION:
        return say("would_tell", language, other=other, needed=f"{round_up(needed):,}")
    return str(other)
