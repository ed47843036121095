"""From what a user calls targets to module names, refusing names that match nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from koat.adapters.architectures import find_architecture
from koat.core.errors import AdapterError, suggest

LINEARS = (nn.Linear, Conv1D)
"""What PEFT's linear layers go around; families and bitsandbytes derive classes of their own from it."""


def list_linears(model: nn.Module) -> list[str]:
    """Return the names of a model's linear layers, layer numbers replaced by `*`, each once."""
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    names = []
    for name, module in model.named_modules():
        if module is not head and isinstance(module, LINEARS):
            names.append(".".join("*" if part.isdigit() else part for part in name.split(".")))
    return list(dict.fromkeys(names))


def check_targets(model: nn.Module, names: Iterable[str]) -> None:
    """Raise AdapterError for any target that matches no layer of the model, by PEFT's rule.

    A name matches a linear layer or an embedding that is called so, or whose name ends in it after a dot.
    """
    layers = [name for name, module in model.named_modules() if isinstance(module, (*LINEARS, nn.Embedding))]
    linears = list_linears(model)
    endings = {".".join(name.split(".")[-count:]) for name in linears for count in (1, 2, 3)}
    for name in names:
        if not any(layer == name or layer.endswith(f".{name}") for layer in layers):
            raise AdapterError(
                f"The target {name!r} matches no layer{suggest(name, endings)}. This model has: {', '.join(linears)}."
            )


def covers(targets: Iterable[str], layer: str) -> bool:
    """Whether targets include a layer, by PEFT's rule: names match by their ends."""
    return any(f".{name}".endswith(f".{layer}") or f".{layer}".endswith(f".{name}") for name in targets)


def read_peft_default(mapping_name: str, config: Any) -> list[str]:
    """Return PEFT's default modules for a model family from one of its mappings."""
    from peft.utils import constants

    mapping = getattr(constants, mapping_name)
    if config.model_type not in mapping:
        raise AdapterError(
            f"PEFT has no default targets for the model family {config.model_type!r}. "
            "Use adapter.targets=paper, attention, all-linear, or name the layers."
        )
    return list(mapping[config.model_type])


def resolve_roles(targets: str, config: Any) -> list[str]:
    """Return the linear layers that `attention` or `all-linear` stand for, outputs only."""
    architecture = find_architecture(config)
    if targets == "all-linear":
        return list(architecture.linears)
    names = (architecture.query, architecture.key, architecture.value, architecture.attention_output)
    return list(dict.fromkeys(names))
