"""Turn a quantised model into a plain one of the same values, and say what quantising it again would change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from koat.quantise.load import import_bitsandbytes
from koat.quantise.weights import dequantise, dequantise_4bit, list_quantised


@dataclass(frozen=True, slots=True)
class QuantisedLayer:
    """How a linear layer was quantised, so that it can be quantised the same way again."""

    name: str
    bits: int
    kind: str = "int8"
    """`nf4` or `fp4` in 4 bit."""
    block_size: int = 0
    is_nested: bool = False
    """The blocks' scales are quantised as well."""


def describe_quantised(model: nn.Module) -> list[QuantisedLayer]:
    """Return how each of a model's quantised layers is quantised, in order."""
    found = []
    for name, module in list_quantised(model).items():
        state = getattr(module.weight, "quant_state", None)
        if state is None:
            found.append(QuantisedLayer(name, 8))
        else:
            found.append(QuantisedLayer(name, 4, state.quant_type, state.blocksize, bool(state.nested)))
    return found


@torch.no_grad()
def dequantise_model(model: Any, plain: nn.Module) -> list[QuantisedLayer]:
    """Replace a model's quantised layers by float32 ones of the same values, in place.

    `plain` is the model as it was before, without weights: its layers say of which class they were. Returns how
    they were quantised; nothing is touched when there are none. Call it before an adapter is attached.
    """
    layers = describe_quantised(model)
    for layer in layers:
        quantised, fresh = model.get_submodule(layer.name), plain.get_submodule(layer.name)
        weight = dequantise(quantised)
        # Conv1D (GPT-2) keeps its weight transposed.
        own: Any = weight if isinstance(fresh, nn.Linear) else weight.t().contiguous()
        fresh.weight = nn.Parameter(own, requires_grad=False)
        if quantised.bias is not None:
            fresh.bias = nn.Parameter(quantised.bias.detach().float(), requires_grad=False)
        model.set_submodule(layer.name, fresh)
    if layers:
        _forget_quantisation(model)
    return layers


@torch.no_grad()
def requantise_weights(model: nn.Module, layers: list[QuantisedLayer]) -> None:
    """Give each of these layers the values that it would have if it were quantised again, still in float32.

    This is the weights' part of the loss: an 8-bit layer also rounds its activations when it runs.
    """
    functional = import_bitsandbytes("Quantising again", "no --requantise").functional
    for layer in layers:
        module = model.get_submodule(layer.name)
        weight: Tensor = module.weight  # type: ignore[assignment]
        out_in = weight if isinstance(module, nn.Linear) else weight.t()
        rounded = _round_8bit(out_in) if layer.bits == 8 else _round_4bit(out_in.contiguous(), layer, functional)
        out_in.copy_(rounded)


def _round_4bit(weight: Tensor, layer: QuantisedLayer, functional: Any) -> Tensor:
    codes, state = functional.quantize_4bit(
        weight, blocksize=layer.block_size, compress_statistics=layer.is_nested, quant_type=layer.kind
    )
    return dequantise_4bit(codes, state)


def _round_8bit(weight: Tensor) -> Tensor:
    """Round each row to whole steps of a 127th of its largest entry, as LLM.int8() stores it."""
    step = weight.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (weight / step).round() * step


def _forget_quantisation(model: Any) -> None:
    """Make transformers treat a dequantised model as one that never was quantised."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized"):
        if hasattr(model, name):
            setattr(model, name, False)
    for name in ("hf_quantizer", "quantization_method"):
        model.__dict__.pop(name, None)
