"""In the last layer only the tokens that predict something are worth computing beyond their keys and values.

Nothing looks at the others any more. The last layer's feed-forward block is run on the predicting tokens alone,
and walked attention leaves out the others' queries; with eight layers this is a tenth of a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from koat.forest.pack import Distinct

FEED_FORWARD = "mlp"
"""What transformers calls the feed-forward block of a layer, in nearly every family."""


def find_last_layer(causal: Any) -> nn.Module | None:
    """Return a causal model's last layer, None where its layers are not in one list of the expected length."""
    count = int(getattr(causal.config, "num_hidden_layers", 0))
    lists = (module for module in causal.base_model.modules() if isinstance(module, nn.ModuleList))
    return next((layers[-1] for layers in lists if count and len(layers) == count), None)


def draws_dropout(block: nn.Module) -> bool:
    """Whether a block throws something away at random as it stands."""
    return any(isinstance(module, nn.Dropout) and module.training and module.p > 0 for module in block.modules())


@contextmanager
def narrow_last_layer(causal: Any, source: Tensor, distinct: Distinct | None = None) -> Iterator[None]:
    """Within the block, the last feed-forward block computes the tokens `source [P]` alone, zero for all others.

    It does nothing where layers are computed again in the backward pass, which happens after the block, and
    nothing to a block that draws dropout, whose draws would be others.
    """
    block = getattr(find_last_layer(causal), FEED_FORWARD, None)
    if block is None or getattr(causal, "is_gradient_checkpointing", False) or draws_dropout(block):
        yield
        return
    rows = torch.unique(source) if distinct is None else source.index_select(0, distinct.first)
    shape: list[torch.Size] = []

    def select(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *others = inputs
        shape.append(hidden.shape)
        return (hidden.flatten(0, -2).index_select(0, rows)[None], *others)

    def spread(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        full = output.new_zeros(shape[-1]).flatten(0, -2)
        return full.index_copy(0, rows, output[0]).view(shape[-1])

    handles = block.register_forward_pre_hook(select), block.register_forward_hook(spread)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
