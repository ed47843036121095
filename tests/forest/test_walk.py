"""Walked attention against PyTorch's own attention under the dense mask, outputs and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from koat.core.sequence import Sequence
from koat.forest import pieces
from koat.forest.attend import make_visible
from koat.forest.build import build_forest
from koat.forest.pack import MicroBatch, collate_rows
from koat.forest.pieces import Piece, cut_row
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


def compare(
    batch: MicroBatch, window: int | None, groups: int, dtype: torch.dtype = torch.float32, narrow: bool = False
) -> float:
    """Return the largest difference of outputs and gradients, relative to the largest value.

    With `narrow` only what predicts asks, and nothing else counts.
    """
    rows, length = batch.token_ids.shape
    generator = torch.Generator().manual_seed(1)

    def make(heads: int) -> torch.Tensor:
        return torch.randn(rows, heads, length, 16, generator=generator).to(dtype)

    query, key, value, weight = make(4), make(groups), make(groups), make(4).transpose(1, 2)
    visible = make_visible(batch.position, batch.subtree_end, window)
    asking = torch.ones(rows, length, dtype=torch.bool)
    if narrow:
        asking = torch.zeros_like(asking).view(-1).index_fill(0, batch.source, True).view(rows, length)
        weight = weight * asking[:, :, None, None]
    results = []
    for walks in (True, False):
        leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        if walks:
            walk = Walk(batch.position, batch.subtree_end, asking if narrow else None, last_layer=0)
            output = WalkAttention.apply(*leaves, walk.list_pieces(window, layer=0), 0.25)
        else:
            # In float32 the dense kernel is the less exact of the two: 3.9e-6 from this, where the walk is 2.7e-7.
            plain = [leaf.double() for leaf in leaves]
            attended = torch.nn.functional.scaled_dot_product_attention(
                plain[0], *(each.repeat_interleave(4 // groups, 1) for each in plain[1:]), visible, scale=0.25
            )
            output = attended.transpose(1, 2)
        (output * weight).sum().backward()
        results.append([output.detach().float() * asking[:, :, None, None], *(leaf.grad.float() for leaf in leaves)])
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True))


@example(seed=60, scale=40, window=None, trunk=0.0, narrow=True)
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([2, 8, 40]),
    window=st.sampled_from([None, 3, 20, 1000]),
    trunk=st.sampled_from([0.0, 500.0, pieces.TRUNK]),
    narrow=st.booleans(),
)
def test_equals_dense_attention_on_random_forests(
    seed: int, scale: int, window: int | None, trunk: float, narrow: bool
) -> None:
    rng = np.random.default_rng(seed)
    batch = make_batch([draw_bodies(rng, scale) for _ in range(int(rng.integers(1, 3)))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "TRUNK", trunk)
        assert compare(batch, window, groups=int(rng.choice([1, 2, 4])), narrow=narrow) < 2e-6


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("trunk", [0.0, float("inf")])
def test_equals_dense_attention_in_bfloat16_within_its_rounding(
    trunk: float, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "TRUNK", trunk)
    batch = make_batch([draw_bodies(np.random.default_rng(3), 40)])
    assert compare(batch, None, groups=2, dtype=torch.bfloat16, narrow=narrow) < 2e-2


def render(piece: Piece) -> torch.Tensor:
    """Return which keys `[n, K]` a piece's queries see."""
    if piece.mask is not None:
        return piece.mask == 0
    size = piece.stop - piece.start
    assert isinstance(piece.keys, slice)
    seen = torch.ones(size, piece.keys.stop - piece.keys.start, dtype=torch.bool)
    return seen.tril() if piece.is_causal else seen


@pytest.mark.parametrize("trunk", [0.0, 500.0, pieces.TRUNK])
@pytest.mark.parametrize("window", [None, 10])
def test_pieces_see_every_pair_once_and_own_each_token_once(
    window: int | None, trunk: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "TRUNK", trunk)
    rng = np.random.default_rng(5)
    for _ in range(20):
        bodies = draw_bodies(rng, 30)
        forest = build_forest([Sequence(body, (False,) * len(body)) for body in bodies])
        position, end = torch.from_numpy(forest.position), torch.from_numpy(forest.subtree_end)
        expected = make_visible(position[None], end[None], window)[0, 0]
        alone = (forest.position == 0) & (forest.subtree_end == np.arange(1, len(forest) + 1))
        found = torch.diag(torch.from_numpy(alone)).int()
        owned = np.zeros(len(forest), dtype=int)
        for piece in cut_row(0, forest.position, forest.subtree_end, window):
            # What a trunk adds to is there already.
            assert not piece.adds or owned[piece.start : piece.stop].all()
            owned[piece.start : piece.stop] += not piece.adds
            found[piece.start : piece.stop, piece.keys] += render(piece)
        assert torch.equal(found, expected.int())
        assert (owned == ~alone).all()


