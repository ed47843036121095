"""Intervals against SciPy, and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from koat.evaluation.metrics import score_accuracy, score_values, wilson_interval


@pytest.mark.parametrize("num_items", [1, 2, 7, 150, 500, 5000])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_wilson_is_scipys(num_items: int, confidence: float) -> None:
    for num_right in {0, 1, num_items // 3, num_items // 2, num_items - 1, num_items}:
        expected = stats.binomtest(num_right, num_items).proportion_ci(confidence, method="wilson")
        assert wilson_interval(num_right, num_items, confidence) == pytest.approx(tuple(expected), abs=1e-12)


def test_wilson_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    for truth in (0.5, 0.7, 0.9):
        intervals = [wilson_interval(int(right), 200) for right in rng.binomial(200, truth, 4000)]
        covered = np.mean([low <= truth <= high for low, high in intervals])
        assert 0.93 <= covered <= 0.97


def test_no_items_are_no_share() -> None:
    for num_right, num_items in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="no share"):
            wilson_interval(num_right, num_items)


def test_accuracy_carries_its_interval() -> None:
    score = score_accuracy([True] * 332 + [False] * 168)
    assert score.value == 0.664
    assert score.num_items == 500
    assert score.meaningful
    # Worked by hand: z = 1.959964, centre (0.664 + 0.00384146) / 1.00768292, half-width 0.041248.
    assert (score.low, score.high) == (pytest.approx(0.6215, abs=1e-4), pytest.approx(0.7040, abs=1e-4))
    assert score.to_mapping()["name"] == "accuracy"


def test_values_of_0_and_1_have_wilsons_interval_and_others_the_bootstraps() -> None:
    share = score_values("acc", [1.0, 0.0, 0.0, 1.0, 1.0])
    assert (share.value, share.low, share.high) == (0.6, *wilson_interval(3, 5))
    values = list(np.random.default_rng(0).beta(2, 3, 400))
    score = score_values("f1", values)
    error = np.std(values) / 20
    assert score.value == pytest.approx(np.mean(values))
    assert (score.low, score.high) == pytest.approx((score.value - 1.96 * error, score.value + 1.96 * error), abs=0.003)
    assert score == score_values("f1", values)
    assert (score_values("f1", [0.4]).low, score_values("f1", [0.4]).high) == (0.0, 1.0)


@pytest.mark.parametrize("num_items", [2, 3, 5, 10, 29])
def test_intervals_of_few_values_hold_the_truth(num_items: int) -> None:
    rng, held = np.random.default_rng(1), []
    for _ in range(1000):
        score = score_values("f1", list(rng.beta(2, 3, num_items)))
        held.append(score.low <= 0.4 <= score.high)
    assert np.mean(held) >= 0.95


def test_values_that_are_all_alike_are_no_certainty() -> None:
    for number in (20, 50):
        score = score_values("f1", [0.5] * number)
        assert (score.low, score.high) == wilson_interval(number / 2, number)


def test_few_values_that_are_no_shares_have_students_interval() -> None:
    values = [3.0, 5.0, 4.5, 7.0]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    score = score_values("perplexity", values)
    assert (score.low, score.high) == (pytest.approx(low), pytest.approx(high))
