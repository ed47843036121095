"""The bytes that a layer keeps for its backward pass, counted: the same on every machine."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from koat.forest.score import unwrap

DEPTHS = (2, 4)
LENGTH = 128


def count_kept_bytes(model: nn.Module, run: Callable[[], Any]) -> int:
    """Return the bytes of the distinct storages that autograd keeps while `run` runs, weights and adapter left out.

    A view keeps the whole storage it looks at; one that several operators keep counts once.
    """
    own = {tensor.untyped_storage()._cdata for tensor in itertools.chain(model.parameters(), model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    # `result` keeps the graph, and with it the storages, alive until all are counted.
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del result
    return total


def draw_inputs(model: Any, length: int = LENGTH, rows: int = 1) -> Tensor:
    """Return random numbers `[rows, length, d]` in the place of embedded tokens, in a model's own type."""
    causal = unwrap(model)
    drawn = torch.randn(rows, length, causal.config.hidden_size, generator=torch.Generator().manual_seed(0))
    return drawn.to(causal.device, causal.dtype)


def run_layers(model: Any, inputs: Tensor, *, autocast: bool = False) -> Tensor:
    """Run a causal model's layers on `inputs [R, L, d]`, which want a gradient here; return hidden states `[R, L, d]`.

    With such inputs every layer, the first as well, has activation gradients to compute, whatever is trained.
    """
    causal, inputs = unwrap(model), inputs.detach().requires_grad_()
    with torch.autocast(causal.device.type, torch.bfloat16, enabled=autocast):
        hidden: Tensor = causal.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
    return hidden


def measure_layer(build: Callable[[int], Any], length: int = LENGTH, *, autocast: bool = False) -> float:
    """Return the bytes per token that one more layer keeps; `build` makes a model of a number of layers."""
    counted = []
    for depth in DEPTHS:
        model = build(depth)
        run = functools.partial(run_layers, model, draw_inputs(model, length), autocast=autocast)
        counted.append(count_kept_bytes(model, run))
    return (counted[1] - counted[0]) / (DEPTHS[1] - DEPTHS[0]) / length
