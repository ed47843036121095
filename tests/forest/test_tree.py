"""Tree attention: which blocks see which, by brute force; its kernels against dense attention in float64.

Without a GPU Triton interprets the kernels, and compiles them for GPUs that are not here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from koat.core.sequence import supervise_from
from koat.forest import kernels as choice
from koat.forest.attend import make_visible
from koat.forest.interface import attend_trees
from koat.forest.kernels import list_kernels
from koat.forest.pack import collate_rows
from koat.forest.probe import measure_slopes
from koat.forest.score import cut_sequences, set_kernel, sum_by_owner, token_logprobs
from koat.forest.stream import score_forest
from koat.forest.tree import Tree, measure_tree
from koat.forest.verify import verify_layout
from tests.triton_kernels import load_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def kernels() -> Any:
    """Return the module of kernels, where they can run."""
    return load_kernels("koat.forest.tree_kernels")


def draw_rows(seed: int = 0) -> Any:
    """Return a micro-batch of two rows: a trunk with branches and a stranger, and a shorter one, padded."""
    rng = np.random.default_rng(seed)

    def draw(length: int) -> tuple[int, ...]:
        return tuple(int(token) for token in rng.integers(3, 300, length))

    trunk, other = draw(70), draw(33)
    rows = [[trunk + draw(24) for _ in range(5)] + [draw(40)], [other + draw(20) for _ in range(4)]]
    sequences = [supervise_from(ids, 3) for row in rows for ids in sorted(row)]
    return collate_rows(sequences, [list(range(6)), list(range(6, 10))]).to(DEVICE)


def attend_densely(query, key, value, mask, scaling) -> torch.Tensor:
    """Return attention as its formula has it."""
    key, value = (heads.repeat_interleave(query.shape[1] // heads.shape[1], 1) for heads in (key, value))
    scores = (query @ key.transpose(-1, -2) * scaling).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


# ------------------------------------------------------------------------------------------------ blocks


@pytest.mark.parametrize("num_cached", [0, 37])
@pytest.mark.parametrize("window", [None, 9, 40])
@pytest.mark.parametrize("sizes", [(64, 64), (32, 16), (16, 32)])
def test_blocks_hold_all_that_is_seen_and_little_else(window, num_cached, sizes) -> None:
    batch = draw_rows()
    tree = Tree.plant(batch.position, batch.subtree_end, num_cached)
    blocks = tree.list_blocks(window, *sizes)
    visible = make_visible(batch.position, batch.subtree_end, window)[:, 0, num_cached:].cpu().numpy()
    num_rows, num_queries, num_keys = visible.shape
    found = np.zeros((num_rows, -(-num_queries // sizes[0]), -(-num_keys // sizes[1])), bool)
    for row, query, key in zip(*np.nonzero(visible), strict=True):
        found[row, query // sizes[0], key // sizes[1]] = True

    def read(counts, places, shape) -> np.ndarray:
        marked = np.zeros(shape, bool)
        for index, count in np.ndenumerate(counts.cpu().numpy()):
            marked[index][places.cpu().numpy()[index][:count]] = True
        return marked

    listed = read(blocks.num_keys, blocks.keys, found.shape)
    assert (listed >= found).all()
    assert listed.sum() <= 1.25 * found.sum() and not listed.all()
    turned = read(blocks.num_queries, blocks.queries, (num_rows, found.shape[2], found.shape[1]))
    assert (turned == listed.transpose(0, 2, 1)).all()
    assert tree.list_blocks(window, *sizes) is blocks


# ------------------------------------------------------------------------------------------------ kernels


@pytest.mark.parametrize(
    ("width", "heads", "groups", "window", "num_cached", "dtype"),
    [
        (16, 4, 2, None, 0, torch.float32),
        (24, 2, 1, None, 0, torch.float32),
        (16, 4, 4, 9, 0, torch.float32),
        (16, 2, 2, None, 37, torch.float32),
        (256, 2, 1, 40, 0, torch.float32),
        (64, 2, 1, None, 0, torch.float16),
        (80, 3, 3, None, 11, torch.float16),
    ],
)
def test_values_and_gradients_are_the_formulas(kernels, width, heads, groups, window, num_cached, dtype) -> None:
    batch = draw_rows()
    num_rows, length = batch.position.shape
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    # Heads lie as projections leave them, token by token.
    query = draw(num_rows, length - num_cached, heads, width).transpose(1, 2)
    key, value = (draw(num_rows, length, groups, width).transpose(1, 2) for _ in range(2))
    upstream, scaling = draw(num_rows, length - num_cached, heads, width), width**-0.5
    tree = Tree.plant(batch.position, batch.subtree_end, num_cached)
    leaves = [heads.detach().requires_grad_() for heads in (query, key, value)]
    found = kernels.TreeAttention.apply(*leaves, tree, window, scaling)
    gradients = torch.autograd.grad(found, leaves, upstream)
    exact = [heads.detach().double().requires_grad_() for heads in (query, key, value)]
    mask = make_visible(batch.position, batch.subtree_end, window)[:, :, num_cached:]
    expected = attend_densely(*exact, mask, scaling)
    wanted = torch.autograd.grad(expected, exact, upstream.double())
    tolerance = 2e-6 if dtype == torch.float32 else 2e-3
    for mine, right in zip((found, *gradients), (expected, *wanted), strict=True):
        assert mine.dtype == dtype and mine.shape == right.shape
        assert float((mine.double() - right).norm() / right.norm()) < tolerance


def test_what_no_kernel_wrote_is_read_by_none(kernels, monkeypatch) -> None:
    """Whole blocks of queries that see nothing: their rows of every sum and gradient are written all the same."""

    def spoil(shape, **options) -> torch.Tensor:
        return torch.full(tuple(shape), float("nan"), **options)

    batch = draw_rows()
    ends = batch.subtree_end.clone()
    ends[0, -100:] = 0
    visible = make_visible(batch.position, ends)
    leaves = [torch.randn(*ends.shape, 16, device=DEVICE)[:, None].requires_grad_() for _ in range(3)]
    found = kernels.TreeAttention.apply(*leaves, Tree.plant(batch.position, ends), None, 0.25)
    monkeypatch.setattr(kernels.torch, "empty", spoil)
    monkeypatch.setattr(
        kernels.torch, "empty_like", lambda each: spoil(each.shape, dtype=each.dtype, device=each.device)
    )
    gradients = torch.autograd.grad(found, leaves, torch.ones_like(found))
    monkeypatch.undo()
    seeing = visible.any(-1)[..., None]  # [R, 1, L, 1]
    dense = attend_densely(*leaves, visible | ~seeing, 0.25).where(seeing.transpose(1, 2), 0.0)
    wanted = torch.autograd.grad(dense, leaves, torch.ones_like(dense))
    for mine, right in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(mine, right, atol=2e-5, rtol=1e-5)


class Sizes(TorchDispatchMode):
    """Keeps how many float32 numbers each operation of PyTorch makes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype == torch.float32:
            self.found.append(made.numel())
        return made


