"""Questions on one text: no draws of their own, for a model that reads the text well answers all of them better.

Intervals and tests take each text as one draw, however many questions are on it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


def join_by_text(values: ArrayLike, texts: Sequence[str] | None) -> np.ndarray:
    """Return a value for each text `[..., T]`, from those of the questions on it `[..., N]`; `texts` names theirs.

    They are the jackknife's, which leaves out a text at a time: their mean is that of all questions, and their
    standard error that of this mean over texts, also where one text has most of the questions. Values stay as they
    are where texts are not known, where there is one text alone, which says nothing of others, and where each has one
    question. Source: Efron and Tibshirani (1993), An introduction to the bootstrap, section 11.5; for evaluations
    Miller (2024), Adding error bars to evals, section 2.2.
    """
    items = np.asarray(values, dtype=float)
    if not has_shared_texts(texts):
        return items
    _, owner = np.unique(np.asarray(texts), return_inverse=True)
    sums, sizes = np.apply_along_axis(lambda row: np.bincount(owner, row), -1, items), np.bincount(owner)
    without = (sums.sum(-1, keepdims=True) - sums) / (len(owner) - sizes)
    spread = (len(sizes) - 1) * (without.mean(-1, keepdims=True) - without)
    joined: np.ndarray = items.mean(-1, keepdims=True) + spread
    return joined


def has_shared_texts(texts: Sequence[str] | None) -> bool:
    """Whether there are several texts, and several questions on one of them."""
    return texts is not None and 1 < len(set(texts)) < len(texts)
