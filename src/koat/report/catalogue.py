"""Every setting there is, with default and help, read from the one place where it is defined."""

from __future__ import annotations

from collections.abc import Iterator
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from koat.core.config import Section
from koat.core.errors import ConfigError, suggest
from koat.core.explain import describe_allowed
from koat.core.schema import find_choices, find_sections, find_tag, split_union
from koat.report.settings import show_value
from koat.report.tables import make_table, print_table


def list_settings(schema: type[BaseModel], prefix: str = "", label: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield (key, default, help) for each setting; where methods differ, the key says which one it is of."""
    for name, field in schema.model_fields.items():
        sections = find_sections(field.annotation)
        if any(kind not in (*sections, NoneType) for kind in split_union(field.annotation)):
            yield f"{prefix}{name}{label}", _show_default(field), _describe(field)
        tag = find_tag(sections) if sections else None
        if tag:
            chosen = getattr(field.get_default(call_default_factory=True), tag, None)
            names = [
                repr(choice) for section in sections for choice in find_choices(section.model_fields[tag].annotation)
            ]
            yield f"{prefix}{name}.{tag}", show_value(chosen), f"{field.description} Allowed: {', '.join(names)}."
        for section in sections:
            mark = f" ({section.model_fields[tag].default})" if tag else label
            below = list_settings(section, f"{prefix}{name}.", mark)
            yield from (row for row in below if row[0] != f"{prefix}{name}.{tag}{mark}")


def print_catalogue(schema: type[Section], prefix: str) -> None:
    """Print all settings whose key begins with `prefix`. Raises ConfigError, with the nearest key, where none does."""
    everything = list(list_settings(schema))
    rows = [row for row in everything if row[0].startswith(prefix)]
    if not rows:
        keys = dict.fromkeys(key.split(" ")[0] for key, _, _ in everything)
        groups = dict.fromkeys(f"{key.rpartition('.')[0]}." for key in keys)
        raise ConfigError(
            f"no setting begins with {prefix!r}{suggest(prefix, [*groups, *keys])}; there are: {', '.join(groups)}"
        )
    print_table(make_table("Settings", ("setting", "default", "what it does"), rows, numeric=9))


def _show_default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    if isinstance(field.json_schema_extra, dict) and "shown" in field.json_schema_extra:
        return str(field.json_schema_extra["shown"])  # the value itself is decided elsewhere
    return "(needed)" if default is PydanticUndefined else show_value(default)


def _describe(field: FieldInfo) -> str:
    help = field.description or ""
    return f"{help} Allowed: {describe_allowed(field.annotation)}." if _names_choices(field.annotation) else help


def _names_choices(annotation: Any) -> bool:
    return get_origin(annotation) is Literal or any(map(_names_choices, get_args(annotation)))
