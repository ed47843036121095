"""What every sequence of a micro-batch stands on: a soft prompt, as the root of all its trees.

Prompt tuning and P-tuning give embeddings, which go through the model as tokens at positions 0 .. n - 1; prefix
tuning gives keys and values, which every token sees. PEFT's own forward pass joins two-dimensional masks and
drops positions, so the prompt is taken from PEFT and the base model is called with it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from koat.core.soft_prompt import has_soft_prompt
from koat.forest.pack import MicroBatch


@dataclass(frozen=True, slots=True)
class Root:
    """A soft prompt of `num_tokens`: `embeddings [R, n, d]`, or a cache of keys and values for R rows."""

    num_tokens: int
    embeddings: Tensor | None = None
    cache: Any = None

    @property
    def num_cached(self) -> int:
        """How many keys there are beside those of the micro-batch's own tokens."""
        return 0 if self.cache is None else self.num_tokens


def has_cached_root(model: nn.Module) -> bool:
    """Whether a `PeftModel` carries keys and values (prefix tuning): there are then more keys than queries."""
    config: Any = getattr(model, "active_peft_config", None)
    return has_soft_prompt(model) and config.peft_type == "PREFIX_TUNING"


def take_root(model: nn.Module, num_rows: int) -> Root | None:
    """Return the soft prompt of a `PeftModel`, the same for every row; None for any other model. Differentiable."""
    if not has_soft_prompt(model):
        return None
    wrapper: Any = model
    num_tokens = int(wrapper.active_peft_config.num_virtual_tokens)
    prompt = wrapper.get_prompt(batch_size=num_rows)
    if isinstance(prompt, Tensor):
        return Root(num_tokens, embeddings=prompt)
    return Root(num_tokens, cache=prompt)


def stand_on(batch: MicroBatch, num_tokens: int, *, computed: bool) -> MicroBatch:
    """Return the micro-batch with a chain of `num_tokens` below all trees of each row, at positions 0 .. n - 1.

    With `computed` the chain goes through the model, and `source` counts it; else it is in a cache. `token_ids`
    stay without it.
    """
    num_rows, length = batch.position.shape
    source = shift_source(batch, num_tokens) if computed else batch.source
    chain = torch.arange(num_tokens, device=batch.position.device).expand(num_rows, num_tokens)
    position = torch.cat([chain, batch.position + num_tokens], 1)
    subtree_end = torch.cat([torch.full_like(chain, num_tokens + length), batch.subtree_end + num_tokens], 1)
    return replace(batch, position=position, subtree_end=subtree_end, source=source)


def shift_source(batch: MicroBatch, num_tokens: int) -> Tensor:
    """Return where predictions stand `[P]` once each row begins with `num_tokens` more tokens."""
    return batch.source + num_tokens * (batch.source // batch.position.shape[1] + 1)
