"""Looking at a schema: what the annotations of its fields allow, and which section a mapping means.

A schema is a pydantic model. A field may hold a section (another model), a union of sections that one of
their keys (the tag) tells apart, or a plain value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel


def split_union(annotation: Any) -> Iterator[Any]:
    """Yield the members of a union, through Annotated; anything else is its own only member."""
    if get_origin(annotation) is Annotated:
        yield from split_union(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for member in get_args(annotation):
            yield from split_union(member)
    else:
        yield annotation


def find_sections(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections among the members of a union."""
    return [kind for kind in split_union(annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]


def find_choices(annotation: Any) -> list[Any]:
    """Return the values of the literals among the members of a union."""
    return [choice for kind in split_union(annotation) if get_origin(kind) is Literal for choice in get_args(kind)]


def find_tag(sections: Sequence[type[BaseModel]]) -> str | None:
    """Return the key whose value tells the branches of a union apart, if there is one."""
    for name in sections[0].model_fields if len(sections) > 1 else ():
        fields = [section.model_fields.get(name) for section in sections]
        if all(field is not None and find_choices(field.annotation) for field in fields):
            return name
    return None


def choose_branch(sections: Sequence[type[BaseModel]], values: Mapping[str, Any]) -> type[BaseModel] | None:
    """Return the branch of a union that a mapping evidently means; None where its tag names no branch."""
    tag = find_tag(sections)
    if tag is None:
        return max(sections, key=lambda section: len(section.model_fields.keys() & values.keys()))
    named = [section for section in sections if values.get(tag) in find_choices(section.model_fields[tag].annotation)]
    return named[0] if named else None
