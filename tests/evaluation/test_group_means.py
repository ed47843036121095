"""Means over tasks against the formulas written out, and the tables of a group."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt
from typing import Any

import numpy as np
import pytest

from koat.evaluation.catalogue import load_task
from koat.evaluation.contract import Parts
from koat.evaluation.group_means import average_group, average_tables
from koat.evaluation.metrics import score_values, wilson_interval
from koat.evaluation.result import TaskResult
from koat.evaluation.task_group import TaskGroup, make_views


def make_result(name: str, shots: int = 0, **scorings: list[float]) -> TaskResult:
    """Return a result with these values per item."""
    rows: list[dict[str, Any]] = [
        {"id": str(place), "correct": dict(zip(scorings, values, strict=True))}
        for place, values in enumerate(zip(*scorings.values(), strict=True))
    ]
    scores = {scoring: score_values(scoring, values) for scoring, values in scorings.items()}
    return TaskResult(name, shots, 1, scores, rows, {}, Parts({}), [], [], 1.0, 1, 1)


def test_items_and_tasks_are_weighed_apart() -> None:
    small, large = make_result("small", acc=[1.0, 1.0]), make_result("large", acc=[1.0] + [0.0] * 7, acc_norm=[0.0] * 8)
    means = average_group([small, large])
    assert list(means) == ["acc"]
    assert means["acc"].items.value == pytest.approx(3 / 10)
    assert (means["acc"].items.low, means["acc"].items.high) == wilson_interval(3, 10)
    assert means["acc"].tasks.value == pytest.approx((1 + 1 / 8) / 2)
    # Two of two right: as if it were three of four.
    error = sqrt(3 / 4 * 1 / 4 / 2 + np.var([1] + [0] * 7, ddof=1) / 8) / 2
    assert means["acc"].tasks.high == pytest.approx(min(1, (1 + 1 / 8) / 2 + 1.959964 * error))
    assert means["acc"].tasks.num_items == 10


def test_the_interval_over_tasks_covers_the_truth() -> None:
    generator = np.random.default_rng(0)
    rates, sizes = (0.3, 0.6, 0.8), (60, 200, 90)
    hits = 0
    for _ in range(400):
        tables = [list(generator.binomial(1, p, n).astype(float)) for p, n in zip(rates, sizes, strict=True)]
        score = average_tables("acc", tables)
        hits += score.low <= sum(rates) / 3 <= score.high
    assert 0.92 <= hits / 400 <= 0.98


def test_few_items_that_are_all_right_are_no_certainty() -> None:
    score = average_tables("acc", [[1.0, 1.0], [1.0, 1.0, 1.0]])
    assert score.value == score.high == 1.0
    assert score.low < 0.65


def test_a_single_item_leaves_the_interval_wide() -> None:
    score = average_tables("acc", [[1.0], [0.0]])
    assert (score.low, score.high) == (0.0, 1.0)


def test_the_leaderboard_shows_its_metrics_and_beside_them_the_others() -> None:
    group = load_task("leaderboard-2023")
    assert isinstance(group, TaskGroup)
    assert [(part.task, part.num_shots) for part in group.parts] == [
        ("arc_challenge", 25), ("hellaswag", 10), ("mmlu", 5), ("truthfulqa_mc2", 0), ("truthfulqa_mc1", 0),
    ]  # fmt: skip
    choice = make_result("arc", 25, acc=[0.0, 1.0], acc_norm=[1.0, 1.0])
    subjects = [make_result("a", 5, acc=[1.0, 1.0]), make_result("b", 5, acc=[0.0] * 6)]
    mc2, mc1 = make_result("mc2", acc=[0.25, 0.75]), make_result("mc1", acc=[0.0, 0.0])
    views = make_views(group, [[choice], [replace(choice, num_shots=10)], subjects, [mc2], [mc1]])
    leaderboard, other = views
    assert [leaderboard["name"], other["name"]] == ["leaderboard", "A3Duck"]
    assert [(row["label"], row["scoring"], row["num_shots"], row["value"]) for row in leaderboard["rows"]] == [
        ("ARC", "acc_norm", 25, 1.0), ("HellaSwag", "acc_norm", 10, 1.0), ("MMLU", "acc", 5, 0.5),
        ("TruthfulQA mc2", "acc", 0, 0.5),
    ]  # fmt: skip
    assert leaderboard["rows"][2]["weighed"] == "mean over 2 tasks"
    assert [row["value"] for row in other["rows"]] == [0.5, 0.5, 0.5, 0.0]
    assert (leaderboard["mean"], other["mean"]) == (0.75, 0.375)
