"""Tests and intervals against SciPy, tables worked by hand, and simulation."""

from __future__ import annotations

from itertools import product
from math import comb, sqrt

import numpy as np
import pytest
from scipy import stats
from scipy.stats.contingency import expected_freq

from koat.evaluation.significance import (
    compare_answers,
    compare_counts,
    compare_seeds,
    compare_values,
    correct_holm,
    newcombe_paired,
)


def make_pairs(both: int, only_left: int, only_right: int, neither: int) -> tuple[list[bool], list[bool]]:
    """Return answers with a given table of pairs."""
    left = [True] * (both + only_left) + [False] * (only_right + neither)
    right = [True] * both + [False] * only_left + [True] * only_right + [False] * neither
    return left, right


# Paired accuracies -------------------------------------------------------------------------------------------


def test_mcnemar_worked_by_hand() -> None:
    # 10 items are answered unlike, 2 of them right on the left alone. Under no difference each falls to either
    # side like a coin: p = 2 * (1 + 10 + 45) / 2^10 = 112 / 1024.
    found = compare_answers(*make_pairs(both=20, only_left=2, only_right=8, neither=5))
    assert found.p == pytest.approx(112 / 1024, abs=1e-12)
    assert (found.only_left, found.only_right, found.num_items) == (2, 8, 35)
    assert found.value == pytest.approx(6 / 35)
    assert found.paired


@pytest.mark.parametrize(("only_left", "only_right"), [(0, 1), (0, 6), (3, 3), (17, 30), (121, 160)])
def test_mcnemar_is_the_sum_of_binomial_terms(only_left: int, only_right: int) -> None:
    number, fewer = only_left + only_right, min(only_left, only_right)
    tail = sum(comb(number, k) for k in range(fewer + 1)) / 2**number
    for left, right in ((only_left, only_right), (only_right, only_left)):
        assert compare_answers(*make_pairs(7, left, right, 9)).p == pytest.approx(min(1.0, 2 * tail), abs=1e-12)


def test_answers_that_never_differ_say_nothing() -> None:
    found = compare_answers(*make_pairs(30, 0, 0, 10))
    assert (found.value, found.p, found.find_smallest(), found.count_needed()) == (0.0, 1.0, None, None)
    assert found.low < 0 < found.high


def test_newcombes_interval_worked_by_hand() -> None:
    # Pairs (e, f, g, h) = (36, 12, 2, 0) of 50: 48 and 38 right; right minus left = -0.2.
    # Wilson, z = 1.959964, z^2 = 3.841459:
    #   48/50: centre (0.96 + 0.0384146) / 1.0768292 = 0.9271805, half-width
    #          1.959964 / 1.0768292 * sqrt(0.96 * 0.04 / 50 + 3.841459 / 10000) = 0.0617806 -> 0.8653999, 0.9889611
    #   38/50: centre (0.76 + 0.0384146) / 1.0768292 = 0.7414496, half-width
    #          1.8201251 * sqrt(0.76 * 0.24 / 50 + 0.0003841459) = 0.1155678 -> 0.6258818, 0.8570174
    # phi: e h - f g = -24, which is not positive and stays; sqrt(48 * 2 * 38 * 12) = 209.2271, phi = -0.1147079.
    # low:  dl = 0.76 - 0.6258818 = 0.1341182, du = 0.9889611 - 0.96 = 0.0289611,
    #       sqrt(0.0179877 + 0.0008387 + 2 * 0.1147079 * 0.1341182 * 0.0289611) = 0.1404216 -> -0.3404216
    # high: du = 0.8570174 - 0.76 = 0.0970174, dl = 0.96 - 0.8653999 = 0.0946001,
    #       sqrt(0.0094124 + 0.0089492 + 2 * 0.1147079 * 0.0970174 * 0.0946001) = 0.1430649 -> -0.0569351
    low, high = newcombe_paired(36, 12, 2, 50)
    assert low == pytest.approx(-0.3404, abs=1e-4)
    assert high == pytest.approx(-0.0569, abs=1e-4)


