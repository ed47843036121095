"""The methods: one row each, with its settings, its PEFT configuration and its facts.

Nothing outside this folder asks which method it is dealing with. Imports no PyTorch, so that `--help` and
configuration are quick; what needs PEFT imports it when called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from koat.adapters.settings import AdapterSettings, Ia3Settings, LoraSettings
from koat.core.config import Section
from koat.core.errors import AdapterError, suggest

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = [
    "METHODS",
    "AdapterSettings",
    "Ia3Settings",
    "LoraSettings",
    "Method",
    "check_combination",
    "default_values",
    "find_method",
]


@dataclass(frozen=True, slots=True)
class Method:
    """A fine-tuning method: how it is set up, and what is true of it."""

    settings: type[Section]
    make_config: Callable[[Any, Any], PeftConfig]
    """From the method's settings and a model configuration to a PEFT configuration."""
    title: str
    learning_rates: dict[str, float]
    """Default learning rate by targets; the key "" serves all others. For base models of a billion parameters and
    more; small ones want ten times that (docs/log.md)."""
    mergeable: bool = True
    allows_checkpointing: bool = True
    allows_weight_decay: bool = True
    """Decay pulls parameters to zero; vectors that start at one would be switched off by it."""


def _make_ia3(settings: Ia3Settings, config: Any) -> PeftConfig:
    from koat.adapters.ia3 import make_ia3_config

    return make_ia3_config(settings, config)


def _make_lora(settings: LoraSettings, config: Any) -> PeftConfig:
    from koat.adapters.lora import make_lora_config

    return make_lora_config(settings, config)


METHODS: dict[str, Method] = {
    "ia3": Method(Ia3Settings, _make_ia3, "IA3", {"": 5e-3}, allows_weight_decay=False),
    "lora": Method(LoraSettings, _make_lora, "LoRA", {"": 2e-4}),
}


def find_method(name: str) -> Method:
    """Return a method by name. Raises AdapterError with the nearest known one."""
    if name not in METHODS:
        raise AdapterError(f"Unknown method {name!r}{suggest(name, METHODS)}. Known: {', '.join(METHODS)}.")
    return METHODS[name]


def check_combination(name: str, weight_decay: float, checkpointing: bool) -> None:
    """Raise AdapterError for training settings that a method forbids, with what to do instead."""
    method = find_method(name)
    if weight_decay and not method.allows_weight_decay:
        raise AdapterError(
            f"training.weight_decay={weight_decay} with {method.title}: decay pulls its vectors to zero, which "
            "switches layers off; they begin at one. Set training.weight_decay=0."
        )
    if checkpointing and not method.allows_checkpointing:
        raise AdapterError(
            f"{method.title} cannot be trained with activation checkpointing. "
            "Set training.activation_checkpointing=false."
        )


def default_values(method: str, targets: Any = None) -> dict[str, Any]:
    """Return the settings that a method brings with it, as a configuration layer."""
    row = find_method(method)
    key = row.settings.model_fields["targets"].default if targets is None else targets
    rate = row.learning_rates.get(key if isinstance(key, str) else "", row.learning_rates[""])
    return {"training": {"learning_rate": rate}}
