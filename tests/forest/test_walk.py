"""Walked attention against PyTorch's own attention under the dense mask, outputs and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from koat.core.sequence import Sequence
from koat.forest.attend import make_visible
from koat.forest.build import build_forest
from koat.forest.pack import MicroBatch, collate_rows
from koat.forest.pieces import cut_row
from koat.forest.walk import Walk, WalkAttention


def make_batch(bodies: list[list[tuple[int, ...]]]) -> MicroBatch:
    sequences = [Sequence(body, (False,) * (len(body) - 1) + (True,)) for row in bodies for body in row]
    rows, start = [], 0
    for row in bodies:
        order = sorted(range(start, start + len(row)), key=lambda index: sequences[index].token_ids[:-1])
        rows.append(order)
        start += len(row)
    return collate_rows(sequences, rows)


def draw_bodies(rng: np.random.Generator, scale: int) -> list[tuple[int, ...]]:
    """Return sequences of a few random trees, branches at several depths, some of one token."""

    def draw(length: int) -> tuple[int, ...]:
        return tuple(int(token) for token in rng.integers(0, 1000, length))

    bodies = []
    for _ in range(int(rng.integers(1, 4))):
        trunk = draw(int(rng.integers(1, 6 * scale)))
        for _ in range(int(rng.integers(1, 5))):
            limb = trunk + draw(int(rng.integers(0, 2 * scale)))
            bodies += [limb + draw(int(rng.integers(1, scale))) for _ in range(int(rng.integers(1, 4)))]
    return [*bodies, draw(2)]


def compare(batch: MicroBatch, window: int | None, groups: int, dtype: torch.dtype = torch.float32) -> float:
    """Return the largest difference of outputs and gradients, relative to the largest value."""
    rows, length = batch.token_ids.shape
    generator = torch.Generator().manual_seed(1)

    def make(heads: int) -> torch.Tensor:
        return torch.randn(rows, heads, length, 16, generator=generator).to(dtype)

    query, key, value, weight = make(4), make(groups), make(groups), make(4).transpose(1, 2)
    visible = make_visible(batch.position, batch.subtree_end, window)
    results = []
    for walks in (True, False):
        leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        if walks:
            pieces = Walk(batch.position, batch.subtree_end).list_pieces(window)
            output = WalkAttention.apply(*leaves, pieces, 0.25)
        else:
            plain = [leaf.float() for leaf in leaves]
            attended = torch.nn.functional.scaled_dot_product_attention(
                plain[0], *(each.repeat_interleave(4 // groups, 1) for each in plain[1:]), visible, scale=0.25
            )
            output = attended.transpose(1, 2)
        (output * weight).sum().backward()
        results.append([output.detach().float(), *(leaf.grad.float() for leaf in leaves)])
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([2, 8, 40]), window=st.sampled_from([None, 3, 20]))
def test_equals_dense_attention_on_random_forests(seed: int, scale: int, window: int | None) -> None:
    rng = np.random.default_rng(seed)
    batch = make_batch([draw_bodies(rng, scale) for _ in range(int(rng.integers(1, 3)))])
    assert compare(batch, window, groups=int(rng.choice([1, 2, 4]))) < 2e-6


def test_equals_dense_attention_in_bfloat16_within_its_rounding() -> None:
    batch = make_batch([draw_bodies(np.random.default_rng(3), 40)])
    assert compare(batch, None, groups=2, dtype=torch.bfloat16) < 2e-2


@pytest.mark.parametrize("window", [None, 10])
def test_pieces_cover_each_token_once_and_mask_nothing_else(window: int | None) -> None:
    rng = np.random.default_rng(5)
    for _ in range(20):
        bodies = draw_bodies(rng, 30)
        forest = build_forest([Sequence(body, (False,) * len(body)) for body in bodies])
        position, end = torch.from_numpy(forest.position), torch.from_numpy(forest.subtree_end)
        expected = make_visible(position[None], end[None], window)[0, 0]
        found = torch.eye(len(forest), dtype=torch.bool)
        covered = np.zeros(len(forest), dtype=int)
        for piece in cut_row(0, forest.position, forest.subtree_end, window):
            covered[piece.start : piece.stop] += 1
            size = piece.stop - piece.start
            seen = torch.ones(size, size).tril().bool() if piece.mask is None else piece.mask == 0
            found[piece.start : piece.stop, piece.keys] = seen
        assert torch.equal(found, expected)
        alone = (forest.position == 0) & (forest.subtree_end == np.arange(1, len(forest) + 1))
        assert (covered == ~alone).all()


def test_a_trunk_is_one_causal_piece_and_its_branches_are_narrow() -> None:
    trunk = tuple(range(900))
    bodies = [trunk + (1000 + branch,) * 31 for branch in range(4)]
    forest = build_forest([Sequence(body, (False,) * 930 + (True,)) for body in bodies])
    first, *others = cut_row(0, forest.position, forest.subtree_end, None)
    assert (first.start, first.stop, first.mask) == (0, 900, None)
    pairs = sum(piece.mask.numel() for piece in others if piece.mask is not None)
    assert pairs <= 120 * 1020


def test_trees_in_one_row_never_meet() -> None:
    bodies = [(tree,) * 300 + (50 + branch,) * 40 for tree in range(3) for branch in range(2)]
    forest = build_forest([Sequence(body, (False,) * 339 + (True,)) for body in bodies])
    pieces = list(cut_row(0, forest.position, forest.subtree_end, None))
    assert len(pieces) >= 6
    for piece in pieces:
        keys = range(len(forest))[piece.keys] if isinstance(piece.keys, slice) else piece.keys.tolist()
        assert len({forest.token_ids[key] for key in keys if forest.position[key] < 300}) == 1
