"""How much a number of items can show: the smallest difference, and the items that a difference would need.

All of it rests on one normal approximation: a difference `d` between n items is found when
`z_alpha sqrt(v0 / n) + z_power sqrt(v1 / n) <= d`, where v0 is the variance that one item brings if there is no
difference and v1 if there is this one. What v0 and v1 are is a `Noise`. What the seeds bring stays however many
items there are: with that variance `f` the square of the left side grows by `(z_alpha + z_power)^2 f`, and the
quantiles are Student's, with the degrees of freedom that the t test will have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, hypot, sqrt
from statistics import NormalDist

from koat.evaluation.metrics import FEW
from koat.evaluation.spread import count_freedom

ALPHA = 0.05
"""How often a difference may be claimed where there is none (two-sided)."""
POWER = 0.8
"""How often a difference that is there should be found."""
ROUNDS = 100
"""After so many the items that a difference needs have long settled."""


@dataclass(frozen=True, slots=True)
class Noise:
    """The variance that one item brings to a difference: without a difference, and with one of a given size.

    `largest` bounds the differences that can occur at all; `seeds` are the variances that more items do not lower,
    each with its degrees of freedom. `per_draw` is how many items come with one draw where few draws make a t test, 1
    unless texts are drawn; 0 where the test is no t test.
    """

    without: Callable[[float], float]
    with_difference: Callable[[float], float]
    largest: float
    seeds: tuple[tuple[float, int], ...] = ()
    per_draw: float = 0.0


def noise_of_pairs(discordance: float) -> Noise:
    """Return the noise of two accuracies on the same items, of which a share `discordance` is answered unlike.

    Source: Connor (1987), Sample size for testing differences in proportions for the paired-sample design.
    """
    return Noise(lambda _: discordance, lambda size: max(0.0, discordance - size * size), discordance)


def noise_of_means(deviation: float, seeds: tuple[tuple[float, int], ...] = (), per_draw: float = 0.0) -> Noise:
    """Return the noise of a mean difference whose items have the standard deviation `deviation`."""
    spread = sqrt(deviation**2 + sum(square for square, _ in seeds))
    # Student's quantiles reach 13 at one degree of freedom and 0.05, and grow with the number of comparisons.
    return Noise(lambda _: deviation**2, lambda _: deviation**2, 1e6 * spread, seeds, per_draw)


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
    quantiles, needed = _find_normal(alpha, power), 0
    for _ in range(ROUNDS):
        room = difference**2 - _reach_seeds(noise, quantiles) ** 2
        if room <= 0:
            return None
        before, needed = needed, max(1, ceil(_reach(noise, difference, quantiles) ** 2 / room))
        if needed == before or not (noise.seeds or noise.per_draw):
            break
        # The more items, the more of the error is the seeds', of which there are few; and the more texts.
        quantiles = _find_quantiles(noise, needed, alpha, power)
    return needed


def find_smallest(num_items: float, noise: Noise, *, alpha: float = ALPHA, power: float = POWER) -> float | None:
    """Return the smallest difference that so many items can show; None where they can show none at all."""
    from scipy.optimize import brentq

    quantiles = _find_quantiles(noise, num_items, alpha, power)
    seeds = _reach_seeds(noise, quantiles)

    def lacking(size: float) -> float:
        return hypot(_reach(noise, size, quantiles) / sqrt(num_items), seeds) - size

    # Twelve digits below the top, where a variance is exactly nothing, the square root still has a slope.
    top = noise.largest * (1 - 1e-12)
    if top <= 0 or lacking(top) > 0:
        return None
    # From just above zero: at zero itself, shares of 0 or 1 have no variance, and nothing would be lacking.
    return float(brentq(lacking, top * 1e-9, top))


def _find_normal(alpha: float, power: float) -> tuple[float, float]:
    return NormalDist().inv_cdf(1 - alpha / 2), NormalDist().inv_cdf(power)


def _find_quantiles(noise: Noise, num_items: float, alpha: float, power: float) -> tuple[float, float]:
    """Return the quantiles for `alpha` and `power`: the normal ones, or Student's where seeds or draws are few."""
    from scipy.stats import t

    terms, num_drawn = [term for term in noise.seeds if term[0] > 0], num_items / (noise.per_draw or 1)
    has_few = noise.per_draw > 0 and num_drawn < FEW and noise.without(0.0) > 0
    if not terms and not has_few:
        return _find_normal(alpha, power)
    freedom = count_freedom([*terms, (noise.without(0.0) / num_items, max(1, ceil(num_drawn) - 1))])
    return float(t.ppf(1 - alpha / 2, freedom)), float(t.ppf(power, freedom))


def _reach_seeds(noise: Noise, quantiles: tuple[float, float]) -> float:
    return sum(quantiles) * sqrt(sum(square for square, _ in noise.seeds))


def _reach(noise: Noise, size: float, quantiles: tuple[float, float]) -> float:
    for_alpha, for_power = quantiles
    return for_alpha * sqrt(noise.without(size)) + for_power * sqrt(noise.with_difference(size))
