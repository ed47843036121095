"""What sequences look like before training: lengths, repeats, and the tokens that a forest saves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from koat.core import sequence as core

_PERCENTILES = (50, 90, 95, 99, 100)
_LIMITS = (256, 512, 1024, 2048, 4096)
_NUM_BINS = 12
_CHUNK = 1 << 22
"""Tokens compared at once: bounds the memory of counting, not its result."""

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LengthSummary:
    """Lengths in tokens, and counts.

    `percentiles[90]` is the length that 90 % of the sequences do not exceed; `percentiles[100]` the longest.
    `histogram` lists (first length, last length, sequences). `overflow[512]` counts sequences over 512
    tokens. `num_duplicates` counts sequences whose very tokens an earlier one has; `num_conflicts` those
    whose prompt stands elsewhere with another response. `num_forest_tokens` is what all sequences cost when
    every distinct prefix is computed once, `num_step_tokens` the same in the steps that were given, the largest of
    `step_size` sequences.
    """

    num_sequences: int
    num_tokens: int
    num_supervised: int
    percentiles: dict[int, int]
    histogram: list[tuple[int, int, int]]
    overflow: dict[int, int]
    num_duplicates: int
    num_conflicts: int
    num_forest_tokens: int
    num_step_tokens: int
    step_size: int

    @property
    def saving(self) -> float:
        """How many times fewer tokens one forest over everything has."""
        return self.num_tokens / self.num_forest_tokens

    @property
    def step_saving(self) -> float:
        """How many times fewer tokens the forests of single steps have."""
        return self.num_tokens / self.num_step_tokens


def summarise_lengths(sequences: Sequence[core.Sequence], steps: Sequence[Sequence[int]]) -> LengthSummary:
    """Summarise sequences, at least one; `steps` lists those of each optimizer step, as indices into them."""
    if not sequences:
        raise ValueError("there is no sequence to summarise")
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    ranks = np.percentile(lengths, _PERCENTILES, method="inverted_cdf")
    return LengthSummary(
        num_sequences=len(sequences),
        num_tokens=int(lengths.sum()),
        num_supervised=sum(sequence.num_supervised for sequence in sequences),
        percentiles={rank: int(length) for rank, length in zip(_PERCENTILES, ranks, strict=True)},
        histogram=_count_bins(lengths),
        overflow={limit: int((lengths > limit).sum()) for limit in _LIMITS},
        num_duplicates=len(sequences) - len({sequence.token_ids for sequence in sequences}),
        num_conflicts=_count_conflicts(sequences),
        num_forest_tokens=count_forest_tokens(sequences),
        num_step_tokens=_count_step_tokens(sequences, steps),
        step_size=max(map(len, steps)),
    )


def count_forest_tokens(sequences: Sequence[core.Sequence]) -> int:
    """Return the number of distinct prefixes over all sequences: the nodes of their tries."""
    return _count_nodes([(0, sequence.token_ids) for sequence in sequences])


def draw_histogram(summary: LengthSummary, width: int = 40) -> str:
    """Draw the lengths as text, one line per bin: its range in tokens, a bar, its count."""
    most = max(count for _, _, count in summary.histogram)
    digits = len(f"{summary.histogram[-1][1]:,}")
    lines = []
    for first, last, count in summary.histogram:
        # Something always shows a bar: one row of 5,000 tokens among thousands is what one looks for here.
        bar = "█" * max(round(width * count / most), 1 if count else 0)
        lines.append(f"{first:>{digits},} to {last:>{digits},}  {bar:<{width}}  {count:,}")
    return "\n".join(lines)


def _count_bins(lengths: Integers) -> list[tuple[int, int, int]]:
    """Count lengths in at most `_NUM_BINS` bins of one round width, from the bin of the shortest on."""
    spread = int(lengths.max() - lengths.min()) + 1
    width = next(
        size
        for power in range(12)
        for size in (10**power, 2 * 10**power, 5 * 10**power)
        if spread <= size * (_NUM_BINS - 1) or spread <= size
    )
    first = int(lengths.min() - 1) // width
    counts = np.bincount((lengths - 1) // width - first)
    return [
        ((first + index) * width + 1, (first + index + 1) * width, int(count)) for index, count in enumerate(counts)
    ]


def _count_conflicts(sequences: Sequence[core.Sequence]) -> int:
    """Count sequences whose given tokens, two at least, stand elsewhere with other supervised ones."""
    responses: dict[tuple[int, ...], set[tuple[int, ...]]] = defaultdict(set)
    prompts = []
    for sequence in sequences:
        start = sequence.supervised.index(True) if True in sequence.supervised else len(sequence)
        # Where all tokens are supervised there is no prompt to be in conflict about.
        if 1 < start < len(sequence):
            prompts.append(sequence.token_ids[:start])
            responses[prompts[-1]].add(sequence.token_ids[start:])
    return sum(len(responses[prompt]) > 1 for prompt in prompts)


def _count_step_tokens(sequences: Sequence[core.Sequence], steps: Sequence[Sequence[int]]) -> int:
    return _count_nodes([(number, sequences[index].token_ids) for number, step in enumerate(steps) for index in step])


def _count_nodes(keyed: list[tuple[int, tuple[int, ...]]]) -> int:
    """Count trie nodes, tries apart per key: in sorted order, each sequence adds what the last one lacks."""
    keyed.sort()
    total = sum(len(ids) for _, ids in keyed)
    shared, start = 0, 0
    while start < len(keyed):
        stop, size = start + 1, len(keyed[start][1])
        while stop < len(keyed) and size < _CHUNK:
            size += len(keyed[stop][1])
            stop += 1
        # The last sequence of a chunk is the first of the next, so that each pair of neighbours is met once.
        shared += _sum_common_prefixes(keyed[max(start - 1, 0) : stop])
        start = stop
    return total - shared


def _sum_common_prefixes(keyed: list[tuple[int, tuple[int, ...]]]) -> int:
    """Return the summed lengths of the common prefixes of neighbours with the same key."""
    if len(keyed) < 2:
        return 0
    lengths = np.array([len(ids) for _, ids in keyed], dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    tokens = np.fromiter((token for _, ids in keyed for token in ids), dtype=np.int64, count=int(lengths.sum()))
    keys = np.array([key for key, _ in keyed])
    span = np.minimum(lengths[:-1], lengths[1:])
    span[keys[:-1] != keys[1:]] = 0
    pair = np.repeat(np.arange(len(span)), span)
    offset = np.arange(len(pair)) - np.repeat(np.cumsum(span) - span, span)
    differs = tokens[starts[pair] + offset] != tokens[starts[pair + 1] + offset]
    common = span.copy()
    np.minimum.at(common, pair[differs], offset[differs])
    return int(common.sum())
