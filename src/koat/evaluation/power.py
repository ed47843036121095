"""How much a number of items can show: the smallest difference, and the items that a difference would need.

All of it rests on one normal approximation: a difference `d` between n items is found when
`z_alpha sqrt(v0 / n) + z_power sqrt(v1 / n) <= d`, where v0 is the variance that one item brings if there is no
difference and v1 if there is this one. What v0 and v1 are is a `Noise`. What the seeds bring stays however many
items there are: with that variance `f` the square of the left side grows by `(z_alpha + z_power)^2 f`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, hypot, sqrt
from statistics import NormalDist

ALPHA = 0.05
"""How often a difference may be claimed where there is none (two-sided)."""
POWER = 0.8
"""How often a difference that is there should be found."""


@dataclass(frozen=True, slots=True)
class Noise:
    """The variance that one item brings to a difference: without a difference, and with one of a given size.

    `largest` bounds the differences that can occur at all; `of_seeds` is the variance that more items do not lower.
    """

    without: Callable[[float], float]
    with_difference: Callable[[float], float]
    largest: float
    of_seeds: float = 0.0


def noise_of_pairs(discordance: float) -> Noise:
    """Return the noise of two accuracies on the same items, of which a share `discordance` is answered unlike.

    Source: Connor (1987), Sample size for testing differences in proportions for the paired-sample design.
    """
    return Noise(lambda _: discordance, lambda size: max(0.0, discordance - size * size), discordance)


def noise_of_means(deviation: float, of_seeds: float = 0.0) -> Noise:
    """Return the noise of a mean difference whose items have the standard deviation `deviation`."""
    largest = 10 * sqrt(deviation**2 + of_seeds)
    return Noise(lambda _: deviation**2, lambda _: deviation**2, largest, of_seeds)


def noise_of_counts(share: float) -> Noise:
    """Return the noise of two accuracies on items of their own, `share` and `share` + difference.

    Source: Fleiss (1981), Statistical methods for rates and proportions, eq. 3.14, without the correction.
    """

    def pooled(size: float) -> float:
        middle = share + size / 2
        return 2 * middle * (1 - middle)

    def apart(size: float) -> float:
        return share * (1 - share) + max(0.0, (share + size) * (1 - share - size))

    return Noise(pooled, apart, 1 - share)


def count_needed(difference: float, noise: Noise, *, alpha: float = ALPHA, power: float = POWER) -> int | None:
    """Return how many items (in each sample) a difference needs to be found.

    None for no difference, and for one that the seeds hide from any number of items.
    """
    room = difference**2 - _reach_seeds(noise, alpha, power) ** 2
    if room <= 0:
        return None
    return max(1, ceil(_reach(noise, difference, alpha, power) ** 2 / room))


def find_smallest(num_items: float, noise: Noise, *, alpha: float = ALPHA, power: float = POWER) -> float | None:
    """Return the smallest difference that so many items can show; None where they can show none at all."""
    from scipy.optimize import brentq

    seeds = _reach_seeds(noise, alpha, power)

    def lacking(size: float) -> float:
        return hypot(_reach(noise, size, alpha, power) / sqrt(num_items), seeds) - size

    # Twelve digits below the top, where a variance is exactly nothing, the square root still has a slope.
    top = noise.largest * (1 - 1e-12)
    if top <= 0 or lacking(top) > 0:
        return None
    # From just above zero: at zero itself, shares of 0 or 1 have no variance, and nothing would be lacking.
    return float(brentq(lacking, top * 1e-9, top))


def _reach_seeds(noise: Noise, alpha: float, power: float) -> float:
    return (NormalDist().inv_cdf(1 - alpha / 2) + NormalDist().inv_cdf(power)) * sqrt(noise.of_seeds)


def _reach(noise: Noise, size: float, alpha: float, power: float) -> float:
    z_alpha, z_power = NormalDist().inv_cdf(1 - alpha / 2), NormalDist().inv_cdf(power)
    return z_alpha * sqrt(noise.without(size)) + z_power * sqrt(noise.with_difference(size))
