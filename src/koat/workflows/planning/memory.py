"""How much memory a run takes, component by component, as a function of its rows of tokens.

What a layer keeps is measured on the meta device (`koat.workflows.planning.simulate`) and is a polynomial in the depth
of the model (degree 1) and the length of a row (degree 2); here it is put together for a whole model.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from koat.adapters.soft_prompts import count_virtual_tokens
from koat.core.config import Section
from koat.core.settings import ModelSettings, TrainingSettings
from koat.forest.head import CHUNK_BYTES
from koat.forest.score import read_width
from koat.model import build_empty, load_config, pick_device, pick_dtype, pick_precision, settle_dtype
from koat.quantise.load import blocks_cross_rows, list_unsafe_layers
from koat.quantise.weights import count_model_bytes, count_weight_bytes, read_linear_shapes
from koat.training.optimizer import SMALLEST
from koat.workflows.planning.simulate import (
    Trace,
    build_probe,
    cut_depth,
    keeps_squares,
    pick_layout,
    set_checkpointing,
    trace_head,
    trace_layers,
)

LENGTHS = (128, 256, 384)
QUANTISED_BLOCK = 256
"""Moments of bitsandbytes' 8-bit optimizer that share a scale."""
FRACTIONS = {"8bit": 1.0, "nf4": 0.5, "nf4-double": 0.5}
"""Bytes of an entry, scales and tables apart."""


@dataclass(frozen=True, slots=True)
class Curve:
    """`constant + rows * (linear * L + square * L * L)`: bytes of rows of L tokens each."""

    constant: float
    linear: float
    square: float

    @classmethod
    def through(cls, values: Iterable[float]) -> Curve:
        """Return the curve of one row through its values at `LENGTHS`; a line through the first two alone."""
        first, second, *more = values
        third = more[0] if more else 2 * second - first
        step = LENGTHS[1] - LENGTHS[0]
        square = (third - 2 * second + first) / (2 * step * step)
        linear = (second - first) / step - square * (LENGTHS[0] + LENGTHS[1])
        return cls(first - linear * LENGTHS[0] - square * LENGTHS[0] ** 2, linear, square)

    def at(self, num_rows: float, length: float) -> float:
        """Return the bytes of `num_rows` rows."""
        return self.constant + num_rows * (self.linear * length + self.square * length * length)

    def extend(self, deeper: Curve, steps: float) -> Curve:
        """Return the curve `steps` times as far from this one as `deeper` is."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(deeper), strict=True)
        return Curve(*(near + steps * (far - near) for near, far in pairs))


@dataclass(frozen=True, slots=True)
class Base:
    """The frozen model: its configuration, how it is held, and its bytes."""

    config: Any
    settings: ModelSettings
    device: torch.device
    dtype: torch.dtype
    compute: torch.dtype
    """The type of its products: another than `dtype` under autocast."""
    num_parameters: int
    weight_bytes: int
    state_bytes: int
    """Those of the weights that are scales and tables of quantisation."""
    largest_bytes: int
    """The largest quantised weight, dequantised: one exists at a time."""
    cast_bytes: int
    """Weights in the type of the products, which autocast keeps until the backward pass is done."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """What one method on one base takes; curves are in tokens of a row, its soft prompt included."""

    base: Base
    frozen_bytes: int
    """Weights that are not trained; none of the base where all of it is."""
    adapter_bytes: int
    """What is trained."""
    gradient_bytes: int
    optimizer_bytes: int
    num_root: int
    """Tokens of the soft prompt in every row."""
    kept: Curve
    peak: Curve
    forward: Curve
    trace_head: Callable[[int], Trace]
    """From a number of rows to the bytes of the head for them."""
    head_rows: int
    """Rows of the head that exist at once."""
    squares: bool
    """Whether something grows with the square of a row's length."""

    @property
    def fixed_bytes(self) -> int:
        """Bytes that do not depend on tokens: weights and their casts, adapter, gradients, optimizer."""
        held = self.frozen_bytes + self.base.cast_bytes + self.adapter_bytes
        return held + self.gradient_bytes + self.optimizer_bytes

    def count_activations(self, num_rows: float, length: float) -> float:
        """Return the bytes kept from the layers' forward pass to their backward pass."""
        return self.kept.at(num_rows, length + self.num_root)

    def count_head(self, num_rows: float, length: float, training: bool = True) -> float:
        """Return the bytes of the head while it works, if every token is predicted."""
        tokens = num_rows * length
        states = 2 * read_width(self.base.config) * self.base.compute.itemsize * tokens
        trace = self.trace_head(min(math.ceil(tokens), self.head_rows))
        return states + (trace.peak if training else trace.forward)

    def count_workspace(self, num_rows: float, length: float) -> float:
        """Return what the layers' backward pass needs on top of what was kept, the recomputed layer included."""
        tokens = length + self.num_root
        return self.peak.at(num_rows, tokens) - self.kept.at(num_rows, tokens) + self.base.largest_bytes

    def train_peak(self, num_rows: float, length: float) -> float:
        """Return the peak while training: the head comes first, the layers after it."""
        above = max(self.count_head(num_rows, length), self.count_workspace(num_rows, length))
        return self.fixed_bytes + self.count_activations(num_rows, length) + above

    def evaluate_peak(self, num_rows: float, length: float) -> float:
        """Return the peak while scoring: no gradients, no optimizer."""
        layers = self.forward.at(num_rows, length + self.num_root) + self.base.largest_bytes
        head = self.count_head(num_rows, length, training=False)
        return self.frozen_bytes + self.adapter_bytes + max(layers, head)

    def count_disk(self, training: TrainingSettings) -> int:
        """Return the bytes of the adapter and its checkpoints, the one being written included."""
        held = self.adapter_bytes * (2 if training.keep == "best" else 1) + self.optimizer_bytes
        return self.adapter_bytes + (training.keep_checkpoints + 1) * held


