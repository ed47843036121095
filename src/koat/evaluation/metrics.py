"""Metrics with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import inf, sqrt
from statistics import NormalDist
from typing import Any

import numpy as np

from koat.evaluation.bootstrap import BLOCK, NUM_SAMPLES
from koat.evaluation.texts import has_shared_texts, join_by_text

FEW = 30
"""So many items the bootstrap needs: drawn from fewer, its means spread too little."""


@dataclass(frozen=True, slots=True)
class Score:
    """A metric's value and its 95 % interval, as shares between 0 and 1.

    `meaningful` is false where the way of scoring does not fit the tokenizer in use.
    """

    name: str
    value: float
    low: float
    high: float
    num_items: int
    meaningful: bool = True

    def to_mapping(self) -> dict[str, Any]:
        """Return a JSON-safe mapping."""
        return asdict(self)


def wilson_interval(num_right: float, num_items: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval for a share: `num_right` out of `num_items`.

    Source: Wilson (1927), Probable inference, the law of succession, and statistical inference.
    """
    if not 0 <= num_right <= num_items or num_items == 0:
        raise ValueError(f"{num_right} of {num_items} is no share")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, shrink = num_right / num_items, 1 + z * z / num_items
    centre = (share + z * z / (2 * num_items)) / shrink
    half = z / shrink * sqrt(share * (1 - share) / num_items + z * z / (4 * num_items * num_items))
    # At the ends the formula gives 0 and 1 exactly; rounding must not push past them.
    low = 0.0 if num_right == 0 else max(0.0, centre - half)
    high = 1.0 if num_right == num_items else min(1.0, centre + half)
    return low, high


def score_accuracy(right: Sequence[bool], *, meaningful: bool = True) -> Score:
    """Return the share of items that were answered right, with Wilson's 95 % interval."""
    num_right = sum(right)
    low, high = wilson_interval(num_right, len(right))
    return Score("accuracy", num_right / len(right), low, high, len(right), meaningful)


def score_values(name: str, values: Sequence[float], texts: Sequence[str] | None = None) -> Score:
    """Return the mean of items' values with its 95 % interval: Wilson's where all are 0 or 1, else the bootstrap's.

    Where `texts` names the text that each question is on, texts are what is drawn; the interval is never narrower
    than that of as many questions on texts of their own.

    The bootstrap draws items (percentile interval); the same values give the same interval. From fewer than `FEW`,
    or from values that are all alike, its draws spread too little: then shares have Wilson's interval, which is
    at least as wide, and other values the t test's (of no width where they are alike). One value alone says nothing
    of the spread.
    """
    mean, num_items = float(np.mean(values)), len(values)
    if has_shared_texts(texts):
        joined, least = join_by_text(values, texts).tolist(), score_values(name, values)
        low, high = t_interval(joined) if len(joined) < FEW or min(joined) == max(joined) else bootstrap_mean(joined)
        if min(values) == max(values) and mean in (0, 1):
            low, high = wilson_interval(mean * len(joined), len(joined))
        bounds = (0.0, 1.0) if min(values) >= 0 and max(values) <= 1 else (-inf, inf)
        return replace(least, low=min(least.low, max(bounds[0], low)), high=max(least.high, min(bounds[1], high)))
    few = num_items < FEW or min(values) == max(values)
    if num_items == 1 and mean not in (0, 1):
        low, high = min(0.0, mean), max(1.0, mean)
    elif all(value in (0, 1) for value in values) or (few and min(values) >= 0 and max(values) <= 1):
        low, high = wilson_interval(sum(values), num_items)
    else:
        low, high = t_interval(values) if few else bootstrap_mean(values)
    return Score(name, mean, low, high, num_items)


def t_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Return Student's interval of the mean of values `[N]`, at least two of them."""
    from scipy.stats import t

    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / sqrt(len(values))
    reach = error * float(t.ppf((1 + confidence) / 2, len(values) - 1))
    return mean - reach, mean + reach


def bootstrap_mean(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Return the percentile interval of the mean of values `[N]`, at least two of them."""
    from scipy.stats import bootstrap

    found = bootstrap(
        (np.asarray(values, dtype=float),),
        np.mean,
        n_resamples=NUM_SAMPLES,
        batch=max(1, BLOCK // len(values)),
        confidence_level=confidence,
        method="percentile",
        random_state=0,
    ).confidence_interval
    return float(found.low), float(found.high)
