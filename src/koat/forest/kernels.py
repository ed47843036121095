"""Which attention kernels are worth trying on a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from koat.forest.attend import Kernel
from koat.forest.root import has_cached_root
from koat.forest.score import unwrap
from koat.forest.walk import IMPLEMENTATION


def find_kernel(config: Any) -> Kernel:
    """Return the kernel whose mask a loaded model understands, from its configuration."""
    known: dict[str, Kernel] = {"sdpa": "sdpa", "flex_attention": "flex", IMPLEMENTATION: "walk"}
    return known.get(config._attn_implementation, "eager")


def list_kernels(model: nn.Module, wanted: str) -> list[Kernel]:
    """Return the kernels worth trying: on a CPU, where SDPA serves, walked attention before it.

    FlexAttention may not compile on a machine; dense masks stand behind it. Keys in a cache (prefix tuning) are for
    kernels that take a dense mask.
    """
    causal = unwrap(model)
    kernel = find_kernel(causal.config)
    if kernel == "flex":
        dense = pick_dense(causal)
        return [dense] if has_cached_root(model) else ["flex", dense]
    if has_cached_root(model):
        return ["eager" if kernel == "eager" else "sdpa"]
    if causal.device.type != "cpu" or kernel not in ("sdpa", "walk"):
        return [kernel]
    if wanted == "sdpa":
        return ["sdpa"]
    return ["walk", "sdpa"]


def pick_cached(causal: Any, kernel: Kernel) -> Kernel:
    """Return the kernel for keys in a cache beside one that scores."""
    return "eager" if kernel == "eager" else pick_dense(causal)


def pick_dense(causal: Any) -> Kernel:
    """Return the kernel for dense masks: SDPA knows neither capped scores nor sinks, and says nothing of it."""
    capped = getattr(causal.config, "attn_logit_softcapping", None) is not None
    return "sdpa" if causal._supports_sdpa and not capped else "eager"
