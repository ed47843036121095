"""Wrong answers to an example: its response with another word of the same coded field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from koat.data.records import Record
from koat.data.templates import PromptTemplate, Segment


def render_others(
    record: Record, template: PromptTemplate, segments: Sequence[Segment], choices: Mapping[str, Sequence[str]]
) -> list[str]:
    """Return the responses that other words of `choices` (all words by field) would give, each once.

    `segments` are the record's own. A word that also changes the prompt is no choice there.
    """
    found: dict[str, None] = {}
    for field, words in choices.items():
        for word in words if field in record.fields else ():
            *given, response = template.render(replace(record, fields={**record.fields, field: word}))
            if given == segments[:-1] and response.text != segments[-1].text and response.text.strip():
                found[response.text] = None
    return list(found)
