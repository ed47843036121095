"""Resolved settings with the origin of each value."""

from __future__ import annotations

from typing import Any

from koat.core.config import Resolved, describe
from koat.report.tables import make_table, print_table


def print_settings(resolved: Resolved[Any]) -> None:
    """Print settings, their values and where each comes from."""
    rows = [(row.key, show_value(row.value), row.origin) for row in describe(resolved)]
    print_table(make_table("Settings", ("setting", "value", "origin"), rows, numeric=9))


def show_value(value: Any) -> str:
    """Return a setting's value as one would type it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, str) and value.strip() != value else str(value)
