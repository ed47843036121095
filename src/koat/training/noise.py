"""NEFTune (Jain et al. 2023): uniform noise on the embeddings while training.

In a forest, siblings share one draw on their common prefix; each sequence's own distribution is unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from koat.forest.pack import MicroBatch
from koat.forest.score import unwrap


@contextmanager
def add_noise(model: nn.Module, alpha: float, batch: MicroBatch, lengths: list[int]) -> Iterator[None]:
    """Within the block, embeddings get noise of `alpha / sqrt(length * dimension)`.

    The length is the mean length of the sequences in a token's row; `lengths` holds every sequence's.
    """
    if alpha == 0:
        yield
        return
    mean = [sum(lengths[index] for index in row) / len(row) for row in batch.rows]

    def disturb(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        scale = alpha / (torch.tensor(mean, device=output.device) * output.shape[-1]).sqrt()
        noise = torch.empty_like(output).uniform_(-1, 1)
        return output + noise * scale[:, None, None].to(output.dtype)

    handle = unwrap(model).get_input_embeddings().register_forward_hook(disturb)
    try:
        yield
    finally:
        handle.remove()
