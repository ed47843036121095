"""Compare: which of several subjects is better, on what was asked of all of them alike, and how sure that is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import numpy as np

from koat.core.errors import DataError
from koat.evaluation.calibration import describe_choices
from koat.evaluation.differences import MEANINGLESS, explain_differences
from koat.evaluation.power import ALPHA
from koat.evaluation.significance import (
    Difference,
    are_answers,
    compare_answers,
    compare_counts,
    compare_seeds,
    compare_values,
    correct_holm,
)
from koat.evaluation.spread import measure_spread
from koat.evaluation.texts import has_shared_texts
from koat.workflows.comparing.groups import set_groups_side_by_side
from koat.workflows.comparing.scored import Scored, Source, Subject, collect_sources, find_texts, group_subjects


@dataclass(frozen=True, slots=True)
class Cell:
    """One subject's score in a column, once per seed."""

    subject: str
    scores: list[Scored]
    seeds: list[int | None]

    @property
    def is_meaningful(self) -> bool:
        """Whether its scores say something: a way of scoring that does not fit a tokenizer says nothing of a model."""
        return all(score.meaningful for score in self.scores)

    def to_table(self, ids: Sequence[str]) -> np.ndarray:
        """Return the items' scores `[S, N]`, seeds by items."""
        return np.array([[values[name] for name in ids] for values in (score.values for score in self.scores)])


@dataclass(frozen=True, slots=True)
class Column:
    """What stands under one contract: the only scores that may be ranked."""

    task: str
    scoring: str
    cells: list[Cell]


