"""Cut a row of a forest into pieces of neighbouring queries that see few keys.

The tokens that a piece `[start, stop)` may see are the ancestors of its first token and the piece itself: an
ancestor of any other of its tokens either stands in the piece or is an ancestor of the first as well. A trunk
becomes one causal piece, its branches another, and trees in one row never meet.

What many tokens look back at is not brought to each of their pieces: a long trunk is a piece of its own, whose keys
all that stands behind it sees, without a mask. What a token sees is then put together from its pieces by their
log-sums (`koat.forest.walk`), as Hydragen does for a shared prompt (Juravsky et al. 2024, arXiv:2402.05099).
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
TRUNK = 4 * START_UP
"""From how many pairs of a chain's keys and queries behind it on those look back at it in a piece of its own."""
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
    `[n, K]`; None means causal over the piece itself. With `queries` only those places `[n]` ask, not all. A piece
    with `adds` holds a trunk, of which every query sees every key, beside what another piece lets it see.
    """

    row: int
    start: int
    stop: int
    keys: slice | Tensor
    mask: Tensor | None
    queries: Tensor | None = None
    adds: bool = False

    @property
    def is_causal(self) -> bool:
        """Whether each query sees the keys up to its own."""
        return self.mask is None and not self.adds


def cut_row(
    row: int,
    position: IntArray,
    subtree_end: IntArray,
    window: int | None,
    asking: BoolArray | None = None,
    num_cached: int = 0,
) -> Iterator[Piece]:
    """Yield the pieces of one row (`position`, `subtree_end`: `[L]`), tokens that are alone left out, trunks last.

    A token that is its whole tree, such as padding, sees only itself: its output is its own value. With `asking
    [L]` the answers of other tokens are of no use to anybody: pieces without a token that asks are left out. The
    first `num_cached` tokens are keys alone.
    """
    starts, stops = find_chains(subtree_end, num_cached)
    behind = np.maximum(stops, num_cached)
    is_trunk = (subtree_end[starts] - behind) * (stops - starts) > TRUNK
    if window is not None and position.max(initial=0) >= window:
        is_trunk[:] = False
    depth, end = take_out(starts[is_trunk], stops[is_trunk], position, subtree_end)
    roots = np.maximum.accumulate(np.where(depth == 0, np.arange(len(depth)), 0))
    left_out = (position[starts] == 0) & (subtree_end[starts] == starts + 1) | (starts < num_cached)
    starts_own, stops_own = split_chains(starts[~left_out], stops[~left_out], depth, window)
    for first, last in join_segments(starts_own, stops_own, *limit_reach(starts_own, depth, roots, window)):
        start, stop = int(starts_own[first]), int(stops_own[last])
        queries = choose_queries(start, stop, asking)
        if queries is None or len(queries):
            yield count_from(make_piece(row, start, stop, position, end, window, queries), num_cached)
    for chain in np.flatnonzero(is_trunk).tolist():
        start, stop = int(behind[chain]), int(subtree_end[starts[chain]])
        queries = choose_queries(start, stop, asking)
        if queries is None or len(queries):
            keys = slice(int(starts[chain]), int(stops[chain]))
            yield count_from(Piece(row, start, stop, keys, None, as_places(queries), adds=True), num_cached)


def find_chains(subtree_end: IntArray, num_cached: int) -> tuple[IntArray, IntArray]:
    """Return where chains without a branch begin and stop, cut where the cached tokens end."""
    # Along a chain every token has the same end; it changes where the tree branches and where a leaf ends.
    starts = np.unique(np.append(np.flatnonzero(np.diff(subtree_end, prepend=-1)), num_cached))
    return starts, np.append(starts[1:], len(subtree_end))


def take_out(starts: IntArray, stops: IntArray, position: IntArray, subtree_end: IntArray) -> tuple[IntArray, IntArray]:
    """Return depths and ends `[L]` of a row in which nothing behind the chains `[start, stop)` sees them."""
    shift, end = np.zeros(len(position) + 1, np.int64), subtree_end.copy()
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        shift[stop] += stop - start
        shift[subtree_end[start]] -= stop - start
        end[start:stop] = stop
    return position - np.cumsum(shift)[:-1], end


def choose_queries(start: int, stop: int, asking: BoolArray | None) -> IntArray | None:
    """Return which of `[start, stop)` ask; None where leaving out the others would save little."""
    if asking is None or 2 * asking[start:stop].sum() > stop - start:
        return None
    return start + np.flatnonzero(asking[start:stop])


def as_places(queries: IntArray | None) -> Tensor | None:
    """Return queries as a piece has them."""
    return None if queries is None else torch.from_numpy(queries)


def count_from(piece: Piece, num_cached: int) -> Piece:
    """Let a piece's queries count from the first token that is no cached key."""
    if not num_cached:
        return piece
    queries = None if piece.queries is None else piece.queries - num_cached
    return replace(piece, start=piece.start - num_cached, stop=piece.stop - num_cached, queries=queries)


def split_chains(
    starts: IntArray, stops: IntArray, position: IntArray, window: int | None
) -> tuple[IntArray, IntArray]:
    """Split long segments that need a mask: one that has ancestors, or is longer than the window.

    A block's mask hides half of the block and what no window reaches, not half of the segment and all before it. What
    has no ancestors and lies within a window is causal, and its kernel skips what is hidden.
    """
    parts = []
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        causal = 0 if position[start] else stop - start if window is None else window
        parts.append(np.append(start, np.arange(start + max(BLOCK, causal), stop, BLOCK)))
    ends = [np.append(part[1:], stop) for part, stop in zip(parts, stops.tolist(), strict=True)]
    empty = [np.empty(0, np.int64)]
    return np.concatenate([*parts, *empty]), np.concatenate([*ends, *empty])


def limit_reach(starts: IntArray, depth: IntArray, roots: IntArray, window: int | None) -> tuple[IntArray, IntArray]:
    """Return how many ancestors each segment's first token sees, and from where on they lie, at the latest known."""
    depth, roots = depth[starts], roots[starts]
    if window is None:
        return depth, roots
    seen = np.minimum(depth, window - 1)
    # Where all between the root and a segment is its path, what the window leaves of that lies right before it.
    return seen, np.where(starts - roots == depth, starts - seen, roots)


def join_segments(starts: IntArray, stops: IntArray, depth: IntArray, roots: IntArray) -> list[tuple[int, int]]:
    """Return which neighbouring segments become one piece, as (first, last), at least total cost.

    A shortest path over the places to cut, as for rows. `depth` is how many ancestors each segment's first token
    sees, `roots` from where on they lie. Pieces hold no token that stands between segments.
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
    """Return what the products of pieces `[start, stop)` cost under `depth` ancestors that lie from `root` on.

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
    return Piece(row, start, stop, taken, mask, as_places(queries))
