"""How much items can show: published formulas worked by hand, and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from koat.evaluation.power import count_needed, find_smallest, noise_of_counts, noise_of_means, noise_of_pairs
from koat.evaluation.significance import compare_answers, compare_counts, compare_seeds


def test_items_for_two_rates_worked_by_hand() -> None:
    # 0.664 and 0.712: pooled 0.688, 2 * 0.688 * 0.312 = 0.429312, root 0.655219, times 1.959964 = 1.284205.
    # 0.664 * 0.336 + 0.712 * 0.288 = 0.428160, root 0.654339, times 0.841621 = 0.550706.
    # (1.834911 / 0.048)^2 = 1461.3: 1,462 items each.
    assert count_needed(0.048, noise_of_counts(0.664)) == 1462
    assert count_needed(-0.048, noise_of_counts(0.712)) == 1462


def test_items_for_pairs_worked_by_hand() -> None:
    # Discordance 0.2, difference 0.048: 1.959964 * sqrt(0.2) = 0.876522, 0.841621 * sqrt(0.2 - 0.002304) = 0.374208;
    # (1.250730 / 0.048)^2 = 678.96: 679 items.
    assert count_needed(0.048, noise_of_pairs(0.2)) == 679
    # A mean difference of 0.1 standard deviations: (2.801585 / 0.1)^2 = 784.9.
    assert count_needed(0.1, noise_of_means(1.0)) == 785


@pytest.mark.parametrize("noise", [noise_of_pairs(0.2), noise_of_counts(0.3), noise_of_means(0.4)])
@pytest.mark.parametrize("num_items", [200, 500, 4000])
def test_the_smallest_difference_needs_just_these_items(noise: object, num_items: int) -> None:
    smallest = find_smallest(num_items, noise)  # type: ignore[arg-type]
    assert smallest is not None
    assert count_needed(smallest * 1.000001, noise) == num_items  # type: ignore[arg-type]


def test_what_cannot_be_shown_at_all() -> None:
    # All discordant pairs on one side are 4 of 100 at the most; below 1.96^2 no difference is found at all.
    assert find_smallest(100, noise_of_pairs(0.03)) is None
    assert find_smallest(100, noise_of_pairs(0.0)) is None
    assert find_smallest(100, noise_of_means(0.0)) is None
    assert find_smallest(3, noise_of_counts(0.5)) is None
    assert count_needed(0.0, noise_of_pairs(0.2)) is None


def test_a_smaller_level_needs_more() -> None:
    noise = noise_of_counts(0.664)
    assert count_needed(0.048, noise, alpha=0.05 / 6) > count_needed(0.048, noise) > 0  # type: ignore[operator]


def find_power_of_pairs(discordance: float, difference: float, num_items: int, num_trials: int) -> float:
    """Return how often the exact test finds a difference that is there."""
    rng = np.random.default_rng(0)
    cells = [(discordance - difference) / 2, (discordance + difference) / 2, 1 - discordance]
    tables = rng.multinomial(num_items, cells, num_trials)
    cache: dict[tuple[int, int], bool] = {}
    for left, right, _ in tables:
        cache.setdefault((left, right), bool(stats.binomtest(int(left), int(left + right)).pvalue < 0.05))
    return float(np.mean([cache[left, right] for left, right, _ in tables]))


def test_so_many_items_find_the_difference_four_times_in_five() -> None:
    assert 0.75 <= find_power_of_pairs(0.2, 0.048, 679, 2000) <= 0.83  # the exact test is a little shy
    rng = np.random.default_rng(0)
    counts = rng.binomial(1462, (0.664, 0.712), (400, 2))
    found = [compare_counts(int(a), 1462, int(b), 1462).p < 0.05 for a, b in counts]
    assert 0.74 <= np.mean(found) <= 0.86


def test_the_smallest_difference_of_a_comparison() -> None:
    left = np.arange(500) % 10 < 7
    right = left.copy()
    right[::10] ^= True
    found = compare_answers(left.tolist(), right.tolist())
    assert found.find_smallest() == find_smallest(500, noise_of_pairs(0.1))
    # 500 items of 66.4 %: about 8.5 points, towards one half.
    counts = compare_counts(332, 500, 356, 500)
    assert counts.find_smallest() == pytest.approx(0.086, abs=0.002)
    assert counts.count_needed() == 1462


def test_unequal_numbers_of_items_count_by_the_variance_they_bring() -> None:
    # 332 of 500 and 1424 of 2000: a share's variance is counted 1/500 + 1/2000 times, as with 800 and 800.
    smallest = compare_counts(332, 500, 1424, 2000).find_smallest()
    assert smallest is not None
    low, high, weight = 0.336, 0.336 + smallest, 1 / 500 + 1 / 2000
    middle = (low + high) / 2
    without = 1.959964 * (middle * (1 - middle) * weight) ** 0.5
    shown = 0.841621 * ((low * (1 - low) + high * (1 - high)) / 2 * weight) ** 0.5
    assert smallest == pytest.approx(without + shown, rel=1e-5)
    assert compare_counts(1424, 2000, 332, 500).find_smallest() == pytest.approx(smallest, rel=0.05)


def test_seeds_bound_what_any_number_of_items_can_show() -> None:
    # Items of deviation 0.3, very many seeds that bring a variance of 1e-4 to the difference whatever the items:
    # (1.959964 + 0.841621) * sqrt(0.09 / 5000 + 1e-4) = 2.801585 * 0.010863 = 0.030433.
    noise = noise_of_means(0.3, ((1e-4, 10**9),))
    assert find_smallest(5000, noise) == pytest.approx(0.030433, rel=1e-4)
    # 2.801585 * 0.01 = 0.028016: a difference below that is never shown, one above it needs
    # 0.09 / ((0.03 / 2.801585)^2 - 1e-4) = 6,136.8 items, where 785 would do for one method without seeds.
    assert count_needed(0.028, noise) is None
    assert count_needed(0.03, noise) == pytest.approx(6137, abs=2)
    assert count_needed(0.03, noise_of_means(0.3)) == 785


def test_few_seeds_ask_for_students_quantiles() -> None:
    # Three seeds on either side and items without number: four degrees of freedom, 2.776445 + 0.940965 = 3.717410.
    noise = noise_of_means(0.3, ((5e-5, 2), (5e-5, 2)))
    assert find_smallest(1e12, noise) == pytest.approx(0.0371741, rel=1e-4)
    assert count_needed(0.028, noise) is None
    smallest = find_smallest(5000, noise)
    assert smallest is not None and 0.030433 < smallest < 0.0371741
    assert count_needed(smallest * 1.0001, noise) == pytest.approx(5000, rel=0.01)


@pytest.mark.parametrize("num_seeds", [3, 5])
def test_seeds_and_items_find_the_difference_four_times_in_five(num_seeds: int) -> None:
    term = (1e-4 / num_seeds, num_seeds - 1)
    smallest = find_smallest(2000, noise_of_means(0.4, (term, term)))
    rng, found = np.random.default_rng(0), []
    for _ in range(500):
        left, right = (rng.normal(0, 0.01, (num_seeds, 1)) + np.zeros(2000) for _ in range(2))
        found.append(compare_seeds(left, right + rng.normal(smallest, 0.4, 2000)).p < 0.05)
    assert 0.74 <= np.mean(found) <= 0.86


@pytest.mark.parametrize("share", [0.0, 1e-9])
def test_a_share_of_nothing_still_has_a_smallest_difference(share: float) -> None:
    found = find_smallest(500, noise_of_counts(share))
    assert found is not None
    # z^2 / n and a little more: shares near zero vary by their own size.
    assert 0.01 < found < 0.02
