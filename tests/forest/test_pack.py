"""Rows against a search through all divisions, micro-batches against their promises."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from koat.core.sequence import Sequence
from koat.forest.pack import MicroBatch, RowCost, batch_rows, divide_sizes, plan_rows, plan_separate_rows


def draw_set(seed: int, number: int, letters: int = 2, longest: int = 12) -> list[Sequence]:
    rng = np.random.default_rng(seed)
    bodies = [tuple(int(t) for t in rng.integers(0, letters, rng.integers(1, longest))) for _ in range(number)]
    return [Sequence(body, (False, *(rng.random(len(body) - 1) < 0.4).tolist())) for body in bodies]


def take_needed(sequence: Sequence) -> tuple[int, ...]:
    """Return what has to be computed: the tokens before the last target, or all of them where there is none."""
    targets = [at for at, supervised in enumerate(sequence.supervised) if supervised]
    return sequence.token_ids[: max(targets)] if targets else sequence.token_ids


def list_prefixes(sequences: list[Sequence], row: list[int]) -> set[tuple[int, ...]]:
    needed = [take_needed(sequences[index]) for index in row]
    return {ids[: end + 1] for ids in needed for end in range(len(ids))}


def count_prefixes(sequences: list[Sequence], row: list[int]) -> int:
    return len(list_prefixes(sequences, row))


def divide(items: list[int]) -> Iterator[list[list[int]]]:
    """Yield every division of a list into runs."""
    if not items:
        yield []
    for size in range(1, len(items) + 1):
        for rest in divide(items[size:]):
            yield [items[:size], *rest]


@pytest.mark.parametrize("quadratic", [0.0, 0.01, 0.05, 0.2, 2.0])
@pytest.mark.parametrize("limit", [1, 6, 15, 1000])
def test_rows_are_the_cheapest_division(quadratic: float, limit: int) -> None:
    for seed in range(6):
        sequences = draw_set(seed, number=1 + (seed + limit) % 8)

        def price(rows: list[list[int]], sequences: list[Sequence] = sequences) -> float:
            sizes = [count_prefixes(sequences, row) for row in rows]
            fits = all(size <= limit or len(row) == 1 for size, row in zip(sizes, rows, strict=True))
            return sum(size + quadratic * size**2 for size in sizes) if fits else float("inf")

        order = sorted(range(len(sequences)), key=lambda index: take_needed(sequences[index]))
        best = min(price(rows) for rows in divide(order))
        rows = plan_rows(sequences, RowCost(quadratic), limit)
        assert [index for row in rows for index in row] == order
        assert price(rows) == pytest.approx(best)


def test_free_attention_shares_all_and_dear_attention_shares_nothing() -> None:
    sequences = draw_set(0, number=20, letters=5)
    assert len(plan_rows(sequences, RowCost(0.0), 10**6)) == 1
    assert len(plan_rows(sequences, RowCost(1e6), 10**6)) >= 15


def check_batches(sequences: list[Sequence], batches: list[MicroBatch], budget: int) -> None:
    seen = [index for batch in batches for row in batch.rows for index in row]
    assert sorted(seen) == list(range(len(sequences)))
    for batch in batches:
        num_rows, length = batch.token_ids.shape
        assert len(batch.rows) == num_rows
        assert num_rows * length <= budget or num_rows == 1
        assert batch.num_tokens == sum(count_prefixes(sequences, list(row)) for row in batch.rows)
    predicted = sum(len(batch.target) for batch in batches)
    assert predicted == sum(sequence.num_supervised for sequence in sequences)


@pytest.mark.parametrize("multiple", [1, 4, 16])
@pytest.mark.parametrize("budget", [1, 16, 24, 40, 100, 10**6])
def test_micro_batches_keep_the_budget_and_lose_nothing(budget: int, multiple: int) -> None:
    for seed in range(5):
        sequences = draw_set(seed, number=30, letters=3)
        for rows in (plan_rows(sequences, RowCost(0.05), 20), plan_separate_rows(sequences)):
            batches = list(batch_rows(sequences, rows, budget, multiple))
            check_batches(sequences, batches, budget)
            assert all(batch.token_ids.shape[1] % multiple == 0 for batch in batches)


def test_the_first_micro_batch_has_the_longest_row() -> None:
    sequences = draw_set(1, number=30, letters=9)
    batches = list(batch_rows(sequences, plan_separate_rows(sequences), 24))
    lengths = [batch.token_ids.shape[1] for batch in batches]
    assert len(lengths) > 3
    assert lengths == sorted(lengths, reverse=True)


def test_rows_of_a_micro_batch_are_their_own_forests() -> None:
    """Each real token spells a prefix of its row's sequences; each padding token sees only itself."""
    sequences = draw_set(3, number=12, letters=2)
    for batch in batch_rows(sequences, plan_rows(sequences, RowCost(0.2), 15), 60):
        length = batch.token_ids.shape[1]
        for number, row in enumerate(batch.rows):
            prefixes = list_prefixes(sequences, list(row))
            ids, ends = batch.token_ids[number].tolist(), batch.subtree_end[number].tolist()
            seen = [[key for key in range(query + 1) if query < ends[key]] for query in range(length)]
            real, padding = seen[: len(prefixes)], seen[len(prefixes) :]
            assert {tuple(ids[key] for key in keys) for keys in real} == prefixes
            assert padding == [[query] for query in range(len(prefixes), length)]
            assert batch.position[number].tolist() == [len(keys) - 1 for keys in seen]


def test_sources_and_owners_point_into_the_flattened_micro_batch() -> None:
    sequences = draw_set(4, number=15, letters=3)
    for batch in batch_rows(sequences, plan_rows(sequences, RowCost(0.2), 15), 80):
        length = batch.token_ids.shape[1]
        for source, target, owner in zip(
            batch.source.tolist(), batch.target.tolist(), batch.owner.tolist(), strict=True
        ):
            assert owner in batch.rows[source // length]
            at = int(batch.position.flatten()[source]) + 1
            assert sequences[owner].token_ids[at] == target
            assert sequences[owner].token_ids[at - 1] == int(batch.token_ids.flatten()[source])


def test_a_micro_batch_moves_whole() -> None:
    batch = next(batch_rows(draw_set(0, 3), [[0], [1], [2]], 100))
    moved = batch.to("meta")
    names = ("token_ids", "position", "subtree_end", "source", "target", "owner")
    assert all(getattr(moved, name).device.type == "meta" for name in names)
    assert (moved.rows, moved.num_tokens) == (batch.rows, batch.num_tokens)


@pytest.mark.parametrize("start_up", [0.0, 3.0, 40.0])
@pytest.mark.parametrize("budget", [5, 30, 1000])
def test_micro_batches_are_the_cheapest_division(start_up: float, budget: int) -> None:
    rng = np.random.default_rng(7)
    for _ in range(8):
        sizes = sorted((int(size) for size in rng.integers(1, 20, rng.integers(1, 9))), reverse=True)
        cost = RowCost(0.05, start_up)

        def price(pieces: list[list[int]], cost: RowCost = cost) -> float:
            fits = all(len(piece) == 1 or max(piece) * len(piece) <= budget for piece in pieces)
            each = [len(piece) * (max(piece) + 0.05 * max(piece) ** 2) + start_up for piece in pieces]
            return sum(each) if fits else float("inf")

        found = [sizes[start:end] for start, end in divide_sizes(sizes, budget, cost)]
        assert [size for piece in found for size in piece] == sizes
        assert price(found) == pytest.approx(min(price(pieces) for pieces in divide(sizes)))
