"""Variance components: known ones come back, and seeds are kept apart from items."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest

from koat.evaluation.spread import measure_spread, split_variance


def test_components_worked_by_hand() -> None:
    # Two seeds, three items: 1 1 0 / 1 0 0. Means: seeds 2/3, 1/3; items 1, 1/2, 0; all 1/2.
    # By seed: 3 * ((1/6)^2 * 2) / 1 = 1/6. By item: 2 * (1/4 + 0 + 1/4) / 2 = 1/2.
    # Rest: total 6 * 1/4 = 3/2, less 1/6, less 1 (by item, unscaled) = 1/3, over (1 * 2) = 1/6.
    found = split_variance(np.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))
    assert found.rest == pytest.approx(1 / 6)
    assert found.seed == pytest.approx(0, abs=1e-12)
    assert found.item == pytest.approx((1 / 2 - 1 / 6) / 2)


def test_known_components_come_back() -> None:
    rng, found = np.random.default_rng(0), []
    for _ in range(300):
        seeds, items = rng.normal(0, 0.2, (6, 1)), rng.normal(0, 0.5, (1, 80))
        found.append(split_variance(0.5 + seeds + items + rng.normal(0, 0.3, (6, 80))))
    assert np.mean([part.seed for part in found]) == pytest.approx(0.04, rel=0.15)
    assert np.mean([part.item for part in found]) == pytest.approx(0.25, rel=0.05)
    assert np.mean([part.rest for part in found]) == pytest.approx(0.09, rel=0.02)


def test_chance_on_few_items_is_not_taken_for_the_seeds() -> None:
    rng = np.random.default_rng(1)
    found = [measure_spread((rng.uniform(size=(5, 100)) < 0.7).astype(float)) for _ in range(200)]
    # Each seed's score alone spreads by sqrt(0.7 * 0.3 / 100) = 4.6 points, none of it the seeds'.
    assert np.mean([spread.observed for spread in found]) == pytest.approx(0.046, rel=0.15)
    assert np.mean([spread.over_seeds**2 for spread in found]) < 0.4 * 0.046**2
    assert np.mean([spread.over_items for spread in found]) == pytest.approx(0.046, rel=0.05)


def test_over_items_is_binomial_sampling() -> None:
    rng = np.random.default_rng(2)
    values = (rng.uniform(size=(3, 2000)) < rng.uniform(0.4, 1.0, (1, 2000))).astype(float)
    spread = measure_spread(values)
    assert spread.over_items == pytest.approx(sqrt(spread.mean * (1 - spread.mean) / 2000), rel=0.02)
    assert spread.low < spread.mean < spread.high
    assert spread.mean == pytest.approx(values.mean())
    assert (spread.num_seeds, spread.num_items) == (3, 2000)


def test_seeds_that_agree_on_every_item_do_not_spread() -> None:
    spread = measure_spread([[1, 0, 1, 1]] * 3)
    assert (spread.observed, spread.over_seeds) == (0, 0)
    # Four items, three right: 0.75 * 0.25 / (4 - 1), the unbiased variance over items.
    assert spread.over_items == pytest.approx(sqrt(0.75 * 0.25 / 3))


@pytest.mark.parametrize("values", [[[1], [1], [1]], [[1], [0]], [[0.2], [0.3], [0.4]]])
def test_one_item_leaves_everything_open(values: list[list[float]]) -> None:
    spread = measure_spread(values)
    assert spread.mean == pytest.approx(np.mean(values))
    assert (spread.low, spread.high, spread.error, spread.over_items) == (0, 1, 0.5, 0.5)
    assert spread.over_seeds == spread.observed == pytest.approx(np.std(values, ddof=1))
    assert (spread.num_seeds, spread.num_items) == (len(values), 1)


@pytest.mark.parametrize(("num_seeds", "over_seeds"), [(3, 0.0), (3, 0.05), (8, 0.05)])
def test_the_mean_over_seeds_is_covered(num_seeds: int, over_seeds: float) -> None:
    rng, covered = np.random.default_rng(3), []
    for _ in range(500):
        items = rng.uniform(0.3, 0.7, 200)
        shares = np.clip(items + rng.normal(0, over_seeds, (num_seeds, 1)), 0, 1)
        spread = measure_spread((rng.uniform(size=shares.shape) < shares).astype(float))
        covered.append(spread.low <= 0.5 <= spread.high)
    assert np.mean(covered) >= 0.925