def test_the_way_back_makes_no_float32_copy_of_an_output(kernels) -> None:
    batch = draw_rows()
    query, key, value = torch.randn(3, 2, 2, batch.position.shape[1], 64, device=DEVICE, dtype=torch.float16)
    query.requires_grad_()
    tree = Tree.plant(batch.position, batch.subtree_end)
    found = kernels.TreeAttention.apply(query, key, value, tree, None, 0.125)
    upstream = torch.ones_like(found)
    with Sizes() as sizes:
        found.backward(upstream)
    assert max(sizes.found) == found[..., 0].numel()


def test_what_kernels_do_not_compute_is_refused(kernels) -> None:
    with pytest.raises(NotImplementedError, match="heads of 320 numbers"):
        kernels.pick_shape(320, torch.bfloat16)
    with pytest.raises(NotImplementedError, match="float64"):
        kernels.pick_shape(64, torch.float64)
    batch = draw_rows()
    heads = torch.zeros(2, 1, batch.position.shape[1], 16, device=DEVICE)
    tree = Tree.plant(batch.position, batch.subtree_end)
    with pytest.raises(NotImplementedError, match="knows no softcap"):
        attend_trees(torch.nn.Module(), heads, heads, heads, None, trees=tree, softcap=3.0)
    with pytest.raises(NotImplementedError, match="values of 8 for 16 numbers"):
        attend_trees(torch.nn.Module(), heads, heads, heads[..., :8], None, trees=tree)


