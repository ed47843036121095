"""Values of a row: taking texts from them, and saying what they are where they are something else."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from koat.core.errors import suggest

T = TypeVar("T")


class RowProblem(Exception):
    """A row cannot be used; the message names the field, what was received and what is expected."""


def describe_value(value: Any) -> str:
    """Say in a few words what a value is: "the number 42", "a list of 3", "nothing (null)"."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, str):
        return f"the text {value[:40] + '...' if len(value) > 40 else value!r}" if value.strip() else "empty text"
    if isinstance(value, bool):
        return f"{to_text(value)}"
    if isinstance(value, (int, float)):
        return f"the number {value}"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return f"an object with the keys {join_names(value)}"
    return f"a value of type {type(value).__name__}"


def join_names(names: Collection[str]) -> str:
    """List names for a message, at most twenty of them."""
    shown = [str(name) for name in names]
    return ", ".join(shown[:20]) + (f" and {len(shown) - 20} more" if len(shown) > 20 else "") or "none"


def compose(name: str) -> str:
    """Return a name with its letters put together (NFC): macOS takes Hangul apart, and it looks the same."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def compose_keys(mapping: Mapping[str, T]) -> dict[str, T]:
    """Return a mapping whose keys have their letters put together."""
    return {compose(str(key)): value for key, value in mapping.items()}


def to_text(value: Any) -> str:
    """Turn any value into text: text as it is, null into nothing, numbers plainly, the rest as JSON."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        return str(value)


def take_text(row: Mapping[str, Any], key: str, *, empty: bool = False) -> str:
    """Return the text under `key`; raise RowProblem when it is missing, of another type, or empty."""
    if key not in row:
        raise RowProblem(f"field {key!r} is missing{suggest(key, row)}; the row has: {join_names(row)}")
    value = row[key]
    if empty and value is None:
        return ""
    if not isinstance(value, str):
        raise RowProblem(f"field {key!r} must be text, but holds {describe_value(value)}")
    if not empty and not value.strip():
        raise RowProblem(f"field {key!r} is empty; it must hold text")
    return value


def take_texts(row: Mapping[str, Any], *taken: str) -> dict[str, str]:
    """Return all values of a row as texts but for the keys `taken`."""
    return {str(key): to_text(value) for key, value in row.items() if key not in taken}
