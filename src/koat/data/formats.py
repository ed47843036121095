"""The row formats, as a table: how one row, a mapping of keys to values, becomes a record."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from koat.data.messages import MESSAGE_KEYS, parse_chat
from koat.data.records import Record
from koat.data.row_values import RowProblem, describe_value, take_text, take_texts, to_text


def hash_context(title: str, context: str) -> str:
    """Name the group of everything that stands on one context."""
    return f"{title}:{blake2b(context.encode(errors='replace'), digest_size=8).hexdigest()}"


def _parse_alpaca(row: Mapping[str, Any], source: str) -> Record:
    answer = "response" if "output" not in row and "response" in row else "output"
    fields = {
        "instruction": take_text(row, "instruction"),
        "input": take_text(row, "input", empty=True) if "input" in row else "",
        "output": take_text(row, answer),
    }
    return Record(take_texts(row, "instruction", "input", answer) | fields, source=source)


def _parse_prompt_completion(row: Mapping[str, Any], source: str) -> Record:
    answer = "response" if "completion" not in row and "response" in row else "completion"
    prompt, completion = take_text(row, "prompt"), take_text(row, answer)
    # Both pairs of names, so that built-in templates and the file's own words work alike.
    fields = {"prompt": prompt, "completion": completion, "instruction": prompt, "output": completion}
    return Record(take_texts(row, "prompt", answer) | fields, source=source)


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
    return Record(take_texts(row, "answers") | fields, group=hash_context(title, context), source=source)


def _parse_plain(row: Mapping[str, Any], source: str) -> Record:
    fields = take_texts(row)
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
        lambda keys: any(key in keys for key in MESSAGE_KEYS),
        parse_chat,
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
