"""The methods: one row each, with its settings, its PEFT configuration and its facts.

Nothing outside this folder asks which method it is dealing with. Imports no PyTorch, so that `--help` and
configuration are quick; what needs PEFT imports it when called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from koat.adapters.settings import (
    AdapterSettings,
    FullSettings,
    Ia3Settings,
    LoraSettings,
    LowRankSettings,
    PrefixSettings,
    PromptSettings,
    PTuningSettings,
    QloraSettings,
)
from koat.core.config import Section
from koat.core.errors import AdapterError, suggest
from koat.core.settings import ModelSettings, TrainingSettings

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = [
    "METHODS",
    "AdapterSettings",
    "FullSettings",
    "Ia3Settings",
    "LoraSettings",
    "Method",
    "PTuningSettings",
    "PrefixSettings",
    "PromptSettings",
    "QloraSettings",
    "check_combination",
    "default_values",
    "find_method",
]


@dataclass(frozen=True, slots=True)
class Method:
    """A fine-tuning method: how it is set up, and what is true of it."""

    settings: type[Section]
    make_config: Callable[[Any, Any], PeftConfig] | None
    """From the method's settings and a model configuration to a PEFT configuration. None: there is no adapter, and
    every weight of the base is trained, in float32."""
    title: str
    learning_rate: float
    """The default, for base models of a billion parameters and more; small ones want ten times that (docs/log.md)."""
    mergeable: bool = True
    allows_checkpointing: bool = True
    allows_weight_decay: bool = True
    """Decay pulls parameters to zero; vectors that start at one would be switched off by it."""
    needs_quantised_base: bool = False
    """The base has to be in 4 bit; the first of `FOUR_BIT` is brought along."""
    allows_quantised_base: bool = True


FOUR_BIT = ("nf4-double", "nf4")
QUANTISED_DEVICES = ("auto", "cpu", "cuda")
"""Where bitsandbytes' layers are known to run, and are checked at every start."""


def _make_ia3(settings: Ia3Settings, config: Any) -> PeftConfig:
    from koat.adapters.ia3 import make_ia3_config

    return make_ia3_config(settings, config)


def _make_lora(settings: LowRankSettings, config: Any) -> PeftConfig:
    from koat.adapters.lora import make_lora_config

    return make_lora_config(settings, config)


def _make_prefix(settings: PrefixSettings, config: Any) -> PeftConfig:
    from koat.adapters.soft_prompts import make_prefix_config

    return make_prefix_config(settings)


def _make_prompt(settings: PromptSettings, config: Any) -> PeftConfig:
    from koat.adapters.soft_prompts import make_prompt_config

    return make_prompt_config(settings)


def _make_p_tuning(settings: PTuningSettings, config: Any) -> PeftConfig:
    from koat.adapters.soft_prompts import make_p_tuning_config

    return make_p_tuning_config(settings)


METHODS: dict[str, Method] = {
    "ia3": Method(Ia3Settings, _make_ia3, "IA3", 5e-3, allows_weight_decay=False),
    "lora": Method(LoraSettings, _make_lora, "LoRA", 2e-4),
    "qlora": Method(QloraSettings, _make_lora, "QLoRA", 2e-4, needs_quantised_base=True),
    "prefix": Method(PrefixSettings, _make_prefix, "prefix tuning", 1e-2, mergeable=False, allows_checkpointing=False),
    "prompt": Method(PromptSettings, _make_prompt, "prompt tuning", 1e-2, mergeable=False),
    "p_tuning": Method(PTuningSettings, _make_p_tuning, "P-tuning", 1e-3, mergeable=False),
    "full": Method(FullSettings, None, "full fine-tuning", 2e-5, allows_quantised_base=False),
}


def find_method(name: str) -> Method:
    """Return a method by name. Raises AdapterError with the nearest known one."""
    if name not in METHODS:
        raise AdapterError(f"Unknown method {name!r}{suggest(name, METHODS)}. Known: {', '.join(METHODS)}.")
    return METHODS[name]


def check_combination(adapter: Section, model: ModelSettings, training: TrainingSettings) -> None:
    """Raise AdapterError for settings that a method or a quantised base forbids, with what to do instead."""
    method = find_method(adapter.method)  # type: ignore[attr-defined]
    if training.weight_decay and not method.allows_weight_decay:
        raise AdapterError(
            f"training.weight_decay={training.weight_decay} with {method.title}: decay pulls its vectors to zero, "
            "which switches layers off; they begin at one. Set training.weight_decay=0."
        )
    if training.activation_checkpointing and not method.allows_checkpointing:
        raise AdapterError(
            f"{method.title} cannot be trained with activation checkpointing. "
            "Set training.activation_checkpointing=false."
        )
    if training.activation_offload and not training.activation_checkpointing:
        raise AdapterError(
            "training.activation_offload moves what activation checkpointing keeps, and that is off. "
            "Set training.activation_checkpointing=true, or training.activation_offload=false."
        )
    _check_types(model, training)
    _check_base(method, adapter, model)


def _check_types(model: ModelSettings, training: TrainingSettings) -> None:
    if model.dtype == "float16":
        raise AdapterError(
            "model.dtype=float16: small gradients vanish in it without loss scaling, which koat does not do. Train "
            "with model.dtype=bfloat16, or with model.dtype=float32 and training.precision=bfloat16."
        )
    if model.dtype == "bfloat16" and training.precision == "float32":
        raise AdapterError(
            "training.precision=float32 cannot be had with model.dtype=bfloat16: a model computes in the type of its "
            "weights. Leave one of the two out, or set both alike."
        )


def _check_base(method: Method, adapter: Section, model: ModelSettings) -> None:
    quantised = model.quantisation != "none"
    if method.needs_quantised_base and model.quantisation not in FOUR_BIT:
        raise AdapterError(
            f"{method.title} is trained on a base in 4 bit, but model.quantisation={model.quantisation}. "
            f"Set model.quantisation={' or '.join(FOUR_BIT)}, or adapter.method=lora for this base."
        )
    if quantised and not method.allows_quantised_base:
        raise AdapterError(
            f"{method.title} cannot be trained on a quantised base (model.quantisation={model.quantisation}): its "
            "weights are rounded and take no updates. Set model.quantisation=none, or adapter.method=qlora."
        )
    if method.make_config is None and model.dtype != "float32":
        raise AdapterError(
            f"{method.title} keeps its weights in float32, or small updates would be rounded away, but "
            f"model.dtype={model.dtype}. Set model.dtype=float32; training.precision=bfloat16 computes in bfloat16."
        )
    if model.quantisation == "8bit" and getattr(adapter, "dora", False):
        raise AdapterError(
            "adapter.dora=true reads the base's weights at every step, and PEFT breaks 8-bit layers by that on a CPU. "
            "Set model.quantisation=nf4 or none, or adapter.dora=false."
        )
    if quantised and model.device.split(":")[0] not in QUANTISED_DEVICES:
        raise AdapterError(
            f"model.quantisation={model.quantisation} does not run on model.device={model.device}. "
            f"Use model.device={', '.join(QUANTISED_DEVICES)}, or model.quantisation=none."
        )


def default_values(method: str) -> dict[str, Any]:
    """Return the settings that a method brings with it, as a configuration layer."""
    row = find_method(method)
    brought: dict[str, Any] = {"training": {"learning_rate": row.learning_rate}}
    if row.make_config is None:
        brought["model"] = {"dtype": "float32"}
    return brought | ({"model": {"quantisation": FOUR_BIT[0]}} if row.needs_quantised_base else {})
