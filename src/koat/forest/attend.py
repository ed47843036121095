"""Render "who sees whom" of a forest in the form that a model's attention takes.

Token `q` may attend to token `k` exactly when `k` is `q` or an ancestor of `q`:

    visible(q, k)  =  k <= q < subtree_end[k]

With a sliding window of W, also `position[q] - position[k] < W`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Kernel = Literal["walk", "tree", "sdpa", "eager", "flex"]
MASKLESS = ("walk", "tree")
"""Kernels that are given the trees themselves."""
FLEX_BLOCK = 128


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """How masks are rendered for one model.

    `windows` maps each layer type to its window (None: unlimited). With `by_type` the model takes a mapping
    from layer type to mask, otherwise one mask for all layers.
    """

    kernel: Kernel
    windows: tuple[tuple[str, int | None], ...] = (("full_attention", None),)
    by_type: bool = False


def find_windows(config: Any) -> dict[str, int | None]:
    """Return each layer type of a model configuration with its sliding window."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if not types:
        return {"full_attention": window}
    return {kind: None if kind == "full_attention" else window for kind in dict.fromkeys(types)}


def render_mask(
    plan: AttentionPlan, position: Tensor, subtree_end: Tensor, dtype: torch.dtype, num_cached: int = 0
) -> Any:
    """Render the attention mask of a micro-batch (`position`, `subtree_end`: `[R, L]`) for a model.

    The first `num_cached` of the L tokens are keys in a cache and ask nothing: masks are then `[R, 1, L - n, L]`.

    Returns what the model's `attention_mask` takes: a boolean `[R, 1, L, L]` for SDPA, an additive one of
    `dtype` for eager attention, a `BlockMask` for FlexAttention, or a mapping from layer type to one of them.
    Walked and tree attention read no mask; an empty one `[R, 1, 1, L]` keeps the model from making its own.
    """
    rendered: dict[int | None, Any] = {}
    for _, window in plan.windows:
        if window not in rendered:
            mask = _render_one(plan.kernel, position, subtree_end, window, dtype)
            rendered[window] = mask[:, :, num_cached:] if num_cached and plan.kernel not in MASKLESS else mask
    if plan.by_type:
        return {kind: rendered[window] for kind, window in plan.windows}
    return rendered[plan.windows[0][1]]


def _render_one(kernel: Kernel, position: Tensor, subtree_end: Tensor, window: int | None, dtype: torch.dtype) -> Any:
    if kernel == "flex":
        return make_block_mask(position, subtree_end, window)
    if kernel in MASKLESS:
        return torch.ones_like(position, dtype=torch.bool)[:, None, None]
    visible = make_visible(position, subtree_end, window)
    if kernel == "sdpa":
        return visible
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, torch.finfo(dtype).min)


def make_visible(position: Tensor, subtree_end: Tensor, window: int | None = None) -> Tensor:
    """Return the boolean `[R, 1, L, L]` mask: query (row) sees key (column)."""
    index = torch.arange(position.shape[1], device=position.device)
    query, key = index[None, :, None], index[None, None, :]
    visible = (key <= query) & (query < subtree_end[:, None, :])
    if window is not None:
        visible &= position[:, :, None] - position[:, None, :] < window
    return visible[:, None]


def make_block_mask(position: Tensor, subtree_end: Tensor, window: int | None = None) -> Any:
    """Return a FlexAttention `BlockMask` without ever making an `[L, L]` array.

    A block of keys matters to a block of queries when its greatest `subtree_end` reaches past the first
    query; it is wholly visible when its least `subtree_end` reaches past the last query. Positions bound
    what a window could hide: where one is set, no block is called wholly visible.
    """
    from torch.nn.attention.flex_attention import BlockMask

    num_rows, length = position.shape
    num_blocks = -(-length // FLEX_BLOCK)
    padded = num_blocks * FLEX_BLOCK
    ends = torch.nn.functional.pad(subtree_end, (0, padded - length))
    blocks = ends.view(num_rows, num_blocks, FLEX_BLOCK)
    greatest, least = blocks.amax(-1), blocks.amin(-1)
    first = torch.arange(num_blocks, device=position.device) * FLEX_BLOCK
    last = first + FLEX_BLOCK - 1
    below = first[None, :, None] > last[None, None, :]
    diagonal = torch.eye(num_blocks, dtype=torch.bool, device=position.device)[None]
    full = below & (least[:, None, :] > last[None, :, None])
    if window is not None:
        full = torch.zeros_like(full)
    partial = ((below & (greatest[:, None, :] > first[None, :, None])) | diagonal) & ~full

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (key <= query) & (query < subtree_end[row, key])
        if window is not None:
            seen = seen & (position[row, query] - position[row, key] < window)
        return seen

    return BlockMask.from_kv_blocks(
        *_list_blocks(partial),
        *_list_blocks(full),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=visible,
        seq_lengths=(length, length),
    )


def _list_blocks(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Turn a boolean `[R, Q, K]` of blocks into FlexAttention's (count, indices) form, one head."""
    count = wanted.sum(-1, dtype=torch.int32)
    indices = wanted.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return count[:, None], indices[:, None]
