"""koat's own attention in the form that transformers calls: what walked and tree attention have in common."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from koat.forest.attend import make_visible

NAMES = {"walk": "koat_walk", "tree": "koat_tree"}
"""Under which names transformers finds the kernels."""
UNKNOWN = ("softcap", "s_aux", "position_bias")
"""What some families add to attention and these kernels do not compute; `koat.forest.verify` then takes another."""


class Trees(Protocol):
    """The trees of a micro-batch, and attention over them: `koat.forest.walk.Walk` or `koat.forest.tree.Tree`."""

    name: ClassVar[str]

    @property
    def position(self) -> Tensor:
        """Positions `[R, L]`."""

    @property
    def subtree_end(self) -> Tensor:
        """Where each token's subtree ends, `[R, L]`."""

    @property
    def num_cached(self) -> int:
        """How many of the L tokens ask nothing, the first ones: their keys and values come from a cache."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, window: int | None, scaling: float, layer: int | None
    ) -> Tensor:
        """Return the attention of `query [R, H, L - n, D]` to `key`, `value` `[R, G, L, D]`, as `[R, L - n, H, D]`."""


def attend_trees(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    trees: Trees | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention over trees.

    Without `trees`, or with dropout on attention (of which `koat.forest.verify` knows beforehand), it is transformers'
    own SDPA. Raises NotImplementedError for what the kernels do not compute: caps, sinks, biases.
    """
    if trees is None or dropout:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        mask = attention_mask
        if trees is not None:
            mask = make_visible(trees.position, trees.subtree_end, sliding_window)[:, :, trees.num_cached :]
        return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, **kwargs)
    unknown = [name for name in UNKNOWN if kwargs.get(name) is not None]
    if unknown:
        raise NotImplementedError(f"{trees.name} attention knows no {', '.join(unknown)}")
    device = "cpu" if query.is_meta else query.device.type  # shapes alone stand for a processor's numbers
    if torch.is_autocast_enabled(device):
        query, key, value = (heads.to(torch.get_autocast_dtype(device)) for heads in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    return trees.attend(query, key, value, sliding_window, scale, getattr(module, "layer_idx", None)), None


@cache
def register(name: str) -> None:
    """Make this attention known to transformers; masks that a model makes itself are SDPA's."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(name, attend_trees)
    AttentionMaskInterface.register(name, sdpa_mask)