def measure_base(model: ModelSettings, training: TrainingSettings, config: Any = None) -> Base:
    """Count a base model's weights from its configuration. Raises ModelError where no layer can be quantised here."""
    settings = settle_dtype(model, training)
    config = load_config(model) if config is None else config
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device, settings.quantisation)
    empty = build_empty(config)
    quantisation = settings.quantisation
    shapes = {} if quantisation == "none" else read_linear_shapes(empty)
    for name in list_unquantised(empty, settings, device):
        shapes.pop(name, None)
    total = count_model_bytes(empty, "none", dtype)
    compute = pick_precision(training, device) if dtype == torch.float32 else dtype
    products = sum(inputs * outputs for inputs, outputs in read_linear_shapes(empty).values())
    entries = {name: inputs * outputs for name, (inputs, outputs) in shapes.items()}
    quantised = sum(count_weight_bytes(*shape, quantisation) for shape in shapes.values())
    num_quantised = sum(entries.values())
    return Base(
        config, settings, device, dtype, compute,
        num_parameters=sum(weight.numel() for weight in empty.parameters()),
        weight_bytes=total - num_quantised * dtype.itemsize + quantised,
        state_bytes=quantised - int(num_quantised * FRACTIONS.get(quantisation, 0)),
        largest_bytes=max(entries.values(), default=0) * dtype.itemsize,
        cast_bytes=0 if compute == dtype else products * compute.itemsize,
    )  # fmt: skip


def list_unquantised(empty: nn.Module, settings: ModelSettings, device: torch.device) -> list[str]:
    """Return the layers that loading keeps from a 4-bit kernel that is wrong on this processor."""
    four_bit = settings.quantisation not in ("none", "8bit")
    known = importlib.util.find_spec("bitsandbytes") is not None
    if not four_bit or device.type != "cpu" or not known or blocks_cross_rows():
        return []
    return list_unsafe_layers(empty, settings.quantisation)


def measure_footprint(base: Base, adapter: Section, training: TrainingSettings) -> Footprint:
    """Measure what a method takes on a base. Raises AdapterError where it does not go with the family."""
    configs, steps = list_probes(base.config, adapter)
    probes = [build_probe(config, adapter, base.compute) for config in configs]
    layout = pick_layout(probes[0], base.settings, base.device)
    lengths = LENGTHS if keeps_squares(layout) else LENGTHS[:2]
    traces: list[list[Trace]] = []
    for probe in probes:
        set_checkpointing(probe, training.activation_checkpointing, training.activation_offload)
        traces.append([trace_layers(probe, layout, length) for length in lengths])

    def assemble(name: str) -> Curve:
        curves = [Curve.through(getattr(trace, name) for trace in each) for each in traces]
        # Without gradients a layer leaves nothing behind for the next.
        return curves[0] if name == "forward" else curves[0].extend(curves[-1], steps)

    sizes = [[weight.numel() for weight in probe.parameters() if weight.requires_grad] for probe in probes]
    sums = [(sum(each) * 4, count_optimizer_bytes(each, training.optimizer)) for each in sizes]
    adapter_bytes, optimizer_bytes = (
        round(near + steps * (far - near)) for near, far in zip(sums[0], sums[-1], strict=True)
    )
    frozen_bytes = base.weight_bytes if any(not weight.requires_grad for weight in probes[0].parameters()) else 0
    return Footprint(
        base, frozen_bytes, adapter_bytes, adapter_bytes, optimizer_bytes,
        num_root=count_virtual_tokens(adapter),
        kept=assemble("kept"), peak=assemble("peak"), forward=assemble("forward"),
        trace_head=functools.cache(functools.partial(trace_head, probes[0])),
        head_rows=max(1, CHUNK_BYTES // (4 * int(base.config.vocab_size))),
        squares=keeps_squares(layout),
    )  # fmt: skip


def list_probes(config: Any, adapter: Section) -> tuple[list[Any], float]:
    """Return the configurations to measure, and how many times their difference leads on to the whole model.

    One period of layers and two; where targets name single layers, layers are not alike, and all are measured.
    """
    targets = getattr(adapter, "targets", None)
    if isinstance(targets, list) and any(part.isdigit() for name in targets for part in name.split(".")):
        return [config], 0.0
    near, far = (cut_depth(config, periods) for periods in (1, 2))
    return [near, far], int(config.num_hidden_layers) / int(near.num_hidden_layers) - 1


def count_optimizer_bytes(sizes: Iterable[int], optimizer: str) -> int:
    """Return the bytes of an optimizer's two moments for tensors of these numbers of entries.

    8 bit: Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization": a byte a moment, a float32 scale
    for each block of 256; small tensors stay in 32 bit.
    """
    if optimizer != "adamw-8bit":
        return 8 * sum(sizes)
    return sum(2 * (size + 4 * -(-size // QUANTISED_BLOCK)) if size >= SMALLEST else 8 * size for size in sizes)
