"""Where a GPU's own kernels for IA3 and RMS norms (`koat.adapters.fused_kernels`) serve; elsewhere PyTorch's do."""

from __future__ import annotations

import functools
import logging
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from koat.core.differences import find_largest
from koat.core.out_of_memory import is_out_of_memory

TYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Types of activations that the kernels compute with."""
TOLERANCE = 0.02
"""Largest relative difference from the formulas: what rounding does in the shortest type is a tenth of it."""
log = logging.getLogger(__name__)


def find_fused(activation: Tensor) -> ModuleType | None:
    """Return the kernels if they serve: on a GPU, for a usual type, with a Triton that compiles them rightly."""
    serves = activation.device.type == "cuda" and activation.dtype in TYPES
    return _load_kernels(activation.device, activation.dtype) if serves else None


@functools.cache
def _load_kernels(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    try:
        from koat.adapters import fused_kernels

        difference = measure_kernels(fused_kernels, device, dtype)
    except Exception as error:  # no Triton, or no C compiler for it
        if is_out_of_memory(error):
            raise
        log.warning("IA3 and norms run on PyTorch's kernels, which take longer: %s: %s", type(error).__name__, error)
        return None
    if not difference <= TOLERANCE:
        log.warning("IA3 and norms run on PyTorch's kernels: those compiled here are off by %.2g.", difference)
        return None
    return fused_kernels


@torch.no_grad()
def measure_kernels(kernels: Any, device: torch.device, dtype: torch.dtype) -> float:
    """Return the largest relative difference of a gated product, its gradients and a norm's from their formulas."""
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(70, 300, generator=generator).to(device, dtype) for _ in range(3))
    gate, up, gradient = drawn
    vector = 1 + 0.3 * torch.randn(300, generator=generator).to(device)
    found = [
        kernels.rescale(gate, vector, "silu", up),
        *kernels.pull_back(gradient, gate, vector, "silu", up),
        kernels.pull_back_norm(gradient, gate, vector, 0.0, 1e-6),
    ]
    with torch.enable_grad():
        leaves = [tensor.detach().float().requires_grad_() for tensor in (gate, up, vector)]
        product = F.silu(leaves[0]) * leaves[1] * leaves[2]
        normed = leaves[0] * (leaves[0].square().mean(-1, keepdim=True) + 1e-6).rsqrt() * vector
        wanted = [product, *torch.autograd.grad(product, leaves, gradient.float())]
        wanted += torch.autograd.grad(normed, leaves[:1], gradient.float())
    return find_largest(float((a.float() - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))
