"""Several seeds on the same items: what comes of the seed, and what of the items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from koat.evaluation.texts import join_by_text

LARGEST = 0.5
"""No standard deviation of shares is larger: half of them 0, the others 1."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A score over seeds, and its two spreads kept apart; all as shares.

    `observed` is the standard deviation of the seeds' scores as they are. `over_seeds` is what another seed alone
    would change: `observed` less what so few items do to each seed by chance. `over_items` is what other items of
    the same kind would change in one seed's score. `error` is the standard error of the mean, both in it. One item
    cannot tell them apart: `over_seeds` is then `observed`, `over_items` and `error` are the most that shares allow.
    """

    mean: float
    low: float
    high: float
    observed: float
    over_seeds: float
    over_items: float
    error: float
    num_seeds: int
    num_items: int

    def to_mapping(self) -> dict[str, Any]:
        """Return a JSON-safe mapping."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Components:
    """Variances of one answer by where they come from: the seed, the item, and the two together."""

    seed: float
    item: float
    rest: float


def split_variance(values: np.ndarray) -> Components:
    """Split the variance of scores `[S, N]` (seeds, items; S and N at least 2), never below zero.

    Source: the two-way random-effects analysis of variance with one observation per cell; Searle, Casella and
    McCulloch (1992), Variance components, section 4.4.
    """
    num_seeds, num_items = values.shape
    seeds, items, mean = values.mean(1), values.mean(0), values.mean()
    rest = values - seeds[:, None] - items[None, :] + mean
    by_rest = float((rest**2).sum()) / ((num_seeds - 1) * (num_items - 1))
    by_seed = num_items * float(seeds.var(ddof=1))
    by_item = num_seeds * float(items.var(ddof=1))
    return Components(max(0.0, by_seed - by_rest) / num_items, max(0.0, by_item - by_rest) / num_seeds, by_rest)


def measure_spread(values: ArrayLike, texts: Sequence[str] | None = None, confidence: float = 0.95) -> Spread:
    """Return the mean of scores `[S, N]` (at least 2 seeds, the same items in the same order) and its spreads.

    Where `texts` names the text that each question is on, texts are what is drawn.
    """
    table = np.asarray(values, dtype=float)
    num_seeds, num_items = table.shape
    observed, mean = float(table.mean(1).std(ddof=1)), float(table.mean())
    if num_items < 2:
        return Spread(mean, 0.0, 1.0, observed, observed, LARGEST, LARGEST, num_seeds, num_items)
    drawn = join_by_text(table, texts)
    parts, num_drawn = split_variance(drawn), drawn.shape[1]
    # Seeds that by luck lie closer than chance on the items would put them are no proof of precision.
    of_seeds = max(observed**2, parts.rest / num_drawn) / num_seeds
    terms = [(of_seeds, num_seeds - 1), (parts.item / num_drawn, num_drawn - 1)]
    error, reach = add_errors(terms, confidence)
    return Spread(
        mean=mean,
        low=max(0.0, mean - reach),
        high=min(1.0, mean + reach),
        observed=observed,
        over_seeds=sqrt(parts.seed),
        over_items=sqrt((parts.item + parts.rest) / num_drawn),
        error=error,
        num_seeds=num_seeds,
        num_items=num_items,
    )


def add_errors(terms: Sequence[tuple[float, int]], confidence: float = 0.95) -> tuple[float, float]:
    """Add independent squared errors (each with its degrees of freedom); return the error and the half-width.

    Source: Satterthwaite (1946), An approximate distribution of estimates of variance components.
    """
    from scipy.stats import t

    total = sum(square for square, _ in terms)
    if total == 0:
        return 0.0, 0.0
    return sqrt(total), sqrt(total) * float(t.ppf((1 + confidence) / 2, count_freedom(terms)))


def count_freedom(terms: Sequence[tuple[float, int]]) -> float:
    """Return Satterthwaite's degrees of freedom of a sum of squared errors that is not zero."""
    total = sum(square for square, _ in terms)
    # Shares of the sum: squares of very small squares would vanish.
    return float(1 / sum((square / total) ** 2 / freedom for square, freedom in terms))