def compare_targets(
    targets: Sequence[str], only: Sequence[str] = (), names: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Compare runs, folders of predictions and published tables; return a JSON-safe mapping.

    `names` gives targets other names than their folders'.

    Scores are set against each other where task, scoring and contract are the same, paired by item where items are
    kept; p-values are corrected (Holm) over all comparisons made. Raises KoatError when a target cannot be read,
    and DataError when nothing may be compared, with the reasons.
    """
    subjects = group_subjects(collect_sources(targets, names), only)
    if len(subjects) < 2:
        raise DataError(
            f"a comparison needs two subjects, and there is one: {subjects[0].name}. Runs that differ in nothing but "
            "their seed are one subject. Name another run, folder or table."
        )
    found = compare_subjects(subjects)
    if not found["comparisons"]:
        raise DataError(explain_nothing(subjects, found["refusals"]))
    return found


def compare_subjects(subjects: Sequence[Subject]) -> dict[str, Any]:
    """Compare what may be compared, be it nothing, and return what `compare_targets` does."""
    columns = list(collect_columns(subjects))
    pairs = [
        (column, left, right)
        for column in columns
        for left, right in combinations(column.cells, 2)
        if left.is_meaningful and right.is_meaningful
    ]
    differences = [measure_difference(left, right) for _, left, right in pairs]
    corrected = correct_holm([difference.p for difference in differences])
    comparisons = [
        describe_comparison(*pair, difference, p, len(pairs))
        for pair, difference, p in zip(pairs, differences, corrected, strict=True)
    ]
    notes = dict.fromkeys(note for subject in subjects for source in subject.sources for note in source.notes)
    return {
        "subjects": [describe_subject(subject) for subject in subjects],
        "columns": [describe_column(column) for column in columns],
        "groups": set_groups_side_by_side(subjects),
        "comparisons": comparisons,
        "refusals": [*find_refusals(subjects), *find_meaningless(columns)],
        "correction": {"method": "Holm", "num_comparisons": len(pairs), "alpha": ALPHA},
        "notes": list(notes),
    }


# What stands together ------------------------------------------------------------------------------------------


def collect_columns(subjects: Sequence[Subject]) -> Iterator[Column]:
    """Yield a column for each (task, scoring, contract), in the order in which they are met."""
    keys = dict.fromkeys(
        (score.task, score.scoring, score.contract.hash)
        for subject in subjects
        for source in subject.sources
        for score in source.scores
    )
    for key in keys:
        cells = [
            Cell(subject.name, [score for _, score in found], [source.seed for source, _ in found])
            for subject in subjects
            if (found := [pair for source in subject.sources for pair in _pick(source, key)])
        ]
        yield Column(key[0], key[1], cells)


def _pick(source: Source, key: tuple[str, str, str]) -> Iterator[tuple[Source, Scored]]:
    for score in source.scores:
        if (score.task, score.scoring, score.contract.hash) == key:
            yield source, score


def find_refusals(subjects: Sequence[Subject]) -> Iterator[dict[str, Any]]:
    """Yield what may not be ranked, with the parts of the contracts that differ.

    Two subjects are refused for a task and a scoring when both have it and under no contract in common; for a task
    alone when they have no scoring of it in common (`acc` here, `acc_norm` there).
    """
    for left, right in combinations(subjects, 2):
        ours, theirs = _sort_scores(left), _sort_scores(right)
        for task in ours:
            shared = [scoring for scoring in ours[task] if scoring in theirs.get(task, {})]
            for scoring in shared:
                mine, other = ours[task][scoring], theirs[task][scoring]
                if not {score.contract.hash for score in mine} & {score.contract.hash for score in other}:
                    yield _refuse(left.name, mine[0], right.name, other[0])
            if task in theirs and not shared:
                first, second = (next(iter(side[task].values()))[0] for side in (ours, theirs))
                yield _refuse(left.name, first, right.name, second)


def _sort_scores(subject: Subject) -> dict[str, dict[str, list[Scored]]]:
    """Return a subject's scores by task and scoring."""
    found: dict[str, dict[str, list[Scored]]] = {}
    for source in subject.sources:
        for score in source.scores:
            found.setdefault(score.task, {}).setdefault(score.scoring, []).append(score)
    return found


def find_meaningless(columns: Sequence[Column]) -> Iterator[dict[str, Any]]:
    """Yield the pairs of which a score means nothing, and which is that."""
    for column in columns:
        for left, right in combinations(column.cells, 2):
            void = [cell.subject for cell in (left, right) if not cell.is_meaningful]
            if void:
                reasons = {"scoring": f"{', '.join(void)}: {MEANINGLESS}"}
                yield _refuse(left.subject, left.scores[0], right.subject, right.scores[0], reasons)


def _refuse(
    left: str, mine: Scored, right: str, other: Scored, reasons: dict[str, str] | None = None
) -> dict[str, Any]:
    reasons = reasons or explain_differences(mine.contract.parts, other.contract.parts)
    if "items" in reasons and mine.predictions and other.predictions:
        ours, theirs = mine.predictions, other.predictions
        # Rows of two files may have the same numbers and nothing else in common.
        num_common = sum(ours[name].get("text") == theirs[name].get("text") for name in ours.keys() & theirs.keys())
        reasons["items"] += f", {num_common or 'none'} of them in common"
    scoring = mine.scoring if mine.scoring == other.scoring else f"{mine.scoring} / {other.scoring}"
    return {
        "task": mine.task, "scoring": scoring, "left": left, "right": right, "parts": list(reasons),
        "reasons": list(reasons.values()),
        "scores": [
            {"subject": name, "metric": score.metric, "value": score.value, "low": score.low, "high": score.high,
             "num_items": score.num_items, "contract": score.contract.hash}
            for name, score in ((left, mine), (right, other))
        ],
    }  # fmt: skip


def explain_nothing(subjects: Sequence[Subject], refusals: Sequence[Mapping[str, Any]]) -> str:
    """Say why nothing could be compared."""
    if not refusals:
        tasks = "; ".join(f"{subject.name}: {', '.join(_sort_scores(subject))}" for subject in subjects)
        return f"there is no task that two of them have in common ({tasks}). Evaluate them on the same task."
    lines = [
        f"{refusal['left']} and {refusal['right']}, {refusal['task']}: {'; '.join(refusal['reasons'])}"
        for refusal in refusals
    ]
    return "\n  ".join(
        [
            "nothing here may be ranked, and this is why:",
            *lines,
            "Evaluate them again on the same items, in the same way, by the same metric.",
        ]
    )


# What is measured ----------------------------------------------------------------------------------------------


def measure_difference(left: Cell, right: Cell) -> Difference:
    """Compare two cells of a column by the strongest test that what is known of them allows."""
    first, second = left.scores[0], right.scores[0]
    if not (first.predictions and second.predictions):
        return compare_counts(first.num_right, first.num_items, second.num_right, second.num_items)
    ids = sorted(set.intersection(*(set(score.predictions) for score in (*left.scores, *right.scores))))
    if not ids:
        raise DataError(
            f"{left.subject} and {right.subject} have no items of {first.task} in common. Ask both of the same file: "
            "`koat eval` with the same --data and --limit."
        )
    ours, theirs, texts = left.to_table(ids), right.to_table(ids), find_texts((*left.scores, *right.scores), ids)
    if len(ours) > 1 or len(theirs) > 1:
        return compare_seeds(ours, theirs, (left.seeds[0] is not None, right.seeds[0] is not None), texts)
    if not has_shared_texts(texts) and are_answers(ours, theirs):
        return compare_answers(ours[0] == 1, theirs[0] == 1)
    return compare_values(ours[0], theirs[0], texts)


def describe_comparison(
    column: Column, left: Cell, right: Cell, difference: Difference, corrected: float, num_comparisons: int
) -> dict[str, Any]:
    """Return one comparison with its verdict: which side is better, or that they cannot be told apart.

    A side is better when the corrected p-value is below 0.05 and the interval leaves out zero. `unsure` says that
    this one comparison alone would have found a difference, but among so many it may be chance; `smallest` and
    `needed` are of one comparison among so many too.
    """
    apart = not difference.low <= 0 <= difference.high
    better = right.subject if difference.value > 0 else left.subject
    sure, alone = apart and corrected < ALPHA, apart and difference.p < ALPHA
    return {
        "task": column.task, "scoring": column.scoring, "contract": left.scores[0].contract.hash,
        "left": left.subject, "right": right.subject,
        "better": better if sure else None, "unsure": better if alone and not sure else None,
        **difference.to_mapping(num_comparisons), "p_holm": corrected,
        "conditions": explain_conditions(left.scores, right.scores),
        "seeds": [len(left.scores), len(right.scores)],
    }  # fmt: skip


def explain_conditions(left: Sequence[Scored], right: Sequence[Scored]) -> dict[str, str]:
    """Return how the conditions of any of `left` differ from those of any of `right`, by part."""
    found: dict[str, str] = {}
    for mine, other in product(*({score.conditions.hash: score for score in side}.values() for side in (left, right))):
        found = explain_differences(mine.conditions.parts, other.conditions.parts) | found
    return found


def describe_subject(subject: Subject) -> dict[str, Any]:
    """Return where a subject's scores were found."""
    return {
        "name": subject.name,
        "places": [source.place for source in subject.sources],
        "seeds": [source.seed for source in subject.sources if source.seed is not None],
    }


def describe_column(column: Column) -> dict[str, Any]:
    """Return a column's scores with intervals, spread over seeds, calibration and label bias."""
    first = column.cells[0].scores[0]
    return {
        "task": column.task, "scoring": column.scoring, "metric": first.metric,
        "contract": first.contract.to_mapping(), "rows": [describe_cell(cell) for cell in column.cells],
    }  # fmt: skip


def describe_cell(cell: Cell) -> dict[str, Any]:
    """Return one score; over several seeds its mean, and the spread over seeds apart from that over items."""
    first = cell.scores[0]
    row: dict[str, Any] = {
        "subject": cell.subject, "value": first.value, "low": first.low, "high": first.high,
        "num_items": first.num_items, "seeds": cell.seeds, "values": [score.value for score in cell.scores],
        "meaningful": cell.is_meaningful,
        "conditions": first.conditions.to_mapping(), "by_item": bool(first.predictions),
        "mixed_conditions": explain_conditions(cell.scores, cell.scores),
    }  # fmt: skip
    if len(cell.scores) > 1:
        ids = sorted(first.predictions)
        spread = measure_spread(cell.to_table(ids), find_texts(cell.scores, ids))
        row |= {"value": spread.mean, "low": spread.low, "high": spread.high, "spread": spread.to_mapping()}
    return row | describe_choices(list(first.predictions.values()), first.scoring, first.contract.parts)
