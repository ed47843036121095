"""The largest of some differences, where one that is no number is no small one."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf, isfinite


def find_largest(differences: Iterable[float]) -> float:
    """Return the largest of at least one difference, infinity where any is not finite.

    Python's `max` passes over NaN behind a number: `max(0.001, nan)` is 0.001.
    """
    return max(each if isfinite(each) else inf for each in differences)
