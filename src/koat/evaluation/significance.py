"""Whether two scores differ: by item, by item over several seeds, or by counts alone; and Holm's correction.

Differences are right minus left, as shares: 0.021 is 2.1 points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from koat.evaluation.bootstrap import NUM_SAMPLES, draw_means
from koat.evaluation.metrics import FEW, wilson_interval
from koat.evaluation.power import (
    ALPHA,
    Noise,
    count_needed,
    find_smallest,
    noise_of_counts,
    noise_of_means,
    noise_of_pairs,
)
from koat.evaluation.spread import add_errors, count_freedom, split_variance
from koat.evaluation.texts import has_shared_texts, join_by_text


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference between two scores with its 95 % interval and p-value, and what the items could have shown.

    `noise` is what one item brings (`most_noise`: the other way round, where that brings more), `num_pairs` the
    pairs of items that power counts with. `only_left` and
    `only_right` count the items that one of two alone answered right (None where an answer is more than right or
    wrong, where there are several seeds, or where items are not known).
    """

    value: float
    low: float
    high: float
    p: float
    test: str
    paired: bool
    num_items: int
    num_pairs: float
    noise: Noise = field(compare=False, repr=False)
    most_noise: Noise | None = field(default=None, compare=False, repr=False)
    only_left: int | None = None
    only_right: int | None = None

    def count_needed(self, num_comparisons: int = 1) -> int | None:
        """Return how many items would show this difference, as one of so many comparisons; None if none would."""
        return count_needed(self.value, self.noise, alpha=ALPHA / num_comparisons)

    def find_smallest(self, num_comparisons: int = 1) -> float | None:
        """Return the smallest difference that these items would have shown, as one of so many; None if none could."""
        return find_smallest(self.num_pairs, self.most_noise or self.noise, alpha=ALPHA / num_comparisons)

    def to_mapping(self, num_comparisons: int = 1) -> dict[str, Any]:
        """Return a JSON-safe mapping; what was possible is said as one of so many comparisons."""
        names = ("value", "low", "high", "p", "test", "paired", "num_items", "only_left", "only_right")
        return {name: getattr(self, name) for name in names} | {
            "smallest": self.find_smallest(num_comparisons),
            "needed": self.count_needed(num_comparisons),
        }


def compare_answers(left: ArrayLike, right: ArrayLike) -> Difference:
    """Compare two accuracies `[N]` (right or wrong) on the same items: exact McNemar test, Newcombe's interval.

    Sources: McNemar (1947), Note on the sampling error of the difference between correlated proportions;
    Newcombe (1998), Improved confidence intervals for the difference between binomial proportions based on
    paired data, method 10.
    """
    from scipy.stats import binomtest

    a, b = np.asarray(left, dtype=bool), np.asarray(right, dtype=bool)
    _check_pairs(len(a), len(b))
    both, (only_left, only_right) = int((a & b).sum()), count_discordant(a, b)
    discordant = only_left + only_right
    p = float(binomtest(only_left, discordant).pvalue) if discordant else 1.0
    low, high = newcombe_paired(both, only_left, only_right, len(a))
    noise = noise_of_pairs(discordant / len(a))
    return Difference(
        (only_right - only_left) / len(a), low, high, p, "exact McNemar", True, len(a), len(a), noise,
        None, only_left, only_right,
    )  # fmt: skip


def count_discordant(left: np.ndarray, right: np.ndarray) -> tuple[int, int]:
    """Return how many items the left side alone answered right, and how many the right side alone."""
    return int((left > right).sum()), int((right > left).sum())


def are_answers(*sides: np.ndarray) -> bool:
    """Whether all values are 0 or 1: right or wrong."""
    return all(bool(np.isin(side, (0, 1)).all()) for side in sides)


def newcombe_paired(both: float, only_left: float, only_right: float, num_items: int) -> tuple[float, float]:
    """Return Newcombe's 95 % interval (1998, method 10) of right minus left, from a table of pairs."""
    neither = num_items - both - only_left - only_right
    margins = (both + only_left) * (only_right + neither) * (both + only_right) * (only_left + neither)
    product = float(both * neither - only_left * only_right)
    if product > 0:
        product = max(0.0, product - num_items / 2)  # the method's correction for continuity
    return _square_and_add(
        (both + only_left, num_items), (both + only_right, num_items), product / sqrt(margins) if margins else 0.0
    )