def test_newcombes_correction_lowers_a_positive_correlation() -> None:
    # (e, f, g, h) = (20, 4, 6, 20) of 50: e h - f g = 376, less 50 / 2 is 351; phi = 351 / sqrt(24 * 26 * 26 * 24).
    low, high = newcombe_paired(20, 4, 6, 50)
    left, right = (stats.binomtest(k, 50).proportion_ci(method="wilson") for k in (24, 26))
    phi = 351 / 624
    down, up = 0.52 - right.low, left.high - 0.48
    assert low == pytest.approx(0.04 - sqrt(down**2 + up**2 - 2 * phi * down * up), abs=1e-12)
    assert low < 0.04 < high


def cover_pairs(num_items: int, num_trials: int, cells: tuple[float, ...], seed: int) -> float:
    """Return how often the interval holds the true difference."""
    truth, rng = cells[2] - cells[1], np.random.default_rng(seed)
    tables = rng.multinomial(num_items, cells, num_trials)
    intervals = [newcombe_paired(int(a), int(b), int(c), num_items) for a, b, c, _ in tables]
    return float(np.mean([low <= truth <= high for low, high in intervals]))


def test_paired_interval_covers_the_truth() -> None:
    for seed, cells in enumerate([(0.6, 0.05, 0.1, 0.25), (0.3, 0.2, 0.2, 0.3), (0.85, 0.02, 0.08, 0.05)]):
        assert 0.93 <= cover_pairs(300, 2000, cells, seed) <= 0.985


@pytest.mark.soak
@pytest.mark.parametrize("num_items", [50, 500])
@pytest.mark.parametrize("discordance", [0.05, 0.2, 0.4])
@pytest.mark.parametrize("part", [0.5, 0.7, 0.95])
def test_paired_interval_covers_the_truth_everywhere(num_items: int, discordance: float, part: float) -> None:
    for both in (0.2, 0.5):
        cells = (both, discordance * (1 - part), discordance * part, 1 - both - discordance)
        # With two or three discordant pairs in all, the interval falls short; McNemar's test then finds nothing.
        least = 0.93 if num_items * discordance >= 5 else 0.90
        assert least <= cover_pairs(num_items, 20_000, cells, 0) <= 0.995


def test_mcnemar_keeps_its_promise_where_nothing_differs() -> None:
    rng = np.random.default_rng(1)
    found = [stats.binomtest(int(k), 40).pvalue for k in rng.binomial(40, 0.5, 2000)]
    ours = {k: compare_answers(*make_pairs(50, k, 40 - k, 10)).p for k in range(41)}
    assert np.mean([p < 0.05 for p in found]) <= 0.05
    assert all(ours[k] == pytest.approx(stats.binomtest(k, 40).pvalue) for k in ours)


# Paired values -----------------------------------------------------------------------------------------------


def draw_values(num_items: int, shift: float, seed: int) -> tuple[list[float], list[float]]:
    """Return two lists of values that correlate, the second greater by `shift` on average."""
    rng = np.random.default_rng(seed)
    left = rng.beta(2, 3, num_items)
    return left.tolist(), (left + shift + rng.normal(0, 0.1, num_items)).tolist()


def test_bootstrap_is_scipys() -> None:
    left, right = draw_values(200, 0.02, 0)
    found = compare_values(left, right)
    expected = stats.bootstrap(
        (np.subtract(right, left),), np.mean, n_resamples=10_000, method="percentile", random_state=7
    ).confidence_interval
    assert (found.low, found.high) == (pytest.approx(expected.low, abs=6e-4), pytest.approx(expected.high, abs=6e-4))
    # With 200 items of like spread, the mean is as good as normal: the t test's p-value.
    assert found.p == pytest.approx(stats.ttest_rel(right, left).pvalue, abs=0.01)
    assert found.value == pytest.approx(np.mean(right) - np.mean(left))


def test_bootstrap_is_the_same_every_time_and_turns_with_its_sides() -> None:
    left, right = draw_values(60, 0.03, 1)
    found = compare_values(left, right)
    assert found == compare_values(left, right)
    turned = compare_values(right, left)
    assert (turned.value, turned.low, turned.high) == pytest.approx((-found.value, -found.high, -found.low))
    assert turned.p == pytest.approx(found.p)
    assert found != compare_values(left, right, seed=1)


