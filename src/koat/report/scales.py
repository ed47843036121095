"""Scales and ticks of charts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, floor, log10

LOG_RANGE = 20
"""From this ratio of the largest to the smallest value on, a scale is logarithmic."""


@dataclass(frozen=True, slots=True)
class Scale:
    """From values to places, as shares of the way from `low` to `high`."""

    low: float
    high: float
    is_log: bool = False

    def place(self, value: float) -> float:
        """Return where a value stands: 0 at `low`, 1 at `high`."""
        if self.is_log:
            return log10(value / self.low) / log10(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def list_ticks(self, count: int = 6) -> list[float]:
        """Return round values within the scale, about `count` of them."""
        if self.is_log:
            return self._list_powers()
        step = find_step(self.low, self.high, count)
        first, last = ceil(self.low / step - 1e-9), floor(self.high / step + 1e-9)
        return [round(number * step, 12) for number in range(first, last + 1)]

    def _list_powers(self) -> list[float]:
        """Return powers of ten, with 2 and 5 times them where there are few."""
        exponents = range(floor(log10(self.low)), ceil(log10(self.high)) + 1)
        within = [
            [factor * 10.0**exponent for exponent in exponents for factor in factors]
            for factors in ((1,), (1, 3), (1, 2, 5))
        ]
        kept = [[tick for tick in ticks if self.low * 0.999 <= tick <= self.high * 1.001] for ticks in within]
        return next((ticks for ticks in kept if len(ticks) >= 3), kept[-1])


def find_step(low: float, high: float, count: int) -> float:
    """Return a step of 1, 2 or 5 times a power of ten that cuts a range into about `count` parts or fewer."""
    raw = (high - low) / count
    power = 10.0 ** floor(log10(raw))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))


def fit_scale(
    values: Iterable[float], *, floor_at: float | None = None, ceil_at: float | None = None, count: int = 6
) -> Scale:
    """Return a linear scale from round value to round value around `values`, within the bounds given."""
    found = list(values)
    low, high = min(found), max(found)
    if high - low < 1e-9 * max(1.0, abs(high)):
        reach = abs(high) * 0.1 or 1.0
        low, high = low - reach, high + reach
    step = find_step(low, high, count)
    low, high = floor(low / step + 1e-9) * step, ceil(high / step - 1e-9) * step
    low = low if floor_at is None else max(low, floor_at)
    return Scale(low, high if ceil_at is None else min(high, ceil_at))


def fit_cost_scale(values: Iterable[float]) -> Scale:
    """Return a scale for costs, all above zero: from zero, or logarithmic where they lie far apart."""
    found = list(values)
    low, high = min(found), max(found)
    if high / low < LOG_RANGE:
        return fit_scale([0, high * 1.1])
    return Scale(low / 1.6, high * 1.6, is_log=True)


def format_number(value: float) -> str:
    """Return a number in few digits: 0.25, 12, 3.5k, 68k, 5.8M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def format_percent(share: float) -> str:
    """Return a share in percent, without the sign."""
    return f"{100 * share:.4g}"
