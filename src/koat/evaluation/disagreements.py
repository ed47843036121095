"""Items that some subjects answer right and others wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain, zip_longest
from typing import Any

from koat.evaluation.calibration import to_probabilities

Predictions = Mapping[str, Mapping[str, Any]]
"""A subject's predictions by the id of their item."""


def find_disagreements(predictions: Mapping[str, Predictions], scoring: str, limit: int = 40) -> dict[str, Any] | None:
    """Return how many items subjects disagree on, who is right on how many, and up to `limit` of the items.

    The items shown are taken in turn from the groups with the same subjects right, the largest group first. None
    where answers are not simply right or wrong, or subjects are fewer than two.
    """
    ids = sorted(set.intersection(*(set(rows) for rows in predictions.values()))) if len(predictions) > 1 else []
    marks = {name: [rows[name]["correct"][scoring] for rows in predictions.values()] for name in ids}
    if not ids or any(mark not in (0, 1) for row in marks.values() for mark in row):
        return None
    groups: dict[tuple[bool, ...], list[str]] = {}
    for name, row in marks.items():
        if len({bool(mark) for mark in row}) > 1:
            groups.setdefault(tuple(bool(mark) for mark in row), []).append(name)
    ordered = sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))
    in_turn = (name for name in chain(*zip_longest(*(names for _, names in ordered))) if name is not None)
    shown = [name for name, _ in zip(in_turn, range(limit), strict=False)]
    return {
        "num_items": len(ids),
        "num_differing": sum(len(names) for _, names in ordered),
        "groups": [
            {"right": [subject for subject, is_right in zip(predictions, key, strict=True) if is_right],
             "wrong": [subject for subject, is_right in zip(predictions, key, strict=True) if not is_right],
             "num_items": len(names)}
            for key, names in ordered
        ],
        "items": [_describe_item(name, predictions, scoring) for name in shown],
    }  # fmt: skip


def _describe_item(name: str, predictions: Mapping[str, Predictions], scoring: str) -> dict[str, Any]:
    first = next(iter(predictions.values()))[name]
    text = first.get("text") or {}
    return {
        "id": name,
        "text": dict(text) if isinstance(text, Mapping) else {"text": text},
        "gold": first.get("gold"),
        "answers": list(_describe_answers(name, predictions, scoring)),
    }


def _describe_answers(name: str, predictions: Mapping[str, Predictions], scoring: str) -> Iterator[dict[str, Any]]:
    for subject, rows in predictions.items():
        row = rows[name]
        predicted, logprobs = row.get("predicted", {}).get(scoring), row.get("logprobs") or {}
        sure = dict(zip(logprobs, to_probabilities(list(logprobs.values())), strict=True)) if logprobs else {}
        yield {
            "subject": subject,
            "predicted": predicted,
            "is_right": bool(row["correct"][scoring]),
            "probability": sure.get(predicted) if isinstance(predicted, str) else None,
        }
