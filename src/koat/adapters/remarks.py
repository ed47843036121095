"""What a user should know about a method on a model family before training begins."""

from __future__ import annotations

from typing import Any

from koat.adapters.architectures import UnknownFamilyError, find_architecture
from koat.adapters.ia3 import resolve_ia3_targets
from koat.adapters.reach import list_kinds
from koat.adapters.settings import Ia3Settings
from koat.adapters.targets import covers
from koat.core.config import Section


def describe_remarks(settings: Section, config: Any) -> list[str]:
    """Return sentences on what a method's targets do not do on a model of this configuration, mostly none.

    `settings` are a method's. Families that are not in the table get none. Raises AdapterError for IA3 targets
    that contradict each other.
    """
    try:
        architecture = find_architecture(config)
    except UnknownFamilyError:
        return []
    targets = getattr(settings, "targets", None)
    scaled = resolve_ia3_targets(settings, config)[0] if isinstance(settings, Ia3Settings) else []
    remarks = []
    if getattr(settings, "reach", "peft") == "whole":
        return [_describe_places(config, list_kinds(settings, config))]
    if architecture.key_norm and covers(scaled, architecture.key):
        remarks.append(_describe_key_norm(config))
    if architecture.experts and (targets == "all-linear" or (scaled and targets in ("paper", "attention"))):
        remarks.append(_describe_experts(config))
    if remarks and scaled and targets == "paper":
        remarks.append(
            "adapter.reach=whole puts vectors of koat's own there; adapter.targets=attention trains queries and "
            "attention output as well."
        )
    return remarks


def _describe_key_norm(config: Any) -> str:
    return (
        f"{config.model_type} norms its keys after they are scaled. The norm takes their common factor away again: "
        "IA3 weighs the channels of the keys against each other, but cannot sharpen or flatten attention as a "
        "whole. Values and inner activations are not concerned."
    )


def _describe_experts(config: Any) -> str:
    return (
        f"{config.model_type} keeps its experts in 3-D parameters, which PEFT's adapter layers do not reach: attention "
        "is adapted, the experts and the inner activations inside them are not."
    )


def _describe_places(config: Any, places: list[str]) -> str:
    if not places:
        return f"adapter.reach=whole changes nothing: what these targets name in {config.model_type}, PEFT reaches."
    return (
        f"adapter.reach=whole: {config.model_type} is rescaled in {', '.join(places)} too, by layers of koat's own. "
        "Plain PEFT opens the adapter's files without these vectors and says nothing; `koat merge` puts them into the "
        "weights. Layers without experts in a model with them keep their inner activation."
    )