def test_dropout_on_attention_falls_back_on_dense_masks() -> None:
    batch = draw_rows()
    heads = torch.randn(2, 2, batch.position.shape[1], 16, device=DEVICE)
    tree = Tree.plant(batch.position, batch.subtree_end)
    module = torch.nn.Module().train()
    found, _ = attend_trees(module, heads, heads, heads, None, dropout=1e-9, trees=tree, scaling=0.25)
    mask = make_visible(batch.position, batch.subtree_end)
    torch.testing.assert_close(found, attend_densely(heads, heads, heads, mask, 0.25), atol=1e-5, rtol=1e-5)


def test_autocast_chooses_the_type(kernels) -> None:
    batch = draw_rows()
    heads = torch.randn(2, 2, batch.position.shape[1], 16, device=DEVICE)
    tree = Tree.plant(batch.position, batch.subtree_end)
    with torch.autocast(DEVICE, torch.float16):
        found, _ = attend_trees(torch.nn.Module(), heads, heads, heads, None, trees=tree)
    mask = make_visible(batch.position, batch.subtree_end)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), attend_densely(heads, heads, heads, mask, 0.25), atol=5e-3, rtol=5e-3)


# ------------------------------------------------------------------------------------------------ models


@pytest.fixture
def preferred(kernels, monkeypatch) -> None:
    """Let a processor, too, take tree attention first."""
    monkeypatch.setattr(choice, "list_kernels", lambda *_: ["tree", "sdpa"])
    monkeypatch.setattr("koat.forest.verify.list_kernels", lambda *_: ["tree", "sdpa"])


@pytest.mark.parametrize("family", ["gpt_neox", "qwen2-window"])
def test_models_take_it_for_training_and_streams(preferred, make_model, make_sequences, score_singly, family) -> None:
    model, sequences = make_model(family), make_sequences("chat")
    each = score_singly(model, sequences)
    marks = [torch.tensor(sequence.supervised) for sequence in sequences]
    expected = torch.stack([(row * mark).sum() for row, mark in zip(each, marks, strict=True)])
    model.to(DEVICE).get_input_embeddings().weight.requires_grad_()
    layout, found = verify_layout(model)
    assert (found.kernel, found.shares, found.streams) == ("tree", True, True), found
    assert measure_slopes(model, sequences, layout) < 1e-5
    total = torch.zeros(len(sequences))
    with torch.no_grad():
        for batch in cut_sequences(sequences, layout, 256):
            batch = batch.to(DEVICE)
            total += sum_by_owner(token_logprobs(model, batch, layout), batch.owner, len(sequences)).cpu()
    torch.testing.assert_close(total, expected, atol=2e-4, rtol=1e-5)
    sums = torch.zeros(len(sequences))
    for part in score_forest(model, layout, sequences, 24):
        sums += sum_by_owner(part.logprobs, part.owner, len(sequences)).cpu()
    torch.testing.assert_close(sums, expected, atol=2e-4, rtol=1e-5)


