"""What is evaluated: a base model, a run of koat's, or an adapter that PEFT saved, opened by its name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from koat.adapters.attach import restore_adapter
from koat.core.settings import ModelSettings
from koat.data.prompts import PromptTemplate
from koat.evaluation.contract import hash_value
from koat.forest.choose import choose_layout
from koat.forest.score import Layout
from koat.forest.verify import Verification
from koat.model import NANO, load_model, load_tokenizer
from koat.quantise.check import QuantisedCheck, check_quantised_layers
from koat.workflows.trained import find_trained, is_trained, settle_base


@dataclass(frozen=True, slots=True)
class Subject:
    """A model ready to run, where its predictions belong, and the prompt template it was trained with, if any."""

    name: str
    model: nn.Module
    tokenizer: Any
    layout: Layout
    verification: Verification
    predictions: Path
    quantised: QuantisedCheck | None = None
    template: PromptTemplate | None = None
    target: str = ""
    """What was named to open it."""
    loading: Mapping[str, str] = field(default_factory=dict)
    """How the base was to be loaded, where the caller said so: `base`, `dtype`."""


def open_subject(target: str, settings: ModelSettings | None = None, out: Path | None = None) -> Subject:
    """Load what `target` names: a run folder, a PEFT adapter folder, or a base model.

    `settings` says how the base is loaded; for an adapter its `base` overrides the one on record. Raises
    KoatError when something is missing or does not fit.
    """
    if target != NANO and is_trained(Path(target)):
        trained = find_trained(target, settings)
        subject = load_subject(trained.name, trained.model, trained.folder, out or trained.predictions)
        loading = describe_loading(settings, target)
        return replace(subject, template=trained.read_template(), target=target, loading=loading)
    settings = with_base(settings, target)
    name = re.sub(r"[^\w.-]+", "-", target).strip("-.") or "base"
    subject = load_subject(name, settings, None, out or choose_folder(name, target))
    return replace(subject, target=target, loading=describe_loading(settings, target))


def choose_folder(name: str, target: str) -> Path:
    """Return the folder for a base model's predictions: its name's, with a hash where that one is another model's."""
    folder = Path("evaluations") / name
    kept = {settle_base(other) for path in folder.glob("*.scores.json") if (other := read_target(path))}
    if not kept or settle_base(target) in kept:
        return folder
    return folder.with_name(f"{name}-{hash_value(settle_base(target))[:8]}")


def read_target(path: Path) -> str:
    """Return what a file of scores says that it evaluated; empty where it does not say or is damaged."""
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["asked"]["target"])
    except (OSError, ValueError, TypeError, KeyError):
        return ""


def describe_loading(settings: ModelSettings | None, target: str) -> dict[str, str]:
    """Return the base and the type of its weights as far as they were said beside the target."""
    if settings is None:
        return {}
    said = {"base": settings.base, "dtype": settings.dtype}
    usual = {"base": target, "dtype": ModelSettings.model_fields["dtype"].default}
    return {name: value for name, value in said.items() if value and value != usual[name]}


def with_base(settings: ModelSettings | None, base: str) -> ModelSettings:
    """Return the settings with `base` filled in."""
    if settings is None:
        return ModelSettings(base=base)
    return settings.model_copy(update={"base": base})


def load_subject(name: str, settings: ModelSettings, adapter: Path | None, predictions: Path) -> Subject:
    """Load a base model with or without an adapter and verify how sequences go through it."""
    tokenizer = load_tokenizer(settings)
    model: nn.Module = load_model(settings)
    quantised = check_quantised_layers(model)
    if adapter is not None:
        model = restore_adapter(model, adapter).eval()
    layout, verification = choose_layout(model, settings)
    return Subject(name, model, tokenizer, layout, verification, predictions, quantised)
