"""Where a GPU's own kernels serve, for IA3 (`fused_kernels`) and for what is frozen around it (`frozen_kernels`).

Elsewhere PyTorch's do.
"""

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
    """Return IA3's kernels if they serve: on a GPU, for a usual type, with a Triton that compiles them rightly."""
    return _find_kernels(activation)[0]


def find_frozen(activation: Tensor) -> ModuleType | None:
    """Return the kernels of what is frozen, where IA3's serve."""
    return _find_kernels(activation)[1]


def _find_kernels(activation: Tensor) -> tuple[ModuleType, ModuleType] | tuple[None, None]:
    serves = activation.device.type == "cuda" and activation.dtype in TYPES
    return _load_kernels(activation.device, activation.dtype) if serves else (None, None)


@functools.cache
def _load_kernels(device: torch.device, dtype: torch.dtype) -> tuple[ModuleType, ModuleType] | tuple[None, None]:
    try:
        from koat.adapters import frozen_kernels, fused_kernels

        difference = measure_kernels(fused_kernels, frozen_kernels, device, dtype)
    except Exception as error:  # no Triton, or no C compiler for it
        if is_out_of_memory(error):
            raise
        log.warning("Adapters run on PyTorch's kernels, which take longer: %s: %s", type(error).__name__, error)
        return None, None
    if not difference <= TOLERANCE:
        log.warning("Adapters run on PyTorch's kernels: those compiled here are off by %.2g.", difference)
        return None, None
    return fused_kernels, frozen_kernels


@torch.inference_mode(False)
@torch.no_grad()
def measure_kernels(fused: Any, frozen: Any, device: torch.device, dtype: torch.dtype) -> float:
    """Return the largest relative difference of what the kernels compute from the formulas.

    It may be asked for in the middle of a layer whose activations are checkpointed: what is kept here is none of them.
    """
    generator = torch.Generator().manual_seed(0)
    gate, up, gradient = (torch.randn(70, 300, generator=generator).to(device, dtype) for _ in range(3))
    vector = 1 + 0.3 * torch.randn(300, generator=generator).to(device)
    heads, cos, sin = (tensor.view(2, 35, 3, 100).transpose(1, 2) for tensor in (gate, up, gradient))
    cos, sin = cos[:, 0, :, :64], sin[:, 0, :, :64]
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, lambda kept: kept):
        found = [
            fused.rescale(gate, vector, "silu", up),
            *fused.pull_back(gradient, gate, vector, "silu", up),
            frozen.pull_back_norm(gradient, gate, vector, 0.0, 1e-6),
            frozen.turn(heads, cos, sin),
            frozen.turn(heads, cos, sin, back=True),
            fused.rescale(gate, vector, "gelu"),
            *(each for each in fused.pull_back(gradient, gate, vector, "gelu") if each is not None),
        ]
        with torch.enable_grad():
            leaves = [tensor.detach().float().requires_grad_() for tensor in (gate, up, vector, heads)]
            product = F.silu(leaves[0]) * leaves[1] * leaves[2]
            normed = leaves[0] * (leaves[0].square().mean(-1, keepdim=True) + 1e-6).rsqrt() * vector
            turned = _turn_by_formula(leaves[3], cos.float(), sin.float())
            wanted = [product, *torch.autograd.grad(product, leaves[:3], gradient.float())]
            wanted += torch.autograd.grad(normed, leaves[:1], gradient.float())
            wanted += [turned, *torch.autograd.grad(turned, leaves[3:], heads.float())]
            alone = F.gelu(leaves[0]) * leaves[2]
            wanted += [alone, *torch.autograd.grad(alone, [leaves[0], leaves[2]], gradient.float())]
    return find_largest(float((a.float() - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))


def _turn_by_formula(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return heads `[B, H, T, d]` turned by `[B, T, n]`, as transformers writes it."""
    turned, rest = heads[..., : cos.shape[-1]], heads[..., cos.shape[-1] :]
    first, second = turned.chunk(2, -1)
    crossed = torch.cat((-second, first), -1)
    return torch.cat((turned * cos[:, None] + crossed * sin[:, None], rest), -1)