@pytest.mark.parametrize("window", [2, 5, 16, 37])
@pytest.mark.parametrize("narrow", [False, True])
def test_blocks_under_a_window_equal_dense_attention(
    window: int, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chains, branches behind them and a second tree, all longer than a block of 16 and than the window."""
    monkeypatch.setattr(pieces, "BLOCK", 16)
    trunk = tuple(range(150))
    branches = [trunk + tuple(range(1000 * branch, 1000 * branch + 70)) for branch in (1, 2, 3)]
    batch = make_batch([[*branches, branches[0][:180] + (7,) * 30], [tuple(range(500, 600))], [(1,) * 20]])
    assert compare(batch, window, groups=2, narrow=narrow) < 2e-6


@pytest.mark.parametrize("start", [0, 300])
@pytest.mark.parametrize(("length", "window"), [(2048, 100), (2048, 512), (2500, 700), (1300, 2047), (4096, 512)])
def test_no_mask_is_larger_than_a_block_and_a_window(length: int, window: int, start: int) -> None:
    """One mask for a whole chain would be its square."""
    position, end = np.arange(length), np.full(length, length)
    row = list(cut_row(0, position, end, window, num_cached=start))
    masked = [piece for piece in row if piece.mask is not None]
    assert all(piece.mask.shape[0] <= 512 and piece.mask.shape[1] <= 512 + window - 1 for piece in masked)
    assert sum(piece.stop - piece.start for piece in row if not piece.adds) == length - start
    # What lies within the window of the first token is causal, without a mask.
    assert start or window < 512 or (row[0].is_causal and row[0].stop == min(length, window))


def test_a_trunk_is_one_causal_piece_and_seen_by_all_its_branches_at_once() -> None:
    trunk = tuple(range(900))
    bodies = [trunk + (1000 + branch,) * 31 for branch in range(4)]
    forest = build_forest([Sequence(body, (False,) * 930 + (True,)) for body in bodies])
    first, *branches, last = cut_row(0, forest.position, forest.subtree_end, None)
    assert (first.start, first.stop, first.is_causal) == (0, 900, True)
    assert (last.start, last.stop, last.keys, last.mask, last.adds) == (900, 1020, slice(0, 900), None, True)
    assert all(piece.keys == slice(piece.start, piece.stop) for piece in branches)


def test_a_few_tokens_take_their_short_trunk_along() -> None:
    bodies = [tuple(range(90)) + (1000 + branch,) * 31 for branch in range(2)]
    forest = build_forest([Sequence(body, (False,) * 120 + (True,)) for body in bodies])
    assert not any(piece.adds for piece in cut_row(0, forest.position, forest.subtree_end, None))


@pytest.mark.parametrize("num_cached", [1, 700, 905])
def test_cached_trunks_are_seen_by_what_is_computed(num_cached: int) -> None:
    bodies = [tuple(range(900)) + (1000,) * 10 + (2000 + branch,) * 100 for branch in range(4)]
    forest = build_forest([Sequence(body, (False,) * len(body)) for body in bodies])
    expected = make_visible(torch.from_numpy(forest.position)[None], torch.from_numpy(forest.subtree_end)[None], None)
    found = torch.zeros(len(forest) - num_cached, len(forest), dtype=torch.int)
    row = list(cut_row(0, forest.position, forest.subtree_end, None, num_cached=num_cached))
    for piece in row:
        found[piece.start : piece.stop, piece.keys] += render(piece)
    assert torch.equal(found, expected[0, 0, num_cached:].int())
    assert any(piece.adds and piece.keys == slice(0, num_cached) for piece in row) == (num_cached > 1)


def test_trees_in_one_row_never_meet() -> None:
    bodies = [(tree,) * 300 + (50 + branch,) * 40 for tree in range(3) for branch in range(2)]
    forest = build_forest([Sequence(body, (False,) * 339 + (True,)) for body in bodies])
    roots = np.maximum.accumulate(np.where(forest.position == 0, np.arange(len(forest)), 0))
    row = list(cut_row(0, forest.position, forest.subtree_end, None))
    assert len(row) >= 6
    for piece in row:
        assert len({*roots[piece.keys].tolist(), *roots[piece.start : piece.stop].tolist()}) == 1
