"""Masks against a walk from each token up to its root."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from koat.core.sequence import Sequence
from koat.forest.attend import AttentionPlan, find_windows, make_block_mask, make_visible, render_mask
from koat.forest.pack import MicroBatch, collate_rows

WINDOWS = [None, 1, 5, 40]


def draw_batch(seed: int, num_rows: int, row_length: int, multiple: int = 1) -> MicroBatch:
    """Return rows of trees that fork in many places, of about `row_length` tokens each."""
    rng = np.random.default_rng(seed)
    sequences: list[Sequence] = []
    rows: list[list[int]] = []
    for _ in range(num_rows):
        bodies: list[tuple[int, ...]] = []
        size = 0
        while size < row_length:
            kept = bodies[rng.integers(len(bodies))] if bodies and rng.random() < 0.8 else ()
            kept = kept[: int(rng.integers(0, len(kept) + 1))]
            fresh = int(min(rng.integers(1, max(2, row_length // 3)), row_length - size))
            bodies.append(kept + tuple(int(t) for t in rng.integers(0, 10**6, fresh)))
            size += fresh
        bodies.sort()
        rows.append(list(range(len(sequences), len(sequences) + len(bodies))))
        sequences += [Sequence(body, (False,) * len(body)) for body in bodies]
    return collate_rows(sequences, rows, multiple)


def walk_ancestors(batch: MicroBatch, window: int | None) -> Tensor:
    """Return the boolean `[R, L, L]` mask, found by climbing parents rather than by `subtree_end`'s formula.

    In depth-first order the parent of a token at depth d is the last token before it at depth d - 1.
    """
    num_rows, length = batch.position.shape
    mask = torch.zeros(num_rows, length, length, dtype=torch.bool)
    for row in range(num_rows):
        path: list[int] = []
        for query, depth in enumerate(batch.position[row].tolist()):
            path = [*path[:depth], query]
            seen = path if window is None else path[-window:]
            mask[row, query, seen] = True
    return mask


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("seed", range(4))
def test_the_boolean_mask_is_the_ancestors(seed: int, window: int | None) -> None:
    batch = draw_batch(seed, num_rows=3, row_length=50 + 10 * seed)
    mask = make_visible(batch.position, batch.subtree_end, window)
    assert mask.shape == (3, 1, *2 * (batch.position.shape[1],))
    assert torch.equal(mask[:, 0], walk_ancestors(batch, window))


def test_masks_are_rendered_as_the_model_takes_them() -> None:
    batch = draw_batch(0, num_rows=2, row_length=40)
    windows = (("sliding_attention", 5), ("full_attention", None), ("odd_attention", 5))
    tree, windowed = walk_ancestors(batch, None)[:, None], walk_ancestors(batch, 5)[:, None]

    one = render_mask(AttentionPlan("sdpa"), batch.position, batch.subtree_end, torch.float32)
    assert torch.equal(one, tree)
    first = render_mask(AttentionPlan("sdpa", windows), batch.position, batch.subtree_end, torch.float32)
    assert torch.equal(first, windowed)
    by_type = render_mask(AttentionPlan("sdpa", windows, True), batch.position, batch.subtree_end, torch.float32)
    assert list(by_type) == ["sliding_attention", "full_attention", "odd_attention"]
    assert torch.equal(by_type["full_attention"], tree)
    assert torch.equal(by_type["sliding_attention"], windowed)
    assert by_type["sliding_attention"] is by_type["odd_attention"]
    for dtype in (torch.float32, torch.bfloat16):
        added = render_mask(AttentionPlan("eager"), batch.position, batch.subtree_end, dtype)
        assert added.dtype == dtype
        assert torch.equal(added == 0, tree)
        assert (added[~tree] == torch.finfo(dtype).min).all()


@pytest.mark.parametrize(
    ("family", "options", "expected"),
    [
        ("llama", {}, {"full_attention": None}),
        ("mistral", {}, {"full_attention": 6}),
        ("mistral", {"sliding_window": None}, {"full_attention": None}),
        ("qwen2", {}, {"full_attention": None}),
        ("qwen2-window", {}, {"sliding_attention": 6, "full_attention": None}),
        ("gemma2", {}, {"sliding_attention": 6, "full_attention": None}),
    ],
)
def test_windows_by_layer_type(make_config, family, options, expected) -> None:
    assert find_windows(make_config(family, **options)) == expected


LENGTHS = [(100, 1), (128, 1), (200, 1), (256, 1), (300, 128), (512, 1)]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("length", "multiple"), LENGTHS)
def test_block_lists_hide_nothing_and_promise_nothing_wrong(length: int, multiple: int, window: int | None) -> None:
    check_block_lists(draw_batch(length, num_rows=2, row_length=length, multiple=multiple), window)


@pytest.mark.parametrize("window", [*WINDOWS, 200, 300])
@pytest.mark.parametrize("trunk", [127, 128, 129, 256])
@pytest.mark.parametrize("limb", [127, 128, 129])
def test_block_lists_where_trees_end_at_a_border(trunk: int, limb: int, window: int | None) -> None:
    shared = tuple(range(trunk))
    bodies = [shared + tuple(range(1000 * n, 1000 * n + limb)) for n in (1, 2)] + [tuple(range(5000, 5100))]
    batch = collate_rows([Sequence(body, (False,) * len(body)) for body in bodies], [[0, 1, 2]])
    check_block_lists(batch, window)


def check_block_lists(batch: MicroBatch, window: int | None) -> None:
    """A block called full is wholly visible, one left out is wholly hidden, and none is listed twice."""
    mask = make_block_mask(batch.position, batch.subtree_end, window)
    dense = walk_ancestors(batch, window)
    num_blocks = -(-dense.shape[-1] // 128)
    listed = set()
    for row in range(len(dense)):
        for query in range(num_blocks):
            partial = read_list(mask.kv_num_blocks, mask.kv_indices, row, query)
            full = read_list(mask.full_kv_num_blocks, mask.full_kv_indices, row, query)
            assert not partial & full
            for key in range(num_blocks):
                block = dense[row, query * 128 : query * 128 + 128, key * 128 : key * 128 + 128]
                if key in full:
                    assert block.all()
                elif key not in partial:
                    assert not block.any()
                listed |= {"full"} if key in full else {"partial"} if key in partial else {"hidden"}
    assert "partial" in listed


def read_list(count: Tensor, indices: Tensor, row: int, query: int) -> set[int]:
    number = int(count[row, 0, query])
    chosen = indices[row, 0, query, :number].tolist()
    assert len(set(chosen)) == number
    return set(chosen)


def test_block_lists_skip_and_spare() -> None:
    """One trunk of 256 tokens under limbs of 128: trunk blocks are wholly seen, limbs are hidden from limbs."""
    trunk = tuple(range(256))
    limbs = [trunk + tuple(range(1000 * n, 1000 * n + 128)) for n in (1, 2, 3)]
    batch = collate_rows([Sequence(limb, (False,) * len(limb)) for limb in limbs], [[0, 1, 2]])
    mask = make_block_mask(batch.position, batch.subtree_end)
    full = [read_list(mask.full_kv_num_blocks, mask.full_kv_indices, 0, q) for q in range(5)]
    partial = [read_list(mask.kv_num_blocks, mask.kv_indices, 0, q) for q in range(5)]
    assert full == [set(), {0}, {0, 1}, {0, 1}, {0, 1}]
    assert partial == [{0}, {1}, {2}, {3}, {4}]


def test_the_dense_form_of_the_block_mask_covers_the_dense_mask() -> None:
    batch = draw_batch(7, num_rows=2, row_length=384)
    blocks = make_block_mask(batch.position, batch.subtree_end).to_dense().bool()[:, 0]
    needed = walk_ancestors(batch, None).view(2, 3, 128, 3, 128).any(4).any(2)
    assert torch.equal(blocks, blocks | needed)


@pytest.mark.parametrize("window", [None, 5, 200])
@pytest.mark.parametrize(("length", "multiple"), [(128, 1), (300, 128), (512, 1)])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_equals_sdpa(length: int, multiple: int, window: int | None) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    batch = draw_batch(length + 1, num_rows=2, row_length=length, multiple=multiple)
    generator = torch.Generator().manual_seed(length)
    shape = (2, 2, batch.position.shape[1], 16)
    query, key, value = (torch.randn(shape, generator=generator) for _ in range(3))
    block_mask = make_block_mask(batch.position, batch.subtree_end, window)
    found = flex_attention(query, key, value, block_mask=block_mask)
    dense = walk_ancestors(batch, window)[:, None]
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=dense)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
