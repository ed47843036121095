"""How much text a model takes at once."""

from __future__ import annotations

import torch
from torch import nn

from koat.forest.root import take_root
from koat.forest.score import unwrap
from koat.model import find_context_length


def find_room(model: nn.Module) -> int | None:
    """Return how many tokens of text a model sees at once, its soft prompt left out; None where no limit is known."""
    length = find_context_length(unwrap(model).config)
    return length - count_root_tokens(model) if length else None


def count_root_tokens(model: nn.Module) -> int:
    """Return how many tokens of its context a model's soft prompt takes; 0 without one."""
    with torch.no_grad():
        root = take_root(model, 1)
    return root.num_tokens if root else 0
