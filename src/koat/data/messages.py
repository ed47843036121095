"""Conversations: rows that hold messages, with roles, weights, and perhaps a system message beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from koat.core.errors import suggest
from koat.data.records import ROLES, Record, Turn
from koat.data.row_values import RowProblem, describe_value, join_names, take_text, take_texts

MESSAGE_KEYS = {"messages": ("role", "content"), "conversations": ("from", "value")}
"""Where a row's messages stand, and what they call role and text."""
_ROLE_NAMES = {role: role for role in ROLES} | {
    "human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"
}  # fmt: skip


def parse_chat(row: Mapping[str, Any], source: str) -> Record:
    """Read a conversation; an exchange of one question and one answer gets the fields of an instruction too."""
    key = _find_key(row)
    if not isinstance(row.get(key), (list, tuple)):
        raise RowProblem(f"field {key!r} must be a list of messages, but holds {describe_value(row.get(key))}")
    turns = tuple(_parse_turn(turn, f"{key}[{index}]", *MESSAGE_KEYS[key]) for index, turn in enumerate(row[key]))
    answers = [turn for turn in turns if turn.role == "assistant"]
    if not any(turn.supervised for turn in answers):
        missing = "but all of weight 0" if answers else "and none from the assistant"
        raise RowProblem(f"field {key!r} has {len(turns)} messages {missing}: nothing to learn")
    fields = take_texts(row, key)
    talk = [turn for turn in turns if turn.role != "system"]
    if [turn.role for turn in talk] == ["user", "assistant"]:
        # A single exchange fits every template, not the chat one alone.
        system = "\n\n".join(turn.text for turn in turns if turn.role == "system")
        fields |= {"instruction": talk[0].text, "output": talk[1].text}
        fields |= {"system": system} if system else {}
    return Record(fields, turns, source=source)


def put_system_first(turns: tuple[Turn, ...], system: str) -> tuple[Turn, ...]:
    """Return a conversation that begins with the system message from beside it, unless it has one of its own."""
    if not turns or not system.strip() or any(turn.role == "system" for turn in turns):
        return turns
    return (Turn("system", system), *turns)


def describe_unread(rows: Iterable[Any]) -> list[str]:
    """Say how many messages hold more than role, text and weight, and under which keys, if any do."""
    unread: Counter[str] = Counter()
    num_messages = 0
    for row in rows:
        key = _find_key(row) if isinstance(row, Mapping) else ""
        for message in row.get(key) or () if key else ():
            found = [name for name, value in message.items() if name not in (*MESSAGE_KEYS[key], "weight") and value]
            unread.update(map(str, found))
            num_messages += bool(found)
    names = join_names([name for name, _ in unread.most_common()])
    return [f"{num_messages:,} messages hold what no template renders, under the keys: {names}"] if unread else []


def _find_key(row: Mapping[str, Any]) -> str:
    return next((key for key in MESSAGE_KEYS if key in row), "messages")


def _parse_turn(turn: Any, place: str, role_key: str, text_key: str) -> Turn:
    if not isinstance(turn, Mapping):
        raise RowProblem(f"{place} must be an object with {role_key!r} and {text_key!r}, not {describe_value(turn)}")
    try:
        role, text = take_text(turn, role_key), take_text(turn, text_key)
    except RowProblem as problem:
        raise RowProblem(f"{place}: {problem}") from None
    if role not in _ROLE_NAMES:
        raise RowProblem(
            f"{place}: unknown role {role!r}{suggest(role, _ROLE_NAMES)}; known: {join_names(_ROLE_NAMES)}"
        )
    weight = turn.get("weight")
    if isinstance(weight, bool) or weight not in (None, 0, 1):
        raise RowProblem(f"{place}: field 'weight' must be 0 (not trained on) or 1, but holds {describe_value(weight)}")
    return Turn(_ROLE_NAMES[role], text, supervised=weight != 0)
