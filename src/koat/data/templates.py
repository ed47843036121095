"""What a prompt template is, and the kind that is written as text with fields in braces."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from string import Formatter
from typing import TYPE_CHECKING, Any

from koat.core.errors import DataError, suggest
from koat.data.records import Record
from koat.data.row_values import compose

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT_FIELDS = ("context", "input")
"""Fields that `overflow: truncate_context` may shorten; of several in one prompt, the first named here."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of text, supervised or given; `is_context` marks the given part that may be shortened."""

    text: str
    supervised: bool
    is_context: bool = False


class PromptTemplate(ABC):
    """Turns a record into segments, the same way for training and for inference."""

    name: str

    @abstractmethod
    def render(self, record: Record) -> list[Segment]:
        """Return the record's segments in order, the prompt first.

        Raises DataError when the record lacks a field that the template names.
        """

    @abstractmethod
    def render_prompt(self, record: Record) -> str:
        """Return what is given to the model at inference; the record needs no response for it."""

    @abstractmethod
    def to_mapping(self) -> dict[str, Any]:
        """Describe the template in plain values, to be saved beside an adapter."""

    def is_blank(self, record: Record) -> bool:
        """Whether all fields that the record's prompt is made of are empty."""
        return False

    def drops_system(self, record: Record) -> bool:
        """Whether the record has a system message that its prompt has no place for."""
        return False

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> PromptTemplate:
        """Return the template for use with this tokenizer; most templates do not depend on one."""
        return self


@dataclass(frozen=True)
class TextTemplate(PromptTemplate):
    """A template written as text with fields in braces.

    `prompts` are tried in order: the first whose fields the record all has, none of them empty, is taken; the
    last one also takes records with empty fields. `response` is joined to the prompt as it stands.
    """

    name: str
    prompts: tuple[str, ...]
    response: str = " {output}"
    _parsed: tuple[list[tuple[str, str]], ...] = field(init=False, repr=False, compare=False)
    _parsed_response: list[tuple[str, str]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.prompts:
            raise DataError(f"template {self.name!r} has no prompt")
        object.__setattr__(self, "_parsed", tuple(_parse(self.name, "prompt", text) for text in self.prompts))
        object.__setattr__(self, "_parsed_response", _parse(self.name, "response", self.response))
        if not any(name for _, name in self._parsed_response):
            raise DataError(
                f"template {self.name!r}: the response {self.response!r} names no field, so every row would "
                "be trained on the same text; put a field in braces, for example {output}"
            )

    def render(self, record: Record) -> list[Segment]:
        """Return the prompt's segments (three where it holds a context) and the response."""
        response = self._fill(self._parsed_response, record)
        return [*self._render_given(record), Segment(response, supervised=True)]

    def render_prompt(self, record: Record) -> str:
        """Return the prompt alone."""
        return "".join(segment.text for segment in self._render_given(record))

    def to_mapping(self) -> dict[str, Any]:
        """Describe the template in plain values."""
        return {"kind": "text", "name": self.name, "prompts": list(self.prompts), "response": self.response}

    def list_fields(self) -> list[str]:
        """Return the fields that its prompts name, in order."""
        return list(dict.fromkeys(name for parts in self._parsed for _, name in parts if name))

    def is_blank(self, record: Record) -> bool:
        """Whether all fields that the record's prompt is made of are empty."""
        named = [name for _, name in self._choose_prompt(record) if name]
        return bool(named) and not any(record.fields.get(name, "").strip() for name in named)

    def drops_system(self, record: Record) -> bool:
        """Whether the record has a system message that its prompt has no place for."""
        has_one = any(turn.role == "system" for turn in record.turns) or record.fields.get("system", "").strip()
        return bool(has_one) and all(name != "system" for _, name in self._choose_prompt(record))

    def _choose_prompt(self, record: Record) -> list[tuple[str, str]]:
        return next((parts for parts in self._parsed[:-1] if self._fits(parts, record)), self._parsed[-1])

    def _render_given(self, record: Record) -> list[Segment]:
        parts = self._choose_prompt(record)
        named = [name for _, name in parts]
        context = next((name for name in CONTEXT_FIELDS if name in named), "")
        if not context:
            return [Segment(self._fill(parts, record), supervised=False)]
        at = named.index(context)
        before, text, after = (
            self._fill(parts[:at], record) + parts[at][0],
            record.fields.get(context),
            parts[at + 1 :],
        )
        if text is None:
            raise DataError(self._explain_missing(context, record))
        return [
            Segment(before, supervised=False),
            Segment(text, supervised=False, is_context=True),
            Segment(self._fill(after, record), supervised=False),
        ]

    @staticmethod
    def _fits(parts: list[tuple[str, str]], record: Record) -> bool:
        return all(record.fields.get(name, "").strip() for _, name in parts if name)

    def _fill(self, parts: list[tuple[str, str]], record: Record) -> str:
        texts = []
        for literal, name in parts:
            texts.append(literal)
            if name:
                if name not in record.fields:
                    raise DataError(self._explain_missing(name, record))
                texts.append(record.fields[name])
        return "".join(texts)

    def _explain_missing(self, name: str, record: Record) -> str:
        has = ", ".join(record.fields) or "no fields"
        if record.turns:
            advice = f"The row is a conversation of {len(record.turns)} messages: data.template=chat renders those"
        else:
            advice = f"Map a column to it (data.columns='{{{name}: COLUMN}}') or choose another data.template"
        return (
            f"template {self.name!r} needs the field {name!r}{suggest(name, record.fields)}, which the row "
            f"{record.source or 'given'} does not have; it has: {has}. {advice}"
        )


def _parse(template: str, part: str, text: str) -> list[tuple[str, str]]:
    """Split text into pairs of a literal and the field behind it (empty for none)."""
    parts = []
    try:
        for literal, name, spec, conversion in Formatter().parse(text):
            if name is not None and (not name.strip() or spec or conversion):
                written = f"{{{name}{'!' + conversion if conversion else ''}{':' + spec if spec else ''}}}"
                raise DataError(
                    f"template {template!r}: {written} in the {part} is not a field; write a field's name "
                    "alone in braces, and double braces that are meant literally: {{ }}"
                )
            parts.append((literal, compose(name or "")))
    except ValueError as error:
        raise DataError(
            f"template {template!r}: the {part} {text!r} cannot be read: {error}; "
            "double braces that are meant literally: {{ }}"
        ) from None
    return parts
