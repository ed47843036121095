"""Merge an adapter into its base model's weights: computed in float32, rounded once.

The products are PEFT's (IA3: `W * l`; LoRA: `W + s B A`; DoRA: that, renormalised).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from koat.adapters.attach import Attached
from koat.adapters.files import WHOLE
from koat.adapters.frozen import release_frozen
from koat.adapters.ia3 import reset_held
from koat.adapters.methods import find_method
from koat.adapters.reach import fold_places
from koat.core.errors import AdapterError
from koat.quantise.weights import list_quantised

MERGEABLE = {"IA3", "LORA", WHOLE}
"""PEFT's types whose product is a change of weights, and the method that changes them itself."""
SOFT = {"PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"}


def check_mergeable(stored: dict[str, Any], where: str, method: str = "") -> None:
    """Raise AdapterError for an adapter that is no change of weights.

    `stored` is its PEFT configuration, `method` koat's name for how it was trained, where that is known.
    """
    kind = str(stored["peft_type"])
    if kind not in MERGEABLE | SOFT:
        raise AdapterError(f"{where} is a {kind} adapter; koat merges IA3 and LoRA. Use PEFT's merge_and_unload.")
    if kind in SOFT or (method and not find_method(method).mergeable):
        raise AdapterError(
            f"{where} is a {kind} adapter: it lives in the sequence, not in the weights, so it cannot be merged. "
            "Use it as it is (`koat eval` and plain PEFT open it), or train ia3 or lora, which merge."
        )
    if stored.get("modules_to_save") or stored.get("bias", "none") != "none":
        raise AdapterError(
            f"{where} also trained weights outside its adapter layers (modules_to_save or bias), which koat does not "
            "merge. Merge it with PEFT's merge_and_unload."
        )


def merge_adapter(model: Attached) -> Any:
    """Merge the adapter into the float32 base model and return that, PEFT's layers gone.

    Raises AdapterError for weights in another type: they would be rounded on the way.
    """
    rounded = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32}
    if rounded or list_quantised(model):
        found = ", ".join(sorted(str(dtype) for dtype in rounded)) or "quantised layers"
        raise AdapterError(f"Merging is computed in float32, and this model has {found}. Load it with dtype=float32.")
    reset_held(model)
    fold_places(model)
    merged: nn.Module = model.merge_and_unload()
    release_frozen(merged)
    return merged.requires_grad_(False).eval()


@torch.no_grad()
def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Round all floating-point tensors that a model saves to a type, each once; they stay in the type they are in."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(dtype))
