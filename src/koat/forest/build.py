"""Build a forest: the depth-first order of the prefix trie of some token sequences.

Sorted lexicographically, each sequence shares its longest common prefix with the one before it, so the trie
never has to be built: walking the sorted sequences and emitting what is new *is* its depth-first order.
"""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from koat.core.sequence import Sequence

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Forest:
    """Prefix trees in depth-first order, and the predictions they make.

    T tokens: `token_ids`, `position` (depth in the tree, the place the token has in its own sequence) and
    `subtree_end` (one past the last token below it). P predictions: `source` (the token that predicts),
    `target` (the token id predicted) and `owner` (which of the given sequences it belongs to).
    """

    token_ids: IntArray
    position: IntArray
    subtree_end: IntArray
    source: IntArray
    target: IntArray
    owner: IntArray

    def __len__(self) -> int:
        return len(self.token_ids)


Tokens = tuple[int, ...]


def take_inputs(sequence: Sequence) -> Tokens:
    """Return the tokens of a sequence that have to be computed: those before its last target.

    What stands behind predicts nothing. A sequence without targets is kept whole.
    """
    if not any(sequence.supervised):
        return sequence.token_ids
    last = len(sequence) - 1 - sequence.supervised[::-1].index(True)
    return sequence.token_ids[:last]


def sort_inputs(inputs: ListLike[Tokens]) -> list[int]:
    """Return the indices of token sequences in lexicographic order."""
    return sorted(range(len(inputs)), key=inputs.__getitem__)


def count_shared(left: Tokens, right: Tokens) -> int:
    """Return the length of the longest common prefix of two token sequences."""
    length = min(len(left), len(right))
    if left[:length] == right[:length]:
        return length
    low, high = 0, length
    # Tuple slices compare in C: bisecting is far faster than looking at token after token.
    while high - low > 1:
        middle = (low + high) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle
    return low


def measure_shared(inputs: ListLike[Tokens], order: ListLike[int]) -> IntArray:
    """Return, for each token sequence of `order`, the length of the prefix it shares with the one before it."""
    shared = np.zeros(len(order), dtype=np.int64)
    for place in range(1, len(order)):
        shared[place] = count_shared(inputs[order[place - 1]], inputs[order[place]])
    return shared


def build_forest(sequences: ListLike[Sequence], order: ListLike[int] | None = None) -> Forest:
    """Lay out `sequences` as a forest of T distinct tokens, each sequence up to its last target.

    `order` is the lexicographic order where the caller has it already. `owner` refers to places in
    `sequences`. Sequences that are equal, or begin alike, share their tokens; each keeps its predictions.
    """
    inputs = [take_inputs(sequence) for sequence in sequences]
    order = sort_inputs(inputs) if order is None else order
    shared = measure_shared(inputs, order)
    lengths = np.array([len(inputs[index]) for index in order], dtype=np.int64)
    ends = np.cumsum(lengths - shared)
    total = int(ends[-1]) if len(ends) else 0
    token_ids, position = np.empty(total, np.int64), np.empty(total, np.int64)
    subtree_end = np.full(total, total, np.int64)
    path = np.empty(0, np.int64)
    sources, targets, owners = [], [], []
    for place, index in enumerate(order):
        sequence, kept, end = sequences[index], int(shared[place]), int(ends[place])
        start = end - (len(inputs[index]) - kept)
        subtree_end[path[kept:]] = start
        token_ids[start:end] = inputs[index][kept:]
        position[start:end] = np.arange(kept, len(inputs[index]))
        path = np.concatenate([path[:kept], np.arange(start, end)])
        at = np.flatnonzero(sequence.supervised)
        sources.append(path[at - 1])
        targets.append(np.array(sequence.token_ids, np.int64)[at])
        owners.append(np.full(len(at), index, np.int64))
    empty = np.empty(0, np.int64)
    return Forest(
        token_ids,
        position,
        subtree_end,
        np.concatenate(sources) if sources else empty,
        np.concatenate(targets) if targets else empty,
        np.concatenate(owners) if owners else empty,
    )
