"""What lies in an adapter's folder, read with one clear message for whatever may be wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from koat.core.errors import AdapterError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
EXTRA = "koat_adapter.json"
"""What koat has to know and PEFT's configuration has no place for."""
MODEL_CONFIG = "config.json"
MODEL_WEIGHTS = "model*.safetensors"
WHOLE = "FULL"
"""Stands where PEFT's files name their type, for a fully fine-tuned model, which is a plain model folder."""


def is_whole_model(folder: Path) -> bool:
    """Whether a folder holds a whole model instead of an adapter."""
    return (folder / MODEL_CONFIG).is_file() and not (folder / CONFIG).is_file()


def list_weight_files(folder: Path) -> list[Path]:
    """Return the files that hold what was trained. Raises AdapterError when there are none."""
    found = sorted(folder.glob(MODEL_WEIGHTS if is_whole_model(folder) else WEIGHTS))
    if not found:
        raise AdapterError(f"{folder} has lost its weights.{_hint_at_pickle(folder)} Copy it again, or train again.")
    return found


def _hint_at_pickle(folder: Path) -> str:
    """Say how to come by weights that lie there as a pickle; empty where they do not."""
    if not (folder / "adapter_model.bin").is_file():
        return ""
    return (
        " It has adapter_model.bin, a pickle, which koat does not open: save it again with PEFT's "
        "save_pretrained(..., safe_serialization=True)."
    )


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
    """Return PEFT's configuration of a saved adapter as it stands in the file; of a whole model, its kind alone."""
    path = folder / CONFIG
    if is_whole_model(folder):
        return {"peft_type": WHOLE}
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
        raise AdapterError(f"{path} does not exist.{_hint_at_pickle(path.parent)}")
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
            f"What was trained, in {where}, does not fit this base model: {'; '.join(p for p in problems if p)}. "
            "Use the base model that it was trained on."
        )
