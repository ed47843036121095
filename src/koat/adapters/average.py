"""Average several adapters of one base into one adapter.

IA3's vectors multiply and begin at one, so their arithmetic mean is one plus the mean of what each moved away
from one. LoRA's mean update is not the product of mean factors: `mean(B_i A_i)` is kept exactly, by putting the
factors side by side, and the ranks add up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from koat.adapters.start import begins_plainly
from koat.core.errors import AdapterError

State = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """An adapter as it lies on disk: a name for messages, PEFT's configuration, and its tensors."""

    name: str
    config: dict[str, Any]
    extra: dict[str, Any]
    """What koat keeps beside PEFT's configuration."""
    state: State


def average_adapters(adapters: Sequence[StoredAdapter]) -> tuple[dict[str, Any], State]:
    """Return (PEFT configuration, tensors) of the mean of two or more adapters, computed in float32.

    Raises AdapterError for adapters of different methods, targets or tensors: what one of them lacks would have
    to be taken for zero, which for a factor switches a layer off.
    """
    if len(adapters) < 2:
        raise AdapterError("Averaging needs two adapters or more.")
    first = adapters[0]
    kind = str(first.config["peft_type"])
    for other in adapters[1:]:
        check_alike(first, other)
    if kind not in AVERAGES:
        raise AdapterError(f"{kind} adapters cannot be averaged; {' and '.join(sorted(AVERAGES))} adapters can.")
    return AVERAGES[kind](adapters)


def check_alike(first: StoredAdapter, other: StoredAdapter) -> None:
    """Raise AdapterError unless two adapters act on the same places in the same way."""
    facts = {
        "methods": [str(adapter.config["peft_type"]) for adapter in (first, other)],
        "targets": [_normalise(adapter.config.get("target_modules")) for adapter in (first, other)],
        "feed-forward modules": [_normalise(adapter.config.get("feedforward_modules")) for adapter in (first, other)],
        "held queries": [bool(adapter.extra.get("holds_queries")) for adapter in (first, other)],
        "places beyond PEFT's reach": [adapter.extra.get("places", []) for adapter in (first, other)],
    }
    for what, (left, right) in facts.items():
        if left != right:
            raise AdapterError(
                f"{first.name} and {other.name} have different {what} ({left} and {right}). Only adapters of the "
                "same method on the same layers have a mean; train them alike."
            )
    lacking = sorted(set(first.state) ^ set(other.state))
    if lacking:
        raise AdapterError(
            f"{first.name} and {other.name} do not have the same tensors; {len(lacking)} stand in one only, "
            f"the first is {lacking[0]}. What is missing is not zero, so there is no mean."
        )


def _normalise(names: Any) -> Any:
    return sorted(names) if isinstance(names, list) else names


def average_vectors(adapters: Sequence[StoredAdapter]) -> tuple[dict[str, Any], State]:
    """Return the arithmetic mean of IA3 vectors: one plus the mean deviation from one."""
    first = adapters[0]
    for adapter in adapters[1:]:
        _check_shapes(first, adapter)
    mean = {
        name: 1 + torch.stack([adapter.state[name].float() - 1 for adapter in adapters]).mean(0) for name in first.state
    }
    return dict(first.config), mean


def _check_shapes(first: StoredAdapter, other: StoredAdapter) -> None:
    for name, tensor in first.state.items():
        if other.state[name].shape != tensor.shape:
            raise AdapterError(
                f"{name} is {list(tensor.shape)} in {first.name} and {list(other.state[name].shape)} in {other.name}: "
                "they belong to different base models."
            )


def average_updates(adapters: Sequence[StoredAdapter]) -> tuple[dict[str, Any], State]:
    """Return a LoRA adapter whose update is exactly the mean of the updates; its rank is the sum of the ranks."""
    for adapter in adapters:
        _check_plain_lora(adapter)
    rank = sum(int(adapter.config["r"]) for adapter in adapters)
    state: State = {}
    for name in adapters[0].state:
        parts = [adapter.state[name].float() for adapter in adapters]
        is_down = "lora_A" in name or "lora_embedding_A" in name
        side = 0 if is_down else 1
        others = {tuple(size for axis, size in enumerate(part.shape) if axis != side) for part in parts}
        if len(others) > 1:
            raise AdapterError(f"{name} has another width in each adapter: they belong to different base models.")
        if not is_down:
            parts = [part * (_scaling(a) / len(adapters)) for part, a in zip(parts, adapters, strict=True)]
        state[name] = torch.cat(parts, side).contiguous()
    own = {"r": rank, "lora_alpha": rank, "use_rslora": False, "lora_dropout": 0.0}
    return {**adapters[0].config, **own}, state


def _scaling(adapter: StoredAdapter) -> float:
    rank, alpha = int(adapter.config["r"]), float(adapter.config["lora_alpha"])
    return alpha / rank**0.5 if adapter.config.get("use_rslora") else alpha / rank


def _check_plain_lora(adapter: StoredAdapter) -> None:
    """Refuse what is more than `s B A`."""
    more = [
        name
        for name in ("use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "modules_to_save", "target_parameters")
        if adapter.config.get(name)
    ]
    if not begins_plainly(adapter.config):
        more.append(f"init_lora_weights={adapter.config['init_lora_weights']}")
    strange = [name for name in adapter.state if ".lora_" not in name or "magnitude" in name]
    if more or strange:
        raise AdapterError(
            f"{adapter.name} is more than a plain low-rank update ({', '.join(more) or strange[0]}), so its mean with "
            "others is no LoRA adapter. Merge each into its base, or train plain LoRA."
        )


AVERAGES: dict[str, Callable[[Sequence[StoredAdapter]], tuple[dict[str, Any], State]]] = {
    "IA3": average_vectors,
    "LORA": average_updates,
}