@pytest.mark.parametrize("times", [1, 10])
def test_equal_values_do_not_differ(times: int) -> None:
    values = [0.1, 0.5, 0.9, 0.3] * times
    found = compare_values(values, values)
    assert (found.value, found.low, found.high, found.p, found.find_smallest()) == (0, 0, 0, 1, None)


def test_bootstrap_covers_the_truth() -> None:
    covered = []
    for seed in range(300):
        left, right = draw_values(80, 0.02, seed)
        found = compare_values(left, right, num_samples=1000)
        covered.append(found.low <= 0.02 <= found.high)
    assert 0.91 <= np.mean(covered) <= 0.98


def test_what_no_draw_of_the_bootstrap_reaches_is_the_t_tests() -> None:
    left, right = draw_values(1000, 0.3, 0)
    found = compare_values(left, right)
    assert found.test == "paired bootstrap"
    assert found.p < 1e-9
    assert found.p == pytest.approx(max(stats.ttest_rel(right, left).pvalue, 2.0**-999))
    # Alike to the last digit: no rarer than signs that all came out alike.
    assert compare_values([0.5] * 30, [0.8] * 30).p == pytest.approx(2.0**-29)


def test_few_values_are_compared_by_the_t_test() -> None:
    left, right = draw_values(12, 0.1, 0)
    found = compare_values(left, right)
    expected = stats.ttest_rel(right, left)
    interval = expected.confidence_interval()
    assert found.test == "paired t test"
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert compare_values(*draw_values(30, 0.1, 0)).test == "paired bootstrap"


@pytest.mark.parametrize("value", [0.3, -0.3])
@pytest.mark.parametrize("num_items", [2, 5, 6, 17, 29])
@pytest.mark.parametrize("num_seeds", [0, 1, 3], ids=["values", "a seed", "three seeds"])
def test_few_like_differences_are_no_certainty(value: float, num_items: int, num_seeds: int) -> None:
    if num_seeds:
        left = np.full((num_seeds, num_items), 0.5)
        found = compare_seeds(left, left + value)
    else:
        found = compare_values([0.5] * num_items, [0.5 + value] * num_items)
    # Of the 2^N ways to give N differences signs, two lie as far out as signs that are all alike.
    assert found.p == pytest.approx(2.0 ** (1 - num_items))
    assert found.low < value < found.high
    assert (found.low <= 0 <= found.high) == (found.p >= 0.05) == (num_items <= 5)
    needed = found.count_needed()
    assert needed is not None and 3 <= needed <= 18 and found.find_smallest() is not None


def test_five_items_of_one_sign_prove_nothing() -> None:
    # Flipping signs gives p = 2 / 2^5 at least, however close together the five lie.
    found = compare_values([0.1, 0.2, 0.3, 0.4, 0.5], [0.31, 0.4, 0.52, 0.6, 0.71])
    assert stats.ttest_1samp([0.21, 0.2, 0.22, 0.2, 0.21], 0).pvalue < 1e-4
    assert found.p == pytest.approx(0.0625)
    assert found.low < 0 < found.value < found.high


@pytest.mark.parametrize(("left", "right"), [(0.5, 0.8), (0.8, 0.5), (0.4, 0.4)])
def test_one_item_says_nothing(left: float, right: float) -> None:
    seeds = (np.array([[left], [left], [left + 0.1]]), np.array([[right]]))
    for found in (compare_values([left], [right]), compare_seeds(*seeds)):
        assert (found.low, found.high, found.p, found.num_items, found.find_smallest()) == (-1, 1, 1, 1, None)
    assert compare_values([left], [right]).value == pytest.approx(right - left)


def test_differences_too_small_to_be_squared_are_compared() -> None:
    left, right = [0.0] * 6, [1e-90, 2e-90, 3e-90, 1e-90, 0.0, 0.0]
    assert compare_values(left, right).p == pytest.approx(stats.ttest_rel(np.array(right) * 1e90, left).pvalue)


