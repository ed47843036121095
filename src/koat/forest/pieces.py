"""Cut a row of a forest into pieces of neighbouring queries that see few keys.

The tokens that a piece `[start, stop)` may see are the ancestors of its first token and the piece itself: an
ancestor of any other of its tokens either stands in the piece or is an ancestor of the first as well. A trunk
becomes one causal piece, its branches another, and trees in one row never meet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

START_UP = 4096.0
"""What a piece costs besides its products, in pairs of query and key: under 0.1 ms of calls at 8 heads of 64."""
GATHER = 48.0
"""What bringing one scattered key and its value together costs, in the same unit."""
BLOCK = 512
"""Queries of a long chain that go together under one mask."""
LOOK_BACK = 256
"""How many segments a piece may join; more would only widen its mask."""
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Piece:
    """Queries `[start, stop)` of one row, counted from the first that is no cached key, and the keys they see.

    `keys` are places in the row, cached ones first, a slice where they stand side by side. `mask` is additive, float32
    `[n, K]`; None means causal over the piece itself. With `queries` only those places `[n]` ask, not all.
    """

    row: int
    start: int
    stop: int
    keys: slice | Tensor
    mask: Tensor | None
    queries: Tensor | None = None


def cut_row(
    row: int,
    position: IntArray,
    subtree_end: IntArray,
    window: int | None,
    asking: BoolArray | None = None,
    num_cached: int = 0,
) -> Iterator[Piece]:
    """Yield the pieces of one row (`position`, `subtree_end`: `[L]`), tokens that are alone left out.

    A token that is its whole tree, such as padding, sees only itself: its output is its own value. With `asking
    [L]` the answers of other tokens are of no use to anybody: pieces without a token that asks are left out. The
    first `num_cached` tokens are keys alone.
    """
    # Along a chain every token has the same end; it changes where the tree branches and where a leaf ends.
    starts = np.flatnonzero(np.diff(subtree_end, prepend=-1))
    starts = np.unique(np.append(starts, num_cached))
    stops = np.append(starts[1:], len(position))
    left_out = (position[starts] == 0) & (subtree_end[starts] == starts + 1) | (starts < num_cached)
    roots = np.maximum.accumulate(np.where(position == 0, np.arange(len(position)), 0))
    starts, stops = split_chains(starts[~left_out], stops[~left_out], position)
    for first, last in join_segments(starts, stops, position[starts], roots[starts]):
        start, stop = int(starts[first]), int(stops[last])
        if asking is None or 2 * asking[start:stop].sum() > stop - start:
            piece = make_piece(row, start, stop, position, subtree_end, window)
        elif asking[start:stop].any():
            queries = start + np.flatnonzero(asking[start:stop])
            piece = make_piece(row, start, stop, position, subtree_end, window, queries)
        else:
            continue
        yield piece if not num_cached else count_from(piece, num_cached)


def count_from(piece: Piece, num_cached: int) -> Piece:
    """Let a piece's queries count from the first token that is no cached key."""
    queries = None if piece.queries is None else piece.queries - num_cached
    return replace(piece, start=piece.start - num_cached, stop=piece.stop - num_cached, queries=queries)


def split_chains(starts: IntArray, stops: IntArray, position: IntArray) -> tuple[IntArray, IntArray]:
    """Split long segments that have ancestors: a block's mask hides half of the block, not half of the segment.

    One without ancestors is causal, and its kernel skips what is hidden.
    """
    parts = [
        np.arange(start, stop, BLOCK if position[start] else stop - start)
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)
    ]
    ends = [np.append(part[1:], stop) for part, stop in zip(parts, stops.tolist(), strict=True)]
    empty = [np.empty(0, np.int64)]
    return np.concatenate([*parts, *empty]), np.concatenate([*ends, *empty])


def join_segments(starts: IntArray, stops: IntArray, depth: IntArray, roots: IntArray) -> list[tuple[int, int]]:
    """Return which neighbouring segments become one piece, as (first, last), at least total cost.

    A shortest path over the places to cut, as for rows. `depth` and `roots` are those of each segment's first
    token. Pieces hold no token that stands between segments.
    """
    count = len(starts)
    island = np.cumsum(starts != np.concatenate([starts[:1], stops[:-1]]))
    best, cut = np.zeros(count + 1), np.zeros(count + 1, dtype=np.int64)
    for end in range(1, count + 1):
        first = np.arange(max(0, end - LOOK_BACK), end)
        price = price_pieces(starts[first], stops[end - 1], depth[first], roots[first])
        if depth[end - 1] == 0:
            price[-1] /= 2  # a lone root chain is causal
        total = np.where(island[first] == island[end - 1], best[first] + price + START_UP, np.inf)
        chosen = int(np.argmin(total))
        best[end], cut[end] = total[chosen], first[chosen]
    pieces, end = [], count
    while end > 0:
        pieces.append((int(cut[end]), end - 1))
        end = int(cut[end])
    return pieces[::-1]


def price_pieces(start: IntArray, stop: IntArray, depth: IntArray, root: IntArray) -> NDArray[np.float64]:
    """Return what the products of pieces `[start, stop)` cost under `depth` ancestors in a tree from `root`.

    Either only the keys that are seen, brought together, or all from the root on, as they lie in the row.
    """
    size = (stop - start).astype(np.float64)
    gathered = (depth + size) * (size + GATHER)
    price: NDArray[np.float64] = np.minimum(gathered, size * (stop - root))
    return price


def make_piece(
    row: int,
    start: int,
    stop: int,
    position: IntArray,
    subtree_end: IntArray,
    window: int | None,
    queries: IntArray | None = None,
) -> Piece:
    """Find a piece's keys and render its mask.

    All keys from the lowest ancestor on are taken as they lie where that is cheaper than bringing the seen ones
    together; the mask hides the rest.
    """
    ancestors = np.flatnonzero(subtree_end[:start] > start)
    if window is not None:
        ancestors = ancestors[position[start:stop].min() - position[ancestors] < window]
    is_chain = bool((subtree_end[start:stop] == subtree_end[start]).all())
    if queries is None and not len(ancestors) and is_chain and (window is None or stop - start <= window):
        return Piece(row, start, stop, slice(start, stop), None)
    query = np.arange(start, stop) if queries is None else queries
    seen = len(ancestors) + stop - start
    spans = len(ancestors) > 0 and len(query) * (stop - ancestors[0]) <= seen * (len(query) + GATHER)
    keys = np.arange(ancestors[0], stop) if spans else np.concatenate([ancestors, np.arange(start, stop)])
    visible = (keys <= query[:, None]) & (query[:, None] < subtree_end[keys])
    if window is not None:
        visible &= position[query, None] - position[keys] < window
    mask = torch.zeros(visible.shape).masked_fill_(torch.from_numpy(~visible), float("-inf"))
    side_by_side = len(keys) == stop - keys[0]
    taken = slice(int(keys[0]), stop) if side_by_side else torch.from_numpy(keys)
    return Piece(row, start, stop, taken, mask, None if queries is None else torch.from_numpy(queries))
