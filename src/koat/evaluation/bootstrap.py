"""Means of values drawn anew with replacement: how many are drawn, and how many draws are held at once."""

from __future__ import annotations

import numpy as np

NUM_SAMPLES = 10_000
BLOCK = 2_000_000
"""Values that are held at once."""


def draw_means(values: np.ndarray, num_samples: int, generator: np.random.Generator) -> np.ndarray:
    """Return the means `[num_samples]` of values `[N]` drawn anew with replacement."""
    step = max(1, BLOCK // len(values))
    blocks = []
    for start in range(0, num_samples, step):
        drawn = generator.integers(0, len(values), (min(step, num_samples - start), len(values)))
        blocks.append(values[drawn].mean(1))
    return np.concatenate(blocks)