@pytest.mark.parametrize("num_items", [6, 12, 24])
def test_few_values_cover_the_truth(num_items: int) -> None:
    pairs = [draw_values(num_items, 0.02, seed) for seed in range(1000)]
    found = [compare_values(left, right) for left, right in pairs]
    assert 0.93 <= np.mean([each.low <= 0.02 <= each.high for each in found]) <= 0.98
    same = [compare_values(left, np.subtract(right, 0.02)) for left, right in pairs]
    assert np.mean([each.p < 0.05 for each in same]) <= 0.07


def test_what_cannot_be_paired_is_a_bug() -> None:
    with pytest.raises(ValueError, match="cannot be paired"):
        compare_answers([True], [True, False])
    with pytest.raises(ValueError, match="cannot be paired"):
        compare_values([], [])


# Seeds and items ---------------------------------------------------------------------------------------------


def draw_seeds(rng: np.random.Generator, items: np.ndarray, num_seeds: int, over_seeds: float) -> np.ndarray:
    """Return answers `[S, N]`, right with the probability that the item `[N]` and the seed add up to."""
    chances = items + rng.normal(0, over_seeds, (num_seeds, 1))
    return (rng.uniform(size=chances.shape) < chances).astype(float)


def cover_seeds(num_seeds: int, over_seeds: float, num_trials: int, gain: float = 0.05) -> tuple[float, float]:
    """Return how often the interval holds the gain, and how often no gain is taken for one."""
    rng, covered, alarms = np.random.default_rng(5), [], []
    for _ in range(num_trials):
        items = rng.uniform(0.35, 0.65, 200)
        left, right, same = (draw_seeds(rng, items + more, num_seeds, over_seeds) for more in (0.0, gain, 0.0))
        found = compare_seeds(left, right)
        covered.append(found.low <= gain <= found.high)
        alarms.append(compare_seeds(left, same).p < 0.05)
    return float(np.mean(covered)), float(np.mean(alarms))


@pytest.mark.parametrize("over_seeds", [0.0, 0.03])
def test_seeds_and_items_cover_the_truth(over_seeds: float) -> None:
    covered, alarms = cover_seeds(3, over_seeds, 500)
    assert covered >= 0.925
    assert alarms <= 0.075


@pytest.mark.soak
@pytest.mark.parametrize("num_seeds", [2, 3, 5])
@pytest.mark.parametrize("over_seeds", [0.0, 0.01, 0.03, 0.1])
def test_seeds_and_items_cover_the_truth_everywhere(num_seeds: int, over_seeds: float) -> None:
    covered, alarms = cover_seeds(num_seeds, over_seeds, 4000)
    assert covered >= 0.93
    assert alarms <= 0.07


def test_one_trained_seed_is_taken_to_spread_as_the_others_do() -> None:
    rng, alarms = np.random.default_rng(7), []
    for _ in range(500):
        items = rng.uniform(0.35, 0.65, 1000)
        left, right = (draw_seeds(rng, items, number, 0.03) for number in (1, 3))
        alarms.append([compare_seeds(left, right, trained).p < 0.05 for trained in ((True, True), (False, True))])
    assert np.mean(alarms, 0)[0] <= 0.075
    # A base that was not trained has no seed; taking the trained one for it would claim a difference far too often.
    assert np.mean(alarms, 0)[1] > 0.15


def test_one_seed_each_is_the_paired_t_test() -> None:
    left, right = (np.asarray([values]) for values in draw_values(150, 0.02, 3))
    found = compare_seeds(left, right)
    expected = stats.ttest_rel(right[0], left[0])
    interval = expected.confidence_interval()
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))


def test_seeds_that_spread_make_a_difference_less_sure() -> None:
    rng = np.random.default_rng(0)
    left = (rng.uniform(size=(3, 400)) < 0.5).astype(float)
    right = (rng.uniform(size=(3, 400)) < 0.58).astype(float)
    wild = right.copy()
    wild[0, :], wild[1, :] = rng.uniform(size=400) < 0.78, rng.uniform(size=400) < 0.38
    assert compare_seeds(left, right).p < 0.05 < compare_seeds(left, wild).p


