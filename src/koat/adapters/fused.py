"""Where a GPU's own kernels for IA3 (`koat.adapters.fused_kernels`) serve; elsewhere PyTorch's compute the same."""

from __future__ import annotations

import functools
import logging
from types import ModuleType

import torch
from torch import Tensor

TYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Types of activations that the kernels compute with."""
log = logging.getLogger(__name__)


def find_fused(activation: Tensor) -> ModuleType | None:
    """Return the kernels if they serve: on a GPU, for a usual type, with a Triton that can compile."""
    serves = activation.device.type == "cuda" and activation.dtype in TYPES
    return _load_kernels(activation.device) if serves else None


@functools.cache
def _load_kernels(device: torch.device) -> ModuleType | None:
    try:
        from koat.adapters import fused_kernels

        fused_kernels.rescale(torch.ones(1, 1, device=device), torch.ones(1, device=device))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no Triton, or no C compiler for it
        log.warning("IA3 runs on PyTorch's own kernels, which take longer: %s: %s", type(error).__name__, error)
        return None
    return fused_kernels