def test_a_kernel_whose_way_back_is_wrong_is_passed_over(preferred, kernels, make_model, monkeypatch) -> None:
    right = kernels.TreeAttention.backward
    monkeypatch.setattr(
        kernels.TreeAttention, "backward", staticmethod(lambda *given: (2 * right(*given)[0], *right(*given)[1:]))
    )
    model = make_model("llama").to(DEVICE)
    assert verify_layout(model)[1].kernel == "tree"  # nothing is trained: the way back is never taken
    model.get_input_embeddings().weight.requires_grad_()
    assert verify_layout(model)[1].kernel == "sdpa"


@pytest.mark.parametrize("wrong", [-1.0, float("nan")])
@pytest.mark.parametrize("spoilt", [(0,), (1,), (0, 1), (2,)])
def test_the_way_back_is_tried_in_the_type_that_is_trained_in_too(
    preferred, kernels, make_model, monkeypatch, caplog, spoilt, wrong
) -> None:
    right = kernels.TreeAttention.backward

    def spoil(ctx, *gradients):
        found = right(ctx, *gradients)
        if found[0].dtype == torch.float32:
            return found
        return tuple(wrong * each if number in spoilt else each for number, each in enumerate(found))

    monkeypatch.setattr(kernels.TreeAttention, "backward", staticmethod(spoil))
    model = make_model("llama").to(DEVICE)
    model.get_input_embeddings().weight.requires_grad_()
    assert verify_layout(model)[1].kernel == "tree"
    assert verify_layout(model, compute=torch.float16)[1].kernel == "sdpa"
    assert "tree attention in torch.float16 differs by" in caplog.text


@pytest.mark.parametrize("spoilt", [(), (0,), (1,), (2,)])
def test_a_gradient_that_is_no_number_is_no_small_difference(monkeypatch, spoilt) -> None:
    """Dense attention in the kernels' place, and what is pulled back to some of its inputs spoilt."""

    def attend(tree, query, key, value, window, scaling, layer):
        for number, heads in enumerate((query, key, value)):
            if number in spoilt:
                heads.register_hook(lambda gradient: gradient * float("nan"))
        return attend_densely(query, key, value, make_visible(tree.position, tree.subtree_end, window), scaling)

    monkeypatch.setattr(Tree, "attend", attend)
    found = measure_tree(16, torch.float32, torch.device(DEVICE))
    assert found == float("inf") if spoilt else found < 1e-5


@pytest.mark.parametrize("window", [None, 9])
def test_right_kernels_are_near_their_formula(kernels, window) -> None:
    assert measure_tree(16, torch.float32, torch.device(DEVICE), window) < 1e-5
    assert measure_tree(64, torch.float16, torch.device(DEVICE), window) < 5e-3


@pytest.mark.parametrize(
    ("device", "there", "expected"), [("cuda", True, "tree"), ("cuda", False, "sdpa"), ("mps", True, "sdpa")]
)
def test_it_is_tried_first_on_a_gpu_with_triton(make_model, monkeypatch, device, there, expected) -> None:
    monkeypatch.setattr(choice, "has_triton", lambda: there)
    model = make_model("llama")
    monkeypatch.setattr(type(model), "device", property(lambda self: torch.device(device)))
    assert list_kernels(model, "auto")[0] == expected
    assert list_kernels(model, "auto")[-1] == "sdpa"
    assert list_kernels(model, "sdpa") == ["sdpa"]
    set_kernel(model, "tree")
    assert list_kernels(model, "auto")[0] == expected


# ------------------------------------------------------------------------------------------------ compiling

COMPILE = Path(__file__).parent / "compile_kernels.py"


@pytest.mark.parametrize("capability", [80, 86, 89, 90])
def test_kernels_compile_for_gpus_that_are_not_here(capability) -> None:
    pytest.importorskip("triton", reason="Triton is not installed; it comes with PyTorch for CUDA")
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(COMPILE), str(capability)], env=plain, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    sizes = [int(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(sizes) == 37
    assert max(sizes) <= {80: 163, 86: 99, 89: 99, 90: 227}[capability] * 1024
