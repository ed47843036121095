"""Attach a method to a base model, save it, restore it. Files are PEFT's; a fully fine-tuned model's are its own."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import Tensor, nn

from koat.adapters.architectures import UnknownFamilyError
from koat.adapters.feed_forward import refine_feed_forwards
from koat.adapters.files import (
    CONFIG,
    EXTRA,
    WEIGHTS,
    compare_states,
    is_whole_model,
    read_adapter_config,
    read_adapter_file,
    read_extra,
)
from koat.adapters.frozen import refine_frozen
from koat.adapters.full import FullModel, read_weights, restore_whole, train_whole, write_weights
from koat.adapters.ia3 import count_held, holds_queries, refine_ia3_layers, reset_held
from koat.adapters.lora import refine_lora_layers
from koat.adapters.methods import find_method
from koat.adapters.reach import extend_reach, find_places, list_kinds, list_places
from koat.adapters.soft_prompts import finished, read_soft_state, write_soft_state
from koat.adapters.targets import check_targets, list_linears
from koat.core.config import Section
from koat.core.errors import AdapterError
from koat.core.seeding import seeded
from koat.core.soft_prompt import has_soft_prompt

Attached = PeftModel | FullModel
"""A base model with a method on it."""
State = dict[str, Tensor]


def attach_adapter(model: nn.Module, settings: Section, seed: int = 0) -> Attached:
    """Attach a new adapter to a transformers model and return PEFT's wrapper around it.

    Base weights are frozen, adapter weights float32; with a method that has no adapter all weights are trained, in
    float32. Raises AdapterError for targets that match nothing.
    """
    name: str = settings.method  # type: ignore[attr-defined]
    method = find_method(name)
    if method.make_config is None:
        return train_whole(model)
    try:
        config = method.make_config(settings, model.config)
        kinds = list_kinds(settings, model.config)  # refuses a family that it does not know before anything is put in
    except UnknownFamilyError as error:
        raise AdapterError(f"{error} Its linear layers: {', '.join(list_linears(model))}.") from error
    targets: Any = getattr(config, "target_modules", ())
    if not targets and not config.is_prompt_learning:
        raise AdapterError("adapter.targets is empty: name at least one layer, or use paper, attention or all-linear.")
    check_targets(model, targets)
    with seeded(seed):
        wrapped = _wrap(model, config, f"adapter.targets={','.join(sorted(targets))}" if targets else name)
    refine_layers(wrapped, holds=getattr(settings, "targets", None) == "paper")
    extend_reach(wrapped.get_base_model(), find_places(kinds, wrapped.get_base_model()), trainable=True)
    return wrapped


def refine_layers(wrapped: nn.Module, holds: bool) -> None:
    """Give the layers that PEFT put in, and the frozen ones around them, koat's forward passes."""
    base = wrapped.get_base_model()  # type: ignore[operator]
    refine_ia3_layers(base, holds)
    refine_feed_forwards(base)
    refine_lora_layers(base)
    refine_frozen(base)


def count_trainable(model: nn.Module) -> int:
    """Return how many numbers training can change: trainable parameters less entries held constant."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad) - count_held(model)


def read_adapter_state(model: Attached) -> State:
    """Return what is trained, on the CPU, under PEFT's names; of a soft prompt, all that makes it."""
    reset_held(model)
    read, _ = _find_state(model)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in read(model).items()}


def write_adapter_state(model: Attached, state: State) -> None:
    """Put tensors under PEFT's names back. Raises AdapterError for missing, extra or misshapen ones."""
    compare_states(read_adapter_state(model), state, "the checkpoint")
    _, write = _find_state(model)
    write(model, state)


def _find_state(model: Attached) -> tuple[Callable[[Any], State], Callable[[Any, State], Any]]:
    """Return how what is trained is read from a model and written to it."""
    if isinstance(model, FullModel):
        return read_weights, write_weights
    if has_soft_prompt(model):
        return read_soft_state, write_soft_state
    return read_peft_state, set_peft_model_state_dict


def read_peft_state(model: PeftModel) -> State:
    """Return an adapter's tensors under PEFT's names."""
    return dict(get_peft_model_state_dict(model, save_embedding_layers=_save_embeddings(model)))


def _save_embeddings(model: PeftModel) -> Literal["auto"] | bool:
    """Return whether PEFT is to look for embeddings to save: where none is a target it would ask the Hub each time."""
    targets: Any = getattr(model.peft_config["default"], "target_modules", None) or ()
    return "auto" if isinstance(targets, str) or set(targets) & set(EMBEDDING_LAYER_NAMES) else False


def save_adapter(model: Attached, folder: Path) -> None:
    """Write an adapter in PEFT's format, or a whole model in its own, into an existing, private folder."""
    reset_held(model)
    with finished(model):
        if isinstance(model, FullModel):
            model.save_pretrained(str(folder), safe_serialization=True)
        else:
            embeddings = _save_embeddings(model)
            model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=embeddings)
    (folder / "README.md").unlink(missing_ok=True)
    if isinstance(model, FullModel):
        return
    extra = {"holds_queries": holds_queries(model), "places": list_places(model.get_base_model())}
    (folder / EXTRA).write_text(json.dumps(extra) + "\n", encoding="utf-8")


def restore_adapter(model: nn.Module, folder: Path, trainable: bool = False) -> Attached:
    """Load an adapter that koat or PEFT saved onto its base model, or the weights of a whole model into it.

    Raises AdapterError when files are absent or broken, when a tensor is missing, left over or of another
    shape (an adapter of another base), or when a target matches no layer.
    """
    if is_whole_model(folder):
        return restore_whole(model, folder, trainable)
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
    if getattr(config, "prefix_projection", False):
        config.prefix_projection = False  # the file holds what the network made, not the network
    wrapped = _wrap(model, config, str(folder / CONFIG))
    refine_layers(wrapped, holds=bool(extra.get("holds_queries")))
    extend_reach(wrapped.get_base_model(), extra.get("places", []), trainable)
    compare_states(read_peft_state(wrapped), state, str(folder))
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
