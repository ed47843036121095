"""How long training will take, estimated from this machine's rate of matrix products."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from koat.core.settings import TrainingSettings
from koat.model import build_empty
from koat.quantise.weights import read_linear_shapes
from koat.workflows.planning.memory import Base, Footprint

SECONDS = 2.0
SHAPES = {"cpu": (1024, 1024, 2048), "cuda": (4096, 8192, 8192)}
"""A product `[m, k] @ [k, n]`, of a size that a micro-batch and a layer make.

A GPU does the processor's in the time that a launch takes (6 us on a large one).
"""
REACHED = {torch.float32: 0.6}
OTHERWISE = 0.3
"""Share of that rate that training reaches on unique tokens: docs/benchmarks.md, by type, on a CPU.

Of a GPU one step is known (docs/benchmarks-gpu.md): 1.2 billion weights, 16,384 tokens and 448 ms are 177 TFLOP/s,
about a quarter of what an H200 reaches in bfloat16, random inputs drawn on the CPU included. So the same is said there.
"""


NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""What families call the number of their experts."""


@dataclass(frozen=True, slots=True)
class Pace:
    """An estimate of training's speed here."""

    matrix_rate: float
    """FLOPs a second of matrix products."""
    flops_per_token: float
    tokens_per_second: float


@torch.no_grad()
def measure_rate(dtype: torch.dtype, device: torch.device, seconds: float = SECONDS) -> float:
    """Return the median rate (FLOPs per second) of matrix products in about `seconds`."""
    rows, inner, columns = SHAPES[device.type]
    left = torch.ones(rows, inner, dtype=dtype, device=device)
    right = torch.ones(columns, inner, dtype=dtype, device=device)
    spent: list[float] = []
    stop = time.perf_counter() + seconds
    while len(spent) < 3 or time.perf_counter() < stop:
        began = time.perf_counter()
        torch.nn.functional.linear(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent.append(time.perf_counter() - began)
    return 2.0 * rows * inner * columns / sorted(spent)[len(spent) // 2]


def count_token_flops(num_frozen: int, num_trained: int, checkpointing: bool) -> float:
    """Return the FLOPs of a trained token, attention left out.

    A frozen parameter takes 2 forward and 2 for the activation's gradient, a trained one 2 more for its own;
    checkpointing computes the forward pass twice.
    """
    again = 2.0 if checkpointing else 0.0
    return (4.0 + again) * num_frozen + (6.0 + again) * num_trained


def count_active_experts(model: nn.Module, config: Any) -> int:
    """Return how many numbers of experts stored as one 3-D parameter a token meets."""
    stored = sum(weight.numel() for weight in model.parameters() if weight.dim() == 3)
    total = next((size for name in NUM_EXPERTS if (size := getattr(config, name, None))), 1)
    return stored * int(getattr(config, "num_experts_per_tok", None) or total) // int(total)


def estimate_pace(base: Base, footprint: Footprint, training: TrainingSettings) -> Pace:
    """Measure this machine for two seconds and estimate how many tokens it trains a second."""
    empty = build_empty(base.config)
    head = empty.get_output_embeddings().weight.numel()
    products = sum(inputs * outputs for inputs, outputs in read_linear_shapes(empty).values()) + head
    products += count_active_experts(empty, base.config)
    trained = footprint.adapter_bytes // 4
    frozen, trained = (products, trained) if footprint.frozen_bytes else (0, products)
    flops = count_token_flops(frozen, trained, training.activation_checkpointing)
    rate = measure_rate(base.compute, base.device)
    return Pace(rate, flops, REACHED.get(base.compute, OTHERWISE) * rate / flops)
