"""SQuAD and KorQuAD documents: articles of paragraphs of questions, laid out as one row per question."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from koat.core.errors import DataError
from koat.data.opening import RawRow
from koat.data.row_values import describe_value, join_names


def is_squad_document(document: Any) -> bool:
    """Tell whether a JSON document has the shape of SQuAD: `data`, a list of articles with `paragraphs`."""
    if not isinstance(document, Mapping) or not isinstance(document.get("data"), list):
        return False
    return any(isinstance(article, Mapping) and "paragraphs" in article for article in document["data"])


def read_questions(document: Any, name: str) -> Iterator[RawRow]:
    """Yield one flat row per question, with its context and title; broken parts come with their problem.

    A source is a path into the document, such as `file: data[0].paragraphs[2].qas[1]`. Raises DataError when
    the document has no articles at all.
    """
    if not is_squad_document(document):
        found = join_names(document) if isinstance(document, Mapping) else describe_value(document)
        raise DataError(f"{name}: is not in the SQuAD format: 'data' with 'paragraphs' is expected; found: {found}")
    for index, article in enumerate(document["data"]):
        place = f"{name}: data[{index}]"
        for where, paragraph in _walk(article, "paragraphs", place):
            if isinstance(paragraph, RawRow):
                yield paragraph
                continue
            for source, question in _walk(paragraph, "qas", where):
                if isinstance(question, RawRow):
                    yield question
                    continue
                row = {str(key): value for key, value in question.items()}
                shared = {"title": article.get("title", "")}
                if "context" in paragraph:
                    shared["context"] = paragraph["context"]
                yield RawRow(source, row | shared)


def _walk(parent: Any, key: str, place: str) -> Iterator[tuple[str, Mapping[str, Any] | RawRow]]:
    """Yield the objects in the list under `key` with their places; a RawRow for what cannot be used."""
    if not isinstance(parent, Mapping) or not isinstance(parent.get(key), list):
        got = parent.get(key) if isinstance(parent, Mapping) else parent
        yield place, RawRow(place, problem=f"field {key!r} must be a list, but holds {describe_value(got)}")
        return
    for index, child in enumerate(parent[key]):
        where = f"{place}.{key}[{index}]"
        if isinstance(child, Mapping):
            yield where, child
        else:
            yield where, RawRow(where, problem=f"must be an object, but is {describe_value(child)}")


def find_misplaced_answers(row: Mapping[str, Any]) -> list[str]:
    """Say which answers do not stand at their `answer_start` in the context; koat does not rely on it."""
    answers, context = row.get("answers"), row.get("context")
    if not isinstance(answers, list) or not isinstance(context, str):
        return []
    notes = []
    for index, answer in enumerate(answers):
        start = answer.get("answer_start") if isinstance(answer, Mapping) else None
        text = answer.get("text") if isinstance(answer, Mapping) else None
        if not isinstance(start, int) or not isinstance(text, str):
            continue
        found = context[start : start + len(text)] if 0 <= start <= len(context) else None
        if found is None:
            notes.append(f"answers[{index}]: answer_start {start} lies outside the context (0 to {len(context)})")
        elif found != text:
            notes.append(f"answers[{index}]: at answer_start {start} stands {found!r}, the answer is {text!r}")
    return notes
