"""The row formats, as a table: how one row, a mapping of keys to values, becomes a record."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from koat.core.errors import suggest
from koat.data.records import ROLES, Record, Turn

_ROLE_NAMES = {role: role for role in ROLES} | {
    "human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"
}  # fmt: skip
_CHAT_KEYS = {"messages": ("role", "content"), "conversations": ("from", "value")}


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


def hash_context(title: str, context: str) -> str:
    """Name the group of everything that stands on one context."""
    return f"{title}:{blake2b(context.encode(errors='replace'), digest_size=8).hexdigest()}"


def _others(row: Mapping[str, Any], *taken: str) -> dict[str, str]:
    return {str(key): to_text(value) for key, value in row.items() if key not in taken}


def _parse_alpaca(row: Mapping[str, Any], source: str) -> Record:
    answer = "response" if "output" not in row and "response" in row else "output"
    fields = {
        "instruction": take_text(row, "instruction"),
        "input": take_text(row, "input", empty=True) if "input" in row else "",
        "output": take_text(row, answer),
    }
    return Record(_others(row, "instruction", "input", answer) | fields, source=source)


def _parse_prompt_completion(row: Mapping[str, Any], source: str) -> Record:
    answer = "response" if "completion" not in row and "response" in row else "completion"
    prompt, completion = take_text(row, "prompt"), take_text(row, answer)
    # Both pairs of names, so that built-in templates and the file's own words work alike.
    fields = {"prompt": prompt, "completion": completion, "instruction": prompt, "output": completion}
    return Record(_others(row, "prompt", answer) | fields, source=source)


def _parse_chat(row: Mapping[str, Any], source: str) -> Record:
    key = next((key for key in _CHAT_KEYS if key in row), "messages")
    if not isinstance(row.get(key), (list, tuple)):
        raise RowProblem(f"field {key!r} must be a list of messages, but holds {describe_value(row.get(key))}")
    turns = tuple(_parse_turn(turn, f"{key}[{index}]", *_CHAT_KEYS[key]) for index, turn in enumerate(row[key]))
    if not any(turn.role == "assistant" for turn in turns):
        raise RowProblem(f"field {key!r} has {len(turns)} messages and none from the assistant: nothing to learn")
    fields = _others(row, key)
    talk = [turn for turn in turns if turn.role != "system"]
    if [turn.role for turn in talk] == ["user", "assistant"]:
        # A single exchange fits every template, not the chat one alone.
        fields |= {"instruction": talk[0].text, "output": talk[1].text}
    return Record(fields, turns, source=source)


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
    return Turn(_ROLE_NAMES[role], text)


def _parse_squad(row: Mapping[str, Any], source: str) -> Record:
    """Read a flat question row: context, question, answers ({"text": [...]} or a list of {"text": ...})."""
    context, question = take_text(row, "context"), take_text(row, "question")
    answers = row.get("answers")
    texts = answers.get("text") if isinstance(answers, Mapping) else answers
    if not isinstance(texts, (list, tuple)):
        raise RowProblem(f"field 'answers' must be a list of answers, but holds {describe_value(answers)}")
    words = [answer.get("text") if isinstance(answer, Mapping) else answer for answer in texts]
    if not words:
        raise RowProblem("field 'answers' is empty; a question needs at least one answer to learn from")
    for index, word in enumerate(words):
        if not isinstance(word, str) or not word.strip():
            raise RowProblem(f"answers[{index}]: field 'text' must be text, but holds {describe_value(word)}")
    title = to_text(row.get("title"))
    fields: dict[str, str] = {
        "context": context,
        "question": question,
        "instruction": question,
        "output": str(words[0]),
        "title": title,
        "id": to_text(row.get("id")),
        "answers": json.dumps(words, ensure_ascii=False),
    }
    return Record(_others(row, "answers") | fields, group=hash_context(title, context), source=source)


def _parse_plain(row: Mapping[str, Any], source: str) -> Record:
    fields = _others(row)
    if "output" in fields and not fields["output"].strip():
        raise RowProblem("field 'output' is empty; it must hold text")
    return Record(fields, source=source)


@dataclass(frozen=True, slots=True)
class RowFormat:
    """One row format: what it looks like, how to recognise it by its keys, how to read a row."""

    looks_like: str
    recognise: Callable[[Collection[str]], bool]
    parse: Callable[[Mapping[str, Any], str], Record]
    nested: bool = False
    """Its fields are made from deeper values, so a column mapping applies to them, not to the file's keys."""


ROW_FORMATS: dict[str, RowFormat] = {
    "chat": RowFormat(
        'messages: [{"role", "content"}], or conversations: [{"from", "value"}]',
        lambda keys: any(key in keys for key in _CHAT_KEYS),
        _parse_chat,
        nested=True,
    ),
    "squad": RowFormat(
        "data: [{title, paragraphs: [{context, qas: [{question, answers}]}]}], or rows of these",
        lambda keys: {"context", "question", "answers"} <= set(keys),
        _parse_squad,
        nested=True,
    ),
    "alpaca": RowFormat(
        "instruction, output, and where there is one input (KoAlpaca's rows too)",
        lambda keys: "instruction" in keys and ("output" in keys or "response" in keys),
        _parse_alpaca,
    ),
    "prompt-completion": RowFormat(
        "prompt, and completion or response",
        lambda keys: "prompt" in keys and ("completion" in keys or "response" in keys),
        _parse_prompt_completion,
    ),
    "table": RowFormat(
        "TSV or CSV with a header row; for JSON rows, keys as they are",
        lambda keys: False,
        _parse_plain,
    ),
}


def recognise_format(keys: Collection[str]) -> str:
    """Return the name of the row format that has these keys, or an empty string."""
    return next((name for name, row_format in ROW_FORMATS.items() if row_format.recognise(keys)), "")


def describe_formats() -> str:
    """List the formats and what each looks like, one a line."""
    lines = [f"  {name}: {row_format.looks_like}" for name, row_format in ROW_FORMATS.items()]
    return "\n".join([*lines, "  datasets: a Hub id, a Parquet or Arrow file, a folder saved by `datasets`"])