def _square_and_add(left: tuple[float, int], right: tuple[float, int], phi: float) -> tuple[float, float]:
    """Join two Wilson intervals of shares that correlate by `phi` into one of right minus left."""
    shares = [num_right / num_items for num_right, num_items in (left, right)]
    (low_l, high_l), (low_r, high_r) = wilson_interval(*left), wilson_interval(*right)
    down, up = (shares[1] - low_r, high_l - shares[0]), (high_r - shares[1], shares[0] - low_l)
    value = shares[1] - shares[0]
    below, above = (sqrt(max(0.0, x * x + y * y - 2 * phi * x * y)) for x, y in (down, up))
    return max(-1.0, value - below), min(1.0, value + above)


def compare_values(
    left: ArrayLike,
    right: ArrayLike,
    texts: Sequence[str] | None = None,
    *,
    num_samples: int = NUM_SAMPLES,
    seed: int = 0,
) -> Difference:
    """Compare two means of values `[N]` on the same items: paired bootstrap, with few items the paired t test.

    Where `texts` names the text that each question is on, texts are what is drawn. The same values and seed give the
    same numbers. One item alone says nothing: its interval holds all that can be.
    """
    ours, theirs = np.asarray(left, dtype=float), np.asarray(right, dtype=float)
    _check_pairs(len(ours), len(theirs))
    value, num_items = float((theirs - ours).mean()), len(ours)
    differences = join_by_text(theirs - ours, texts)
    num_drawn = len(differences)
    test = "paired t test" if num_drawn < FEW else "paired bootstrap"
    if num_items < 2:
        return _say_nothing(value, test)
    deviation = float(differences.std(ddof=1))
    if num_drawn < FEW:
        low, high, p = judge_mean(value, num_drawn, [(deviation**2 / num_drawn, num_drawn - 1)])
        deviation = max(deviation, sqrt(num_drawn) * find_least_error(value, num_drawn, num_drawn - 1))
    else:
        low, high, p = bootstrap_mean(differences, num_samples, seed)
    per_draw = num_items / num_drawn
    counts = count_discordant(ours, theirs) if are_answers(ours, theirs) else None
    if counts and low == high == 0:  # alike by luck, or right in nothing: as many draws still leave room
        both, only_left, only_right = (count / per_draw for count in (float((ours * theirs).sum()), *counts))
        low, high = newcombe_paired(both, only_left, only_right, num_drawn)
    test += " over texts" if has_shared_texts(texts) else ""
    noise = noise_of_means(deviation * sqrt(per_draw), per_draw=per_draw)
    return Difference(value, low, high, p, test, True, num_items, num_items, noise, None, *(counts or (None, None)))


def bootstrap_mean(differences: np.ndarray, num_samples: int, seed: int) -> tuple[float, float, float]:
    """Return the percentile interval and the p-value of a mean of differences `[N]`.

    The p-value is the share of draws, moved to a mean of zero, that lie as far out as the mean. Where none does, so
    many draws cannot say how rare that is, and it is the t test's, if that is lower, and never below what flipping
    signs could give. Source: Efron and Tibshirani (1993), An introduction to the bootstrap, sections 13.3 and 16.4.
    """
    value = float(differences.mean())
    means = draw_means(differences, num_samples, np.random.default_rng(seed))
    low, high = (float(bound) for bound in np.percentile(means, (2.5, 97.5)))
    # Sums in another order differ in their last digits; equal means must count as equal.
    num_beyond = int((np.abs(means - value) >= abs(value) - 1e-12).sum())
    p = (1 + num_beyond) / (1 + num_samples)
    if not num_beyond:
        num_items = len(differences)
        _, _, by_t = judge_mean(value, num_items, [(float(differences.var(ddof=1)) / num_items, num_items - 1)])
        p = min(p, max(by_t, 2.0 ** (1 - num_items)))
    return low, high, p


