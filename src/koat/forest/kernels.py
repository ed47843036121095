"""Which attention kernels are worth trying on a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from koat.forest.attend import Kernel
from koat.forest.interface import NAMES
from koat.forest.root import has_cached_root
from koat.forest.score import unwrap
from koat.forest.tree import has_triton

ATTENTION_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "attn_dropout")
"""What families call the share of attention that they drop in training."""


def find_attention_dropout(config: Any) -> float:
    """Return the share of attention that a model drops in training, which only kernels for dense masks do."""
    shares = (getattr(config, name, None) for name in ATTENTION_DROPOUTS)
    return max((float(share) for share in shares if isinstance(share, float | int)), default=0.0)


def find_kernel(config: Any) -> Kernel:
    """Return the kernel whose mask a loaded model understands, from its configuration."""
    known: dict[str, Kernel] = {"sdpa": "sdpa", "flex_attention": "flex", NAMES["walk"]: "walk", NAMES["tree"]: "tree"}
    return known.get(config._attn_implementation, "eager")


def list_kernels(model: nn.Module, wanted: str) -> list[Kernel]:
    """Return the kernels worth trying: where SDPA serves, before it walked attention on a CPU, tree attention on a GPU.

    Kernels may not compile on a machine; dense masks stand behind them. Keys in a cache (prefix tuning) are for kernels
    that take a dense mask.
    """
    causal = unwrap(model)
    kernel = find_kernel(causal.config)
    if kernel == "flex":
        dense = pick_dense(causal)
        return [dense] if has_cached_root(model) else ["flex", dense]
    if has_cached_root(model):
        return ["eager" if kernel == "eager" else "sdpa"]
    if kernel == "eager":
        return ["eager"]
    first = "sdpa" if wanted == "sdpa" else pick_own(causal.device.type)
    return [first] if first == "sdpa" else [first, "sdpa"]


def pick_own(device: str) -> Kernel:
    """Return koat's own kernel for a kind of device, SDPA where there is none."""
    own: dict[str, Kernel] = {"cpu": "walk", "cuda": "tree" if has_triton() else "sdpa"}
    return own.get(device, "sdpa")


def pick_cached(causal: Any, kernel: Kernel) -> Kernel:
    """Return the kernel for keys in a cache beside one that scores."""
    return "eager" if kernel == "eager" else pick_dense(causal)


def pick_dense(causal: Any) -> Kernel:
    """Return the kernel for dense masks: SDPA knows neither capped scores nor sinks, and says nothing of it."""
    capped = getattr(causal.config, "attn_logit_softcapping", None) is not None
    return "sdpa" if causal._supports_sdpa and not capped else "eager"
