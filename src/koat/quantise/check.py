"""Whether quantised layers compute what they store: a start-up check against a plain product.

A wrong kernel trains without complaint and comes out a little worse; here it is an error.
"""

from __future__ import annotations

import importlib.metadata
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from koat.core.errors import ModelError
from koat.quantise.weights import dequantise, list_quantised

PROBE_ROWS = (1, 33)
"""Rows of the probes: one row and several go through different kernels on a GPU."""
PROBE_OUTLIER = 20.0
"""Planted in some columns: LLM.int8() takes columns above its threshold out of the 8-bit product."""


@dataclass(frozen=True, slots=True)
class QuantisedCheck:
    """What the start-up check of quantised layers tried and found: goes into the manifest of a run."""

    layers: tuple[str, ...]
    kernels: dict[str, str]
    """bitsandbytes' function by mode; 8-bit layers train and evaluate by different ones on a CPU."""
    library: str
    versions: dict[str, str]
    difference: float
    """The relative difference to the product with the dequantised weight where it came nearest to the bound."""
    allowed: float
    """What rounding explains there."""

    def to_mapping(self) -> dict[str, Any]:
        """Return a JSON-safe mapping."""
        return {**asdict(self), "layers": list(self.layers)}


@dataclass(frozen=True, slots=True)
class Comparison:
    """One output of one layer against its dequantised product, relative to the product's size."""

    what: str
    difference: float
    allowed: float


def check_quantised_layers(model: nn.Module, seed: int = 0) -> QuantisedCheck | None:
    """Compare some quantised layers with the product of their dequantised weights; None if there are none.

    One layer of each name, spread over the depth, in training and in evaluation, and the gradients that it
    sends back. Raises ModelError for a layer that is further off than rounding explains.
    """
    layers = list_quantised(model)
    chosen = choose_layers(list(layers))
    if not chosen:
        return None
    dtype = next(weight.dtype for weight in model.parameters() if weight.is_floating_point())
    found, kernels = list[Comparison](), dict[str, str]()
    for name in chosen:
        comparisons, kernels = compare_layer(layers[name], dtype, seed)
        for one in comparisons:
            if not one.difference <= one.allowed:
                raise ModelError(
                    f"The quantised layer {name} does not compute what it stores: its {one.what} differs from the "
                    f"product with the dequantised weight by {one.difference:.2g} of its size; rounding explains "
                    f"{one.allowed:.2g} (bitsandbytes {importlib.metadata.version('bitsandbytes')}, "
                    f"{name_library()}). Install another version of bitsandbytes, or set model.quantisation=none."
                )
        found += comparisons
    worst = max(found, key=lambda one: one.difference / one.allowed)
    versions = {name: importlib.metadata.version(name) for name in ("bitsandbytes", "torch", "transformers")}
    return QuantisedCheck(tuple(chosen), kernels, name_library(), versions, worst.difference, worst.allowed)


def choose_layers(names: list[str]) -> list[str]:
    """Return one layer of each name (layer numbers apart), spread over the model's depth."""
    by_role: dict[str, list[str]] = {}
    for name in names:
        by_role.setdefault(".".join(part for part in name.split(".") if not part.isdigit()), []).append(name)
    roles = list(by_role.values())
    return [role[number * len(role) // len(roles)] for number, role in enumerate(roles)]


def compare_layer(layer: Any, dtype: torch.dtype, seed: int) -> tuple[list[Comparison], dict[str, str]]:
    """Return outputs and gradients of a layer fed in `dtype` against the dequantised product, and its kernels."""
    weight, was_training = dequantise(layer), layer.training
    generator = torch.Generator().manual_seed(seed)
    comparisons, kernels = [], dict[str, str]()
    for num_rows in PROBE_ROWS:
        x = torch.randn(1, num_rows, weight.shape[1], generator=generator)
        x[..., :: max(8, weight.shape[1] // 3)] *= PROBE_OUTLIER
        x = x.to(weight.device, dtype)
        gradient = torch.randn(1, num_rows, weight.shape[0], generator=generator).to(weight.device, dtype)
        for mode in ("training", "evaluation"):
            layer.train(mode == "training")
            given = x.clone().requires_grad_()
            with torch.enable_grad():
                output = layer(given)
            kernels[mode] = type(output.grad_fn).__name__.removesuffix("Backward")
            (returned,) = torch.autograd.grad(output, given, gradient, allow_unused=True)
            with torch.no_grad():
                plain = layer(x)
            allowed = estimate_output_rounding(layer, x, weight, kernels[mode])
            expected = _multiply(x, weight, layer.bias)
            comparisons += [
                _compare(f"output in {mode}", output, expected, allowed),
                _compare(f"output in {mode} without gradients", plain, expected, allowed),
                _compare(f"gradient in {mode}", returned, gradient.float() @ weight, round_product(dtype, weight)),
            ]
    layer.train(was_training)
    return comparisons, kernels


def round_product(dtype: torch.dtype, weight: Tensor) -> float:
    """Return the relative difference that rounding and order explain in a product with `weight` `[out, in]`."""
    order = math.sqrt(max(weight.shape)) * torch.finfo(torch.float32).eps
    return 2 * torch.finfo(dtype).eps + 4 * order


def estimate_output_rounding(layer: Any, x: Tensor, weight: Tensor, kernel: str) -> float:
    """Return the relative difference that rounding explains in a layer's output for `x` `[1, rows, in]`.

    LLM.int8() also rounds each row of activations to whole steps of a 127th of its largest entry below the
    threshold. Errors are uniform, so a whole step stands for 3.5 standard deviations.
    """
    allowed = round_product(x.dtype, weight)
    if kernel != "MatMul8bitLt":
        return allowed
    threshold = layer.state.threshold or math.inf
    inner = x.float().abs()
    step = inner.masked_fill(inner >= threshold, 0.0).amax(-1) / 127
    noise = float(step.norm() * weight.norm()) / float(_multiply(x, weight, layer.bias).norm())
    return allowed + noise + 2 * torch.finfo(torch.float16).eps


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product = x.float() @ weight.t()
    return product if bias is None else product + bias.float()


def _compare(what: str, found: Tensor | None, expected: Tensor, allowed: float) -> Comparison:
    if found is None:
        return Comparison(what, math.inf, allowed)
    return Comparison(what, float((found.detach().float() - expected).norm() / expected.norm()), allowed)


def name_library() -> str:
    """Return the file name of the native library that bitsandbytes loaded."""
    from bitsandbytes.cextension import lib

    return Path(str(getattr(getattr(lib, "_lib", None), "_name", "none"))).name
