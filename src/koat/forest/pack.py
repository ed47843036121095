"""Pack sequences into rows of a forest, and rows into micro-batches.

Sharing wants long rows, attention (whose cost is the square of the length) wants short ones. The sequences
are sorted, a row is a run of neighbours, and a shortest-path search over the places to cut finds the runs
that cost least.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as ListLike
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from koat.core.sequence import Sequence
from koat.forest.build import Tokens, build_forest, measure_shared, sort_inputs, take_inputs


@dataclass(frozen=True, slots=True)
class RowCost:
    """What a row of T tokens costs: `T + T * T * quadratic`, in units of one token through the layers.

    `start_up` is what a micro-batch costs besides its rows: launching every layer once.
    """

    quadratic: float
    start_up: float = 16.0

    def __call__(self, length: NDArray[np.float64]) -> NDArray[np.float64]:
        cost: NDArray[np.float64] = length + length * length * self.quadratic
        return cost


PLAIN_COST = RowCost(0.0)


class Distinct(NamedTuple):
    """The S distinct numbers among P, ascending: where each is found (`first [S]`), and which each of P is (`row`)."""

    first: Tensor
    row: Tensor

    def to(self, device: torch.device | str) -> Distinct:
        """Return the same on another device."""
        return Distinct(self.first.to(device), self.row.to(device))


def find_distinct(values: Tensor) -> Distinct:
    """Return the distinct numbers among `values [P]`, which lie on the CPU."""
    _, first, row = np.unique(values.numpy(), return_index=True, return_inverse=True)
    return Distinct(torch.from_numpy(first), torch.from_numpy(row))


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """R rows of L tokens, right-padded, and their P predictions.

    `token_ids`, `position`, `subtree_end`: `[R, L]`; a padding token sees only itself. `source` indexes the
    flattened `[R * L]` tokens; `owner` the sequences given to the packer. `rows` lists each row's sequences.
    """

    token_ids: Tensor
    position: Tensor
    subtree_end: Tensor
    source: Tensor
    target: Tensor
    owner: Tensor
    rows: tuple[tuple[int, ...], ...]
    num_tokens: int
    """Distinct tokens, without padding."""
    distinct: Distinct | None = None
    """Of `source`; a GPU would have to wait for the processor to be told how many there are."""

    def to(self, device: torch.device | str) -> MicroBatch:
        """Return the same micro-batch on another device."""
        names = ("token_ids", "position", "subtree_end", "source", "target", "owner")
        distinct = None if self.distinct is None else self.distinct.to(device)
        return replace(self, distinct=distinct, **{name: getattr(self, name).to(device) for name in names})


def plan_rows(sequences: ListLike[Sequence], cost: RowCost, max_length: int) -> list[list[int]]:
    """Divide sequences into rows of least total cost; no row is longer than `max_length`.

    A sequence longer than `max_length` gets a row of its own. Returns indices into `sequences`, each row in
    lexicographic order. Exact among all divisions of the sorted sequences into runs.
    """
    inputs = [take_inputs(sequence) for sequence in sequences]
    order = sort_inputs(inputs)
    lengths = np.array([len(inputs[index]) for index in order], dtype=np.int64)
    shared = measure_shared(inputs, order)
    fresh = np.concatenate([[0], np.cumsum(lengths - shared)])
    best = np.zeros(len(order) + 1)
    cut = np.zeros(len(order) + 1, dtype=np.int64)
    first = 0
    for end in range(1, len(order) + 1):
        # A row of places first..end-1 holds the first whole, and of the others what is new.
        row = lengths[first:end] + fresh[end] - fresh[first + 1 : end + 1]
        while first < end - 1 and row[0] > max_length:
            first, row = first + 1, row[1:]
        total = best[first:end] + cost(row.astype(np.float64))
        chosen = int(np.argmin(total))
        best[end], cut[end] = total[chosen], first + chosen
    rows, end = [], len(order)
    while end > 0:
        rows.append(order[cut[end] : end])
        end = int(cut[end])
    return rows[::-1]


def plan_separate_rows(sequences: ListLike[Sequence]) -> list[list[int]]:
    """Give each sequence a row of its own: nothing is shared."""
    return [[index] for index in range(len(sequences))]


def collate_rows(sequences: ListLike[Sequence], rows: ListLike[ListLike[int]], length_multiple: int = 1) -> MicroBatch:
    """Build one forest per row and lay the rows side by side, padded to a multiple of `length_multiple`."""
    forests = [build_forest([sequences[index] for index in row], range(len(row))) for row in rows]
    longest = bucket_length(max(len(forest) for forest in forests), length_multiple)
    shape = (len(rows), longest)
    token_ids, position = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    subtree_end = np.tile(np.arange(1, longest + 1), (len(rows), 1))
    for number, forest in enumerate(forests):
        token_ids[number, : len(forest)] = forest.token_ids
        position[number, : len(forest)] = forest.position
        subtree_end[number, : len(forest)] = forest.subtree_end
    source = torch.from_numpy(np.concatenate([forest.source + n * longest for n, forest in enumerate(forests)]))
    owner = [np.array(row, np.int64)[forest.owner] for row, forest in zip(rows, forests, strict=True)]
    return MicroBatch(
        torch.from_numpy(token_ids),
        torch.from_numpy(position),
        torch.from_numpy(subtree_end),
        source,
        torch.from_numpy(np.concatenate([forest.target for forest in forests])),
        torch.from_numpy(np.concatenate(owner)),
        tuple(tuple(row) for row in rows),
        sum(len(forest) for forest in forests),
        find_distinct(source),
    )


def bucket_length(length: int, multiple: int) -> int:
    """Round a row's length up to a multiple, in coarser steps for longer rows: eight lengths an octave.

    Compiled kernels are made per length; a few lengths keep compilations few.
    """
    while length > 16 * multiple and multiple > 1:
        multiple *= 2
    return -(-length // multiple) * multiple


def count_tokens(inputs: ListLike[Tokens], row: ListLike[int]) -> int:
    """Return how many distinct tokens a row (in lexicographic order) holds."""
    return sum(len(inputs[index]) for index in row) - int(measure_shared(inputs, row).sum())


def batch_rows(
    sequences: ListLike[Sequence],
    rows: ListLike[ListLike[int]],
    token_budget: int,
    length_multiple: int = 1,
    cost: RowCost = PLAIN_COST,
) -> Iterator[MicroBatch]:
    """Yield micro-batches of rows of similar length, at most `token_budget` tokens with padding.

    Longest rows first, so that memory runs out at once or not at all. A row longer than the budget travels
    alone.
    """
    inputs = [take_inputs(sequence) for sequence in sequences]
    sizes = [bucket_length(count_tokens(inputs, row), length_multiple) for row in rows]
    order = sorted(range(len(rows)), key=lambda number: (-sizes[number], number))
    for start, end in divide_sizes([sizes[number] for number in order], token_budget, cost):
        yield collate_rows(sequences, [rows[number] for number in order[start:end]], length_multiple)


def divide_sizes(sizes: ListLike[int], token_budget: int, cost: RowCost) -> list[tuple[int, int]]:
    """Divide rows, longest first, into micro-batches of least total cost; return (start, end) of each.

    A row is padded to the first and longest of its micro-batch; a micro-batch costs its start-up on top.
    Padding against start-up is settled by the same search as the cutting of rows.
    """
    lengths = np.array(sizes, dtype=np.int64)
    price = cost(lengths.astype(np.float64))
    best = np.zeros(len(sizes) + 1)
    cut = np.zeros(len(sizes) + 1, dtype=np.int64)
    for end in range(1, len(sizes) + 1):
        starts = np.arange(end)
        counts = end - starts
        fits = (lengths[:end] * counts <= token_budget) | (counts == 1)
        total = np.where(fits, best[:end] + counts * price[:end] + cost.start_up, np.inf)
        cut[end] = int(np.argmin(total))
        best[end] = total[cut[end]]
    pieces, end = [], len(sizes)
    while end > 0:
        pieces.append((int(cut[end]), end))
        end = int(cut[end])
    return pieces[::-1]
