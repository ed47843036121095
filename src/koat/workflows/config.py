"""The whole configuration of a run, put together from each room's settings and from every source."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from koat.adapters.methods import METHODS, AdapterSettings, Ia3Settings, default_values
from koat.core.config import Layer, Resolved, Section, resolve
from koat.core.config_files import read_config_file
from koat.core.errors import ConfigError, suggest
from koat.core.settings import DataSettings, ModelSettings, TrainingSettings

RECIPES = Path(__file__).parent.parent / "recipes"


class RunConfig(Section):
    """Everything a fine-tuning run depends on."""

    model: ModelSettings = Field(description="The base model.")
    data: DataSettings = Field(description="Training and validation data.")
    adapter: AdapterSettings = Field(default_factory=Ia3Settings, description="The method and its settings.")
    training: TrainingSettings = Field(default_factory=TrainingSettings, description="The training loop.")

    @field_validator("data")
    @classmethod
    def _expand_homes(cls, data: DataSettings) -> DataSettings:
        """Let `~` stand for the user's home in a file of settings, where no shell replaces it."""
        places = {name: [os.path.expanduser(each) for each in getattr(data, name)] for name in ("train", "validation")}
        splits = data.splits and Path(os.path.expanduser(data.splits))
        return data.model_copy(update={**places, "splits": splits})


class PlanConfig(Section):
    """What planning needs: no data."""

    model: ModelSettings = Field(description="The base model.")
    adapter: AdapterSettings = Field(default_factory=Ia3Settings, description="The method and its settings.")
    training: TrainingSettings = Field(default_factory=TrainingSettings, description="The training loop.")


def list_recipes() -> list[str]:
    """Return the names of the recipes that ship."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_recipe(name: str) -> dict[str, Any]:
    """Return a recipe's settings. Raises ConfigError with the nearest name."""
    return {key: value for key, value in _read_recipe_file(name).items() if key != "description"}


def describe_recipe(name: str) -> str:
    """Return the sentence that a recipe says about itself."""
    return str(_read_recipe_file(name).get("description", ""))


def _read_recipe_file(name: str) -> dict[str, Any]:
    path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        known = list_recipes()
        raise ConfigError(f"There is no recipe {name!r}{suggest(name, known)}. Recipes: {', '.join(known)}.")
    return read_config_file(path)


def find_value(layers: list[Layer], path: tuple[str, ...]) -> Any:
    """Return the value at a dotted path in the last layer that sets it, or None."""
    found = None
    for layer in layers:
        value: Any = layer.values
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        found = found if value is None else value
    return found


def resolve_run(
    schema: type[Any],
    *,
    recipe: str | None = None,
    file: Path | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Resolved[Any]:
    """Resolve a configuration from method defaults, recipe, file and flags, later over earlier.

    Raises ConfigError with all problems at once.
    """
    layers = [Layer("recipe", read_recipe(recipe))] if recipe else []
    layers += [Layer("file", read_config_file(file))] if file else []
    return resolve_layers(schema, [*layers, Layer("flag", flags or {})])


def resolve_layers(schema: type[Any], layers: list[Layer]) -> Resolved[Any]:
    """Resolve a configuration from the defaults of the method that the layers choose, and the layers over them."""
    method = find_value(layers, ("adapter", "method")) or "ia3"
    brought: dict[str, Any] = {"adapter": {"method": method}}
    if isinstance(method, str) and method in METHODS:
        brought |= default_values(method)
    if schema is PlanConfig:
        layers = [Layer(layer.origin, {k: v for k, v in layer.values.items() if k != "data"}) for layer in layers]
    return resolve(schema, [Layer("method", brought), *layers])
