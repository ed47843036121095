"""Means over a group's tasks, in both ways: every item counts alike, or every task does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist, fmean, variance
from typing import Any

from koat.evaluation.metrics import Score, score_values
from koat.evaluation.result import TaskResult


@dataclass(frozen=True, slots=True)
class GroupMean:
    """One metric over a group: `items` weighs items alike (a large task counts for more), `tasks` weighs tasks."""

    items: Score
    tasks: Score

    def to_mapping(self) -> dict[str, Any]:
        """Return a JSON-safe mapping."""
        return {"items": self.items.to_mapping(), "tasks": self.tasks.to_mapping()}


def average_group(results: Sequence[TaskResult]) -> dict[str, GroupMean]:
    """Return the means of each scoring that all tasks of a group have."""
    shared = [scoring for scoring in results[0].scores if all(scoring in result.scores for result in results)]
    return {scoring: _average(results, scoring) for scoring in shared}


def _average(results: Sequence[TaskResult], scoring: str) -> GroupMean:
    tables = [result.list_values(scoring) for result in results]
    name = results[0].scores[scoring].name
    return GroupMean(score_values(name, [value for table in tables for value in table]), average_tables(name, tables))


def average_tables(name: str, tables: Sequence[Sequence[float]]) -> Score:
    """Return the mean over tasks of their means over items, with its 95 % interval.

    The tasks are taken as they are, the items as a draw: each task adds its own variance over its own number of
    items (normal interval). Where a task's shares are all alike, as a single one is, its variance is taken from one
    right and one wrong answer more (Laplace): a task whose few items are all right is no certainty.
    """
    value = fmean(fmean(table) for table in tables)
    spread = [_estimate_variance(table) / len(table) for table in tables]
    reach = NormalDist().inv_cdf(0.975) * sqrt(sum(spread)) / len(tables)
    low, high = value - reach, value + reach
    if all(0 <= each <= 1 for table in tables for each in table):
        low, high = max(0.0, low), min(1.0, high)
    return Score(name, value, low, high, sum(map(len, tables)))


def _estimate_variance(table: Sequence[float]) -> float:
    """Return the variance of a task's values."""
    if min(table) < max(table) or not 0 <= table[0] <= 1:
        return variance(table) if len(table) > 1 else 0.0
    share = (sum(table) + 1) / (len(table) + 2)
    return share * (1 - share)
