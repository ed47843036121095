"""A record: one row of a data file, read but not yet put into a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation; `role` is one of `ROLES`. An answer that is not supervised is only read."""

    role: str
    text: str
    supervised: bool = True


@dataclass(frozen=True, slots=True)
class Record:
    """One row: named texts, and for a conversation its turns.

    `group` names what the row shares its context with (an article's paragraph); empty when it shares nothing.
    `source` says where the row came from, for messages: `file:line`, or `file: item 3`.
    """

    fields: Mapping[str, str]
    turns: tuple[Turn, ...] = ()
    group: str = ""
    source: str = ""
