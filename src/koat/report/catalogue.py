"""Every setting there is, with default and help, read from the one place where it is defined."""

from __future__ import annotations

from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from koat.core.config import Section
from koat.core.schema import find_sections
from koat.report.settings import show_value
from koat.report.tables import make_table, print_table


def list_settings(schema: type[BaseModel], prefix: str = "", label: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield (key, default, help) for each setting; where methods differ, the key says which one it is of."""
    for name, field in schema.model_fields.items():
        sections = find_sections(field.annotation)
        plain = any(part not in (NoneType, *sections) for part in get_args(field.annotation) or (field.annotation,))
        if sections and not (plain and get_origin(field.annotation) in (Union, UnionType)):
            for section in sections:
                tag = section.model_fields.get("method")
                mark = f" ({tag.default})" if tag is not None and len(sections) > 1 else ""
                yield from list_settings(section, f"{prefix}{name}.", mark)
            continue
        default = field.get_default(call_default_factory=True)
        shown = "(needed)" if default is PydanticUndefined else show_value(default)
        yield f"{prefix}{name}{label}", shown, field.description or ""


def print_catalogue(schema: type[Section], prefix: str) -> None:
    """Print all settings whose key begins with `prefix`."""
    rows = [row for row in list_settings(schema) if row[0].startswith(prefix)]
    print_table(make_table("Settings", ("setting", "default", "what it does"), rows, numeric=9))