def compare_seeds(
    left: np.ndarray,
    right: np.ndarray,
    trained: tuple[bool, bool] = (True, True),
    texts: Sequence[str] | None = None,
) -> Difference:
    """Compare two methods `[S, N]` (seeds, which may differ in number, and the same items, at least 2): t test.

    The error adds what items do to the mean difference per item and what seeds do to each method, with
    Satterthwaite's degrees of freedom. A method that was `trained` with one seed is taken to spread as the other
    does; where both have one, nothing is known of it, and the difference is one of two runs. `texts` as in
    `compare_values`. One item alone says nothing: its interval holds all that can be.
    """
    _check_pairs(left.shape[1], right.shape[1])
    value, num_items = float((right.mean(0) - left.mean(0)).mean()), left.shape[1]
    left, right = join_by_text(left, texts), join_by_text(right, texts)
    differences = right.mean(0) - left.mean(0)
    num_drawn = len(differences)
    test = "t test over seeds and texts" if has_shared_texts(texts) else "t test over seeds and items"
    if num_items < 2:
        return _say_nothing(value, test)
    items = float(differences.var(ddof=1))
    alone = any(known and len(side) == 1 for side, known in zip((left, right), trained, strict=True))
    several = [(side, 1 / len(side) + alone) for side in (left, right) if len(side) > 1]
    # What chance does to a seed on an item is in the variance over items and in that over seeds: counted once.
    parts = [(split_variance(side), weight) for side, weight in several]
    twice = sum(part.rest * weight for part, weight in parts)
    terms = [(max(0.0, items - twice) / num_drawn, num_drawn - 1)]
    terms += [(float(side.mean(1).var(ddof=1)) * weight, len(side) - 1) for side, weight in several]
    low, high, p = judge_mean(value, num_drawn, terms)
    deviation = max(sqrt(items), sqrt(num_drawn) * find_least_error(value, num_drawn, num_drawn - 1))
    noise = noise_of_means(
        deviation * sqrt(num_items / num_drawn),
        tuple((part.seed * weight, len(side) - 1) for (part, weight), (side, _) in zip(parts, several, strict=True)),
        num_items / num_drawn,
    )
    return Difference(value, low, high, p, test, True, num_items, num_items, noise)


def judge_mean(value: float, num_items: int, terms: Sequence[tuple[float, int]]) -> tuple[float, float, float]:
    """Return the 95 % interval and the p-value of a mean difference by a t test.

    `terms` are its squared errors with their degrees of freedom. Differences that by luck are alike are no proof of
    precision: the error is never below `find_least_error`, so interval and p-value stay in agreement.
    """
    from scipy.stats import t

    error, _ = add_errors(terms)
    freedom = count_freedom(terms) if error else float(num_items - 1)
    error = max(error, find_least_error(value, num_items, freedom))
    reach = error * float(t.ppf(1 - ALPHA / 2, freedom))
    p = float(2 * t.sf(abs(value) / error, freedom)) if error else float(value == 0)
    return max(-1.0, value - reach), min(1.0, value + reach), p


def find_least_error(value: float, num_items: int, freedom: float) -> float:
    """Return the error with which a mean of few differences has the p-value 2^(1-N) in a t test; zero for many.

    That is the least p-value which an exact test by flipping the signs of N differences can give. Source: Fisher
    (1935), The design of experiments, section 21.
    """
    from scipy.stats import t

    return abs(value) / float(t.isf(2.0**-num_items, freedom)) if num_items < FEW else 0.0


def _say_nothing(value: float, test: str) -> Difference:
    """Return what one item shows of a difference: nothing, whatever it is."""
    return Difference(value, -1.0, 1.0, 1.0, test, True, 1, 1, noise_of_means(0.0))


def compare_counts(left: float, num_left: int, right: float, num_right: int) -> Difference:
    """Compare two accuracies of which only counts are known: unpaired, whatever the items were.

    Pearson's chi-square without correction; Fisher's exact test where an expected count is below five. Interval:
    Newcombe (1998), Interval estimation for the difference between independent proportions, method 10. Counts may
    be fractions (a mean of values between 0 and 1 varies at most as a share does).
    """
    from scipy.stats import chi2_contingency, fisher_exact

    table = np.array([[left, num_left - left], [right, num_right - right]])
    expected = np.outer(table.sum(1), table.sum(0)) / table.sum()
    if expected.min() < 5:
        test, p = "Fisher's exact test, unpaired", float(fisher_exact(np.rint(table).astype(int)).pvalue)
    else:
        test, p = "chi-square, unpaired", float(chi2_contingency(table, correction=False).pvalue)
    low, high = _square_and_add((left, num_left), (right, num_right), 0.0)
    share = left / num_left
    # Towards one half differences are hardest to see: the smaller of a share and its complement has room there.
    return Difference(
        right / num_right - share, low, high, p, test, False, min(num_left, num_right),
        2 / (1 / num_left + 1 / num_right), noise_of_counts(share), noise_of_counts(min(share, 1 - share)),
    )  # fmt: skip


def correct_holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number, in their order.

    Source: Holm (1979), A simple sequentially rejective multiple test procedure.
    """
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def _check_pairs(num_left: int, num_right: int) -> None:
    if num_left != num_right or not num_left:
        raise ValueError(f"{num_left} values cannot be paired with {num_right}")
