"""The methods: one row each, with its settings, its PEFT configuration and its facts.

Nothing outside this folder asks which method it is dealing with. Imports no PyTorch, so that `--help` and
configuration are quick; what needs PEFT imports it when called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from koat.core.config import Section
from koat.core.errors import AdapterError, suggest

if TYPE_CHECKING:
    from peft import PeftConfig

Targets = Literal["paper", "peft", "attention", "all-linear"] | list[str]


class Ia3Settings(Section):
    """IA3 (Liu et al. 2022, T-Few): learned vectors rescale keys, values and the inner activation."""

    method: Literal["ia3"] = "ia3"
    targets: Targets = Field(
        "paper",
        description="`paper`: keys, values, inner activation. `attention`: also queries and attention output. "
        "`all-linear`: every linear layer's output, the inner activation once. `peft`: PEFT's default. Or names.",
    )
    feedforward: list[str] = Field(
        default_factory=list,
        description="With named targets: those whose input is scaled instead of their output.",
    )


class LoraSettings(Section):
    """LoRA (Hu et al. 2021): a low-rank update beside each chosen linear layer."""

    method: Literal["lora"] = "lora"
    targets: Targets = Field(
        "all-linear",
        description="`attention`: queries, keys, values, attention output. `all-linear`: every linear layer. "
        "`paper`: queries and values. `peft`: PEFT's default. Or names.",
    )
    r: Annotated[int, Field(gt=0)] = Field(8, description="Rank of the update.")
    alpha: float = Field(16.0, gt=0, description="The update is scaled by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the update's input.")
    rslora: bool = Field(False, description="Scale by alpha / sqrt(r) instead (rank-stabilised LoRA).")


AdapterSettings = Annotated[Ia3Settings | LoraSettings, Field(discriminator="method")]


@dataclass(frozen=True, slots=True)
class Method:
    """A fine-tuning method: how it is set up, and what is true of it."""

    settings: type[Section]
    make_config: Callable[[Any, Any], PeftConfig]
    """From the method's settings and a model configuration to a PEFT configuration."""
    title: str
    learning_rates: dict[str, float]
    """Default learning rate by targets; the key "" serves all others. Found on NSMC, see docs/log.md."""
    mergeable: bool = True
    allows_checkpointing: bool = True


def _make_ia3(settings: Ia3Settings, config: Any) -> PeftConfig:
    from koat.adapters.ia3 import make_ia3_config

    return make_ia3_config(settings, config)


def _make_lora(settings: LoraSettings, config: Any) -> PeftConfig:
    from koat.adapters.lora import make_lora_config

    return make_lora_config(settings, config)


METHODS: dict[str, Method] = {
    "ia3": Method(Ia3Settings, _make_ia3, "IA3", {"paper": 5e-2, "": 2e-2}),
    "lora": Method(LoraSettings, _make_lora, "LoRA", {"": 2e-3}),
}


def find_method(name: str) -> Method:
    """Return a method by name. Raises AdapterError with the nearest known one."""
    if name not in METHODS:
        raise AdapterError(
            f"Unknown method {name!r}{suggest(name, METHODS)}. Known: {', '.join(METHODS)}."
        )
    return METHODS[name]


def default_values(method: str, targets: Any = None) -> dict[str, Any]:
    """Return the settings that a method brings with it, as a configuration layer."""
    row = find_method(method)
    key = targets if isinstance(targets, str) else row.settings.model_fields["targets"].default
    rate = row.learning_rates.get(key, row.learning_rates[""])
    return {"training": {"learning_rate": rate}}