# Counts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("left", "right", "expected"), [(332, 356, 0.1014), (374, 405, 0.0182), (340, 374, 0.0174)])
def test_published_counts_worked_by_hand(left: int, right: int, expected: float) -> None:
    # K(G)OAT's table, 500 items each. For 332 and 356: pooled share 0.688, standard error
    # sqrt(0.688 * 0.312 * 2 / 500) = 0.029302, z = 0.048 / 0.029302 = 1.6381, p = 0.1014.
    found = compare_counts(left, 500, right, 500)
    assert found.p == pytest.approx(expected, abs=2e-4)
    assert not found.paired
    assert "unpaired" in found.test


@pytest.mark.parametrize(("left", "num_left", "right", "num_right"), [(332, 500, 356, 500), (30, 60, 90, 120)])
def test_counts_are_scipys(left: int, num_left: int, right: int, num_right: int) -> None:
    table = [[left, num_left - left], [right, num_right - right]]
    assert expected_freq(table).min() >= 5
    found = compare_counts(left, num_left, right, num_right)
    assert found.p == pytest.approx(stats.chi2_contingency(table, correction=False).pvalue)
    first, second = (
        stats.binomtest(k, n).proportion_ci(method="wilson") for k, n in ((left, num_left), (right, num_right))
    )
    value = right / num_right - left / num_left
    low = value - sqrt((right / num_right - second.low) ** 2 + (first.high - left / num_left) ** 2)
    assert found.low == pytest.approx(low, abs=1e-12)


def test_newcombes_unpaired_interval_is_the_published_one() -> None:
    # Newcombe (1998), Stat Med 17:873-890, table II, contrast (a): 56/70 - 48/80 gives 0.0524 to 0.3339.
    found = compare_counts(48, 80, 56, 70)
    assert (found.low, found.high) == (pytest.approx(0.0524, abs=5e-5), pytest.approx(0.3339, abs=5e-5))


def test_few_counts_go_to_fisher() -> None:
    # 1 of 10 against 6 of 10: of the C(20, 7) = 77,520 ways to place 7 right answers, those with at most 1 on one
    # side: 2 * (C(10,0) C(10,7) + C(10,1) C(10,6)) = 2 * (120 + 2100) = 4,440.
    found = compare_counts(1, 10, 6, 10)
    assert found.test.startswith("Fisher")
    assert found.p == pytest.approx(4440 / 77520)
    assert compare_counts(0, 20, 0, 20).p == 1
    assert compare_counts(20, 20, 20, 20).p == 1


# Holm --------------------------------------------------------------------------------------------------------


def test_holm_worked_by_hand() -> None:
    # Sorted: 0.005 * 4 = 0.020, 0.010 * 3 = 0.030, 0.030 * 2 = 0.060, 0.040 * 1 = 0.040 but not below 0.060.
    assert correct_holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert correct_holm([0.6, 0.9]) == [1.0, 1.0]
    assert correct_holm([0.2]) == [0.2]
    assert correct_holm([]) == []


def test_holm_rejects_what_the_procedure_rejects() -> None:
    # Holm's procedure as he states it: from the smallest on, reject while p <= alpha / (number left).
    for values in product([0.001, 0.012, 0.02, 0.04, 0.3], repeat=4):
        order, rejected = sorted(range(4), key=values.__getitem__), set()
        for left, index in zip((4, 3, 2, 1), order, strict=True):
            if values[index] > 0.05 / left:
                break
            rejected.add(index)
        assert {index for index, p in enumerate(correct_holm(values)) if p <= 0.05 + 1e-12} == rejected


def test_what_seeds_hide_no_number_of_items_shows() -> None:
    rng = np.random.default_rng(0)
    rates = np.array([[0.50, 0.60, 0.70], [0.52, 0.62, 0.72]])
    left, right = ((rng.uniform(size=(3, 2000)) < side[:, None]).astype(float) for side in rates)
    found = compare_seeds(left, right)
    assert found.p > 0.05 and found.value != 0
    assert found.count_needed() is None
    # What the seeds bring by themselves: a spread of 0.1 on either side, over three seeds, so Student's quantiles at
    # four degrees of freedom.
    assert found.find_smallest() == pytest.approx(3.717410 * np.sqrt(2 * 0.01 / 3), rel=0.1)
    assert compare_seeds(left[:1], right[:1]).count_needed() is not None
