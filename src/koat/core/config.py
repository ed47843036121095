"""Typed settings from several sources: merge, validate once, and remember where each value came from.

A source is a `Layer` (a method's defaults, a recipe, a file, flags). `resolve` merges layers over a schema of
nested `Section` classes. Reading files and flags is in `config_files`, saying what is wrong in `explain`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, Generic, TypeVar, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from koat.core.config_files import with_text_keys
from koat.core.errors import ConfigError
from koat.core.explain import Diagnosis
from koat.core.schema import choose_branch, find_choices, find_sections, find_tag, split_union


class Section(BaseModel):
    """Base of every group of settings: frozen, with unknown keys refused and defaults checked."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _prepare(cls, values: Any) -> Any:
        """Let one text stand for a list of one and nothing for the choice `none`, which YAML here reads as nothing.

        Truth values are made to fail where they would pass for 0 and 1.
        """
        if not isinstance(values, Mapping):
            return values
        prepared = dict(values)
        for name in cls.model_fields.keys() & prepared.keys():
            value = prepared[name]
            annotation = cls.model_fields[name].annotation
            kinds = [kind for kind in split_union(annotation) if kind is not NoneType]
            if isinstance(value, bool) and bool not in kinds and (int in kinds or float in kinds):
                prepared[name] = str(value).lower()
            elif value is None and NoneType not in split_union(annotation) and "none" in find_choices(annotation):
                prepared[name] = "none"
            elif isinstance(value, str) and kinds and all(get_origin(kind) is list for kind in kinds):
                prepared[name] = [value]
        return prepared


S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class Layer:
    """One source of nested values; `origin` is "method", "recipe", "file" or "flag"."""

    origin: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Resolved(Generic[S]):
    """Valid settings and, by dotted leaf key, the origin of each value ("default" where no layer set it)."""

    settings: S
    origins: dict[str, str]


@dataclass(frozen=True)
class SettingRow:
    """One setting, for printing."""

    key: str
    value: Any
    origin: str
    help: str


def resolve(schema: type[S], layers: Sequence[Layer]) -> Resolved[S]:
    """Merge layers, later over earlier, and validate the result once.

    Sections merge key by key; plain mappings and lists are replaced whole. Raises one ConfigError that lists
    every problem, one per line.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = _merge([schema], merged, with_text_keys(layer.values))
    merged = _fill(schema, merged)
    try:
        settings = schema.model_validate(merged)
    except ValidationError:
        diagnosis = Diagnosis(known_keys(schema), lambda key: _origin(key, layers))
        problems = diagnosis.of_section(schema, merged, "")
        head = [] if len(problems) == 1 else [f"{len(problems)} problems in the settings:"]
        raise ConfigError("\n  ".join(head + problems)) from None
    return Resolved(settings, {key: _origin(key, layers) for key, _, _ in _leaves(settings)})


def describe(resolved: Resolved[S]) -> list[SettingRow]:
    """List every leaf setting in schema order, with its value, origin and help."""
    return [
        SettingRow(key, value, resolved.origins.get(key, "default"), help)
        for key, value, help in _leaves(resolved.settings)
    ]


def known_keys(schema: type[BaseModel]) -> list[str]:
    """List all dotted keys that can be set, over all branches of unions."""
    keys: dict[str, None] = {}
    for name, field in schema.model_fields.items():
        sections = find_sections(field.annotation)
        if any(kind not in (*sections, NoneType) for kind in split_union(field.annotation)):
            keys[name] = None
        for section in sections:
            keys.update({f"{name}.{key}": None for key in known_keys(section)})
    return list(keys)


def to_mapping(settings: Section) -> dict[str, Any]:
    """Return settings as nested plain values (paths as text) that `resolve` accepts again unchanged."""
    return settings.model_dump(mode="json")


# Merging ----------------------------------------------------------------------------------------------------


def _merge(sections: Sequence[type[BaseModel]], base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in over.items():
        below = [
            child for section in sections if name in section.model_fields
            for child in find_sections(section.model_fields[name].annotation)
        ]  # fmt: skip
        before = base.get(name)
        if below and isinstance(value, Mapping):
            value = _merge(below, before if isinstance(before, Mapping) else {}, value)
        merged[name] = value
    return merged


def _fill(section: type[BaseModel], values: dict[str, Any]) -> dict[str, Any]:
    """Stand in for sections left out or blank, and for a union's tag that its default decides."""
    for name, field in section.model_fields.items():
        sections = find_sections(field.annotation)
        if not sections or len(sections) < len(list(split_union(field.annotation))):
            continue
        if values.get(name) is None:
            values.pop(name, None)
            if field.is_required():
                values[name] = {}
        given, tag = values.get(name), find_tag(sections)
        if isinstance(given, dict):
            if tag and not field.is_required():
                given.setdefault(tag, getattr(field.get_default(call_default_factory=True), tag, None))
            if branch := choose_branch(sections, given):
                _fill(branch, given)
    return values


def _origin(key: str, layers: Sequence[Layer]) -> str:
    for layer in reversed(layers):
        node: Any = layer.values
        for name in key.split("."):
            if not isinstance(node, Mapping):
                return "default"  # this layer replaced the whole section
            if name not in node:
                break
            node = node[name]
        else:
            return layer.origin
    return "default"


def _leaves(settings: Section, path: str = "") -> Iterator[tuple[str, Any, str]]:
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, Section):
            yield from _leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value, field.description or ""
