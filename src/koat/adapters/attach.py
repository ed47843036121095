"""Attach a method to a base model, save it, restore it. Files are PEFT's."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from koat.adapters.architectures import UnknownFamilyError
from koat.adapters.feed_forward import refine_feed_forwards
from koat.adapters.ia3 import count_held, holds_queries, refine_ia3_layers, reset_held
from koat.adapters.lora import refine_lora_layers
from koat.adapters.methods import find_method
from koat.adapters.soft_prompts import is_soft, read_soft_state, write_soft_state
from koat.adapters.targets import check_targets, list_linears
from koat.core.config import Section
from koat.core.errors import AdapterError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
EXTRA = "koat_adapter.json"
"""What koat has to know and PEFT's configuration has no place for."""


def attach_adapter(model: nn.Module, settings: Section, seed: int = 0) -> PeftModel:
    """Attach a new adapter to a transformers model and return PEFT's wrapper around it.

    Base weights are frozen, adapter weights float32. Raises AdapterError for targets that match nothing.
    """
    name: str = settings.method  # type: ignore[attr-defined]
    method = find_method(name)
    try:
        config = method.make_config(settings, model.config)
    except UnknownFamilyError as error:
        raise AdapterError(f"{error} Its linear layers: {', '.join(list_linears(model))}.") from error
    targets: Any = getattr(config, "target_modules", ())
    if not targets and not config.is_prompt_learning:
        raise AdapterError("adapter.targets is empty: name at least one layer, or use paper, attention or all-linear.")
    check_targets(model, targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = _wrap(model, config, f"adapter.targets={','.join(sorted(targets))}" if targets else name)
    refine_layers(wrapped, holds=getattr(settings, "targets", None) == "paper")
    return wrapped


def refine_layers(wrapped: nn.Module, holds: bool) -> None:
    """Give the layers that PEFT put in koat's forward passes."""
    base = wrapped.get_base_model()  # type: ignore[operator]
    refine_ia3_layers(base, holds)
    refine_feed_forwards(base)
    refine_lora_layers(base)


def count_trainable(model: nn.Module) -> int:
    """Return how many numbers training can change: trainable parameters less entries held constant."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad) - count_held(model)


def read_adapter_state(model: PeftModel) -> dict[str, Tensor]:
    """Return the adapter's tensors, on the CPU, under PEFT's names; of a soft prompt, all that makes it."""
    reset_held(model)
    state = read_soft_state(model) if is_soft(model) else get_peft_model_state_dict(model)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def write_adapter_state(model: PeftModel, state: dict[str, Tensor]) -> None:
    """Put tensors under PEFT's names back. Raises AdapterError for missing, extra or misshapen ones."""
    compare_states(read_adapter_state(model), state, "the checkpoint")
    if is_soft(model):
        write_soft_state(model, state)
    else:
        set_peft_model_state_dict(model, state)


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write an adapter in PEFT's format into an existing, private folder."""
    reset_held(model)
    model.save_pretrained(str(folder), safe_serialization=True)
    (folder / "README.md").unlink(missing_ok=True)
    extra = {"holds_queries": holds_queries(model)}
    (folder / EXTRA).write_text(json.dumps(extra) + "\n", encoding="utf-8")


def restore_adapter(model: nn.Module, folder: Path, trainable: bool = False) -> PeftModel:
    """Load an adapter that koat or PEFT saved onto its base model.

    Raises AdapterError when files are absent or broken, when a tensor is missing, left over or of another
    shape (an adapter of another base), or when a target matches no layer.
    """
    read_adapter_config(folder)
    extra = read_extra(folder)
    state = read_adapter_file(folder / WEIGHTS)
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"PEFT cannot read {folder / CONFIG} ({type(error).__name__}: {error}).") from error
    targets: Any = getattr(config, "target_modules", None)
    check_targets(model, targets if isinstance(targets, (list, set, tuple)) else [])
    config.inference_mode = not trainable
    wrapped = _wrap(model, config, str(folder / CONFIG))
    refine_layers(wrapped, holds=bool(extra.get("holds_queries")))
    compare_states(get_peft_model_state_dict(wrapped), state, str(folder))
    set_peft_model_state_dict(wrapped, state)
    return wrapped


def _wrap(model: nn.Module, config: PeftConfig, where: str) -> PeftModel:
    """Put PEFT's layers into a model, its refusals turned into AdapterError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return get_peft_model(model, config)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"PEFT cannot put this adapter on the base model ({where}): {error}") from error


def read_extra(folder: Path) -> dict[str, Any]:
    """Return what koat keeps beside PEFT's configuration; nothing for an adapter that PEFT saved."""
    path = folder / EXTRA
    if not path.is_file():
        return {}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{path} is not valid JSON ({error}). Save the adapter again.") from error
    if not isinstance(stored, dict):
        raise AdapterError(f"{path} holds no JSON object. Save the adapter again.")
    return stored


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return PEFT's configuration of a saved adapter as it stands in the file."""
    path = folder / CONFIG
    if not path.is_file():
        raise AdapterError(
            f"{folder} is not an adapter: it has no {CONFIG}. Give a koat run folder, or a folder that PEFT saved."
        )
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{path} is not valid JSON ({error}). Save the adapter again.") from error
    if not isinstance(stored, dict) or "peft_type" not in stored:
        raise AdapterError(f"{path} names no `peft_type`; it is not a PEFT adapter's configuration.")
    return stored


def read_adapter_file(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a saved adapter. Raises AdapterError for an absent, empty or broken file."""
    if not path.is_file():
        pickled = path.with_name("adapter_model.bin")
        hint = (
            " It has adapter_model.bin, a pickle, which koat does not open: save it again with PEFT's "
            "save_pretrained(..., safe_serialization=True)."
            if pickled.is_file()
            else ""
        )
        raise AdapterError(f"{path} does not exist.{hint}")
    try:
        state = load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} is not a whole safetensors file ({error}). Save the adapter again.") from error
    if not state:
        raise AdapterError(f"{path} holds no tensors: the adapter is empty.")
    return state


def compare_states(expected: dict[str, Tensor], found: dict[str, Tensor], where: str) -> None:
    """Raise AdapterError unless two states have the same names and shapes."""
    missing = sorted(set(expected) - set(found))
    extra = sorted(set(found) - set(expected))
    other = [
        f"{name} is {list(found[name].shape)}, the base wants {list(expected[name].shape)}"
        for name in expected
        if name in found and found[name].shape != expected[name].shape
    ]
    problems = [
        f"{len(missing)} tensors are missing, the first is {missing[0]}" if missing else "",
        f"{len(extra)} tensors fit nothing, the first is {extra[0]}" if extra else "",
        f"{len(other)} tensors have another shape: {other[0]}" if other else "",
    ]
    if any(problems):
        raise AdapterError(
            f"The adapter in {where} does not fit this base model: {'; '.join(p for p in problems if p)}. "
            "Use the base model that it was trained on."
        )
