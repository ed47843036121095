"""Attention over a forest on a GPU: which blocks of queries and keys have to do with one another, made once.

The kernels (`koat.forest.tree_kernels`) want Triton, which comes with PyTorch for CUDA. Where it is not there, dense
masks stand in (`koat.forest.kernels`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from koat.core.differences import find_largest
from koat.forest.attend import make_visible


@dataclass(frozen=True, slots=True)
class Blocks:
    """Which blocks see which: for each of Q blocks of queries its `num_keys [R, Q]` first in `keys [R, Q, K]`, and for
    each of K blocks of keys its `num_queries [R, K]` first in `queries [R, K, Q]`, all 32-bit integers."""

    num_keys: Tensor
    keys: Tensor
    num_queries: Tensor
    queries: Tensor


@dataclass(frozen=True)
class Tree:
    """The trees of a micro-batch, `position` and `subtree_end` `[R, K]`; the last K - n of the K tokens ask.

    The first n, `num_cached`, ask nothing: their keys and values come from a cache.
    """

    name: ClassVar[str] = "tree"
    position: Tensor
    subtree_end: Tensor
    num_cached: int = 0
    made: dict[tuple[int | None, int, int], Blocks] = field(default_factory=dict)

    @classmethod
    def plant(cls, position: Tensor, subtree_end: Tensor, num_cached: int = 0) -> Tree:
        """Return the trees in the form that the kernels read."""
        return cls(position.to(torch.int32).contiguous(), subtree_end.to(torch.int32).contiguous(), num_cached)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, window: int | None, scaling: float, layer: int | None
    ) -> Tensor:
        """Run the kernels, the same in every layer. Raises NotImplementedError for heads that they do not know."""
        from koat.forest.tree_kernels import TreeAttention

        output: Tensor = TreeAttention.apply(query, key, value, self, window, scaling)  # type: ignore[no-untyped-call]
        return output

    def list_blocks(self, window: int | None, num_queries: int, num_keys: int) -> Blocks:
        """Return the blocks, of `num_queries` and `num_keys` tokens, that see something under a sliding window."""
        key = (window, num_queries, num_keys)
        if key not in self.made:
            seen = self.find_seen(window, num_queries, num_keys)
            self.made[key] = Blocks(*_list_marked(seen), *_list_marked(seen.transpose(1, 2)))
        return self.made[key]

    def find_seen(self, window: int | None, num_queries: int, num_keys: int) -> Tensor:
        """Return a boolean `[R, Q, K]`: some query of the block may see some key of the other.

        A block of keys is out of sight when its greatest `subtree_end` does not reach the first query, or when the
        nearest of its positions is a window away.
        """
        length, device = self.position.shape[1], self.position.device
        first = torch.arange(self.num_cached, length, num_queries, device=device)
        last = (first + num_queries - 1).clamp(max=length - 1)
        keys = torch.arange(0, length, num_keys, device=device)
        reach = _cut(self.subtree_end, num_keys, 0).amax(-1)
        seen = (keys[None, None, :] <= last[None, :, None]) & (reach[:, None, :] > first[None, :, None])
        if window is not None:
            far = torch.iinfo(torch.int32).max // 2
            nearest = _cut(self.position[:, self.num_cached :], num_queries, far).amin(-1)
            furthest = _cut(self.position, num_keys, -far).amax(-1)
            seen &= nearest[:, :, None] - furthest[:, None, :] < window
        return seen


def _cut(values: Tensor, size: int, filling: int) -> Tensor:
    """Cut `[R, L]` into blocks `[R, B, size]`."""
    padded = F.pad(values, (0, -values.shape[1] % size), value=filling)
    return padded.view(len(values), -1, size)


def _list_marked(marks: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many of the last dimension are marked, and their places, those first: `[R, Q]`, `[R, Q, K]`."""
    places = marks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return marks.sum(-1, dtype=torch.int32).contiguous(), places.to(torch.int32).contiguous()


def measure_tree(width: int, dtype: torch.dtype, device: torch.device, window: int | None = None) -> float:
    """Return the largest relative difference of tree attention, its gradients included, from the formula in float32.

    On random heads of a width over one small tree: what a machine compiled is not what its neighbour did.
    """
    branches = torch.arange(70, 110)
    position = torch.cat([torch.arange(70), branches, branches])[None].to(device)
    ends = torch.tensor([150] * 70 + [110] * 40 + [150] * 40, device=device)[None]
    generator, scale = torch.Generator().manual_seed(0), width**-0.5
    drawn = (torch.randn(1, count, 150, width, generator=generator) for count in (2, 1, 1, 2))
    query, key, value, upstream = (heads.to(device, dtype) for heads in drawn)

    def run(compute: Callable[..., Tensor], heads: list[Tensor]) -> list[Tensor]:
        with torch.enable_grad():
            leaves = [each.detach().requires_grad_() for each in heads]
            found = compute(*leaves)
            gradient = upstream.transpose(1, 2).to(found.dtype)
            return [found.detach(), *torch.autograd.grad(found, leaves, gradient)]

    def attend_densely(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        hidden = ~make_visible(position, ends, window)
        scores = (query @ key.transpose(-1, -2) * scale).masked_fill(hidden, -torch.inf)
        dense: Tensor = (scores.softmax(-1) @ value).transpose(1, 2)
        return dense

    tree = Tree.plant(position, ends)
    mine = run(lambda q, k, v: tree.attend(q, k, v, window, scale, None), [query, key, value])
    exact = run(attend_densely, [query.float(), key.float(), value.float()])
    return find_largest(float((a.float() - b).norm() / b.norm()) for a, b in zip(mine, exact, strict=True))


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None
