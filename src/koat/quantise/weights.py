"""What quantised layers store: which they are, what their weights stand for, and how many bytes they take.

NF4 and double quantisation: Dettmers et al. 2023 (QLoRA), section 3. 8 bit: Dettmers et al. 2022 (LLM.int8()).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

QUANTISED = frozenset({"Linear4bit", "Linear8bitLt"})
"""Class names of bitsandbytes' layers: telling them apart needs no import."""
LINEAR = frozenset({"Linear", "Conv1D"})
"""Class names of the layers that transformers has quantised; Conv1D (GPT-2) keeps its weight transposed."""
BLOCK = 64
"""Entries of a 4-bit weight that share a scale."""
OUTER_BLOCK = 256
"""Scales that share a scale under double quantisation."""


def list_quantised(model: nn.Module) -> dict[str, Any]:
    """Return a model's quantised layers by name, not the adapters around them that PEFT calls the same."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ in QUANTISED and type(module).__module__.startswith("bitsandbytes.")
    }


def read_linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return (inputs, outputs) of each layer that is quantised: all linear ones but the output head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    shapes = {}
    for name, module in model.named_modules():
        if module is not head and type(module).__name__ in LINEAR:
            out_in = module.weight.shape if type(module) is nn.Linear else module.weight.shape[::-1]
            shapes[name] = (int(out_in[1]), int(out_in[0]))
    return shapes


def count_entries(parameter: Tensor) -> int:
    """Return how many numbers a parameter stands for; 4-bit weights are stored two in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def count_weight_bytes(inputs: int, outputs: int, quantisation: str) -> int:
    """Return the bytes that a quantised weight of this shape takes with its scales and tables.

    8 bit: a byte an entry, a float32 scale a row. NF4: half a byte an entry and a float32 scale a block of 64;
    doubly quantised, the scales are bytes with a float32 scale per 256 of them, a table and an offset.
    """
    entries = inputs * outputs
    if quantisation == "8bit":
        return entries + 4 * outputs
    blocks, table = math.ceil(entries / BLOCK), 4 * 16
    packed = math.ceil(entries / 2) + table
    if quantisation == "nf4":
        return packed + 4 * blocks
    return packed + blocks + 4 * math.ceil(blocks / OUTER_BLOCK) + 4 * 256 + 4


def count_model_bytes(empty: nn.Module, quantisation: str, dtype: torch.dtype) -> int:
    """Return the bytes of a model's weights, from the model without weights; all but linear layers in `dtype`."""
    shapes = [] if quantisation == "none" else list(read_linear_shapes(empty).values())
    quantised = sum(count_weight_bytes(inputs, outputs, quantisation) for inputs, outputs in shapes)
    rest = sum(weight.numel() for weight in empty.parameters()) - sum(math.prod(shape) for shape in shapes)
    return quantised + rest * dtype.itemsize


@torch.no_grad()
def dequantise(layer: Any) -> Tensor:
    """Return a quantised layer's weight `[out, in]` in float32, by plain indexing and no kernel of bitsandbytes."""
    weight = layer.weight
    if type(layer).__name__ == "Linear8bitLt":
        scale: Tensor = layer.state.SCB if layer.state.SCB is not None else weight.SCB
        stored: Tensor = weight.data
        return stored.float() * (scale.float() / 127)[:, None]
    return dequantise_4bit(weight.data, weight.quant_state)


def dequantise_4bit(packed: Tensor, state: Any) -> Tensor:
    """Return the float32 values of a 4-bit tensor: two entries in a byte, high first, blocks over all rows."""
    packed = packed.view(torch.uint8).flatten()
    values: Tensor = state.code.float()[torch.stack((packed >> 4, packed & 15), -1).flatten().int()]
    scale = state.absmax
    if state.nested:
        outer = state.state2
        scale = _spread(outer.code.float()[scale.int()], outer.absmax.float(), outer.blocksize) + state.offset
    shape = tuple(state.shape)
    return _spread(values[: math.prod(shape)], scale.float(), state.blocksize).view(shape)


def _spread(values: Tensor, scale: Tensor, blocksize: int) -> Tensor:
    """Multiply each block of `values` by its entry of `scale`."""
    return values * scale.repeat_interleave(blocksize)[: len(values)]
