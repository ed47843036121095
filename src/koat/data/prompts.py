"""Prompt templates: those that ship, and how a setting or a saved file names one.

The shipped ones' prompts end in a colon, never in white space, and the response is joined with one space:
KoAlpaca's models were trained on that (`### 답변: ...`), and a word with its leading space is one token in
most vocabularies. Templates of one's own are taken literally.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from koat.core.errors import DataError, suggest
from koat.core.settings import TemplateSettings
from koat.data.chat import ChatTemplate
from koat.data.templates import PromptTemplate, Segment, TextTemplate

__all__ = [
    "BUILTIN_TEMPLATES",
    "PromptTemplate",
    "Segment",
    "describe_template",
    "from_mapping",
    "list_templates",
    "resolve_template",
]

_QUESTION = "### 질문: {instruction}"
_ANSWER = "### 답변:"
_STANFORD = "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"


def _join(*parts: str) -> str:
    return "\n\n".join(parts)


KOALPACA = TextTemplate(
    "koalpaca",
    (
        _join(_QUESTION, "### 맥락: {input}", _ANSWER),
        _join(_QUESTION, "### 맥락: {context}", _ANSWER),
        _join(_QUESTION, _ANSWER),
    ),
)
"""KoAlpaca's own form: question, context where the row has one, answer.

Its published code is at github.com/Beomi/KoAlpaca.
"""

KOALPACA_CONTEXT = TextTemplate(
    "koalpaca-context",
    (
        _join("### 맥락: {context}", _QUESTION, _ANSWER),
        _join("### 맥락: {input}", _QUESTION, _ANSWER),
        _join(_QUESTION, _ANSWER),
    ),
)
"""KoAlpaca's words with the context first, so that questions about one article begin with the same tokens.

A forest computes those once; with the question first, nothing but the first word is shared.
"""

KOALPACA_QUESTION_FIRST = TextTemplate("koalpaca-question-first", (_join(_QUESTION, "### 맥락: {context}", _ANSWER),))
"""KoAlpaca's original order; every row must have a context."""

KOAT = TextTemplate(
    "koat",
    (
        "{context}\n\n{instruction}\n\n정답:",
        "{input}\n\n{instruction}\n\n정답:",
        "{instruction}\n\n정답:",
    ),
)
"""As few words around the row as can be, the context first where there is one."""

ALPACA = TextTemplate(
    "alpaca",
    (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        + _STANFORD
        + "### Input:\n{input}\n\n### Response:",
        "Below is an instruction that describes a task. " + _STANFORD + "### Response:",
    ),
)
"""Stanford Alpaca's two prompts, word for word (github.com/tatsu-lab/stanford_alpaca)."""

BUILTIN_TEMPLATES: dict[str, PromptTemplate] = {
    template.name: template
    for template in (KOALPACA, KOALPACA_CONTEXT, KOALPACA_QUESTION_FIRST, KOAT, ALPACA, ChatTemplate("chat"))
}

DESCRIPTIONS = {
    "koalpaca": "KoAlpaca's: ### 질문, ### 맥락 (where a row has one), ### 답변; the default",
    "koalpaca-context": "the same with the context first, so that questions on one text share it",
    "koalpaca-question-first": "koalpaca for rows that must all have a context",
    "koat": "nothing but the context, the instruction and 정답:",
    "alpaca": "Stanford Alpaca's English prompts, word for word",
    "chat": "the chat template that comes with the base model's tokenizer",
}


def resolve_template(
    setting: str | TemplateSettings | Sequence[str | TemplateSettings],
) -> list[PromptTemplate]:
    """Return the templates that a setting names or spells out, in order.

    Raises DataError for an unknown name, a template that cannot be read, or one that is listed twice.
    """
    listed = [setting] if isinstance(setting, (str, TemplateSettings)) else list(setting)
    if not listed:
        raise DataError("the list of templates is empty; name at least one")
    templates = [_resolve_one(item) for item in listed]
    for index, template in enumerate(templates):
        if template in templates[:index]:
            raise DataError(f"template {template.name!r} is listed twice; every row would be trained on twice")
    return templates


def list_templates() -> list[str]:
    """Return the names of the templates that ship."""
    return list(BUILTIN_TEMPLATES)


def describe_template(name: str) -> str:
    """Return what a shipped template looks like, in half a sentence."""
    return DESCRIPTIONS[name]


def _resolve_one(setting: str | TemplateSettings) -> PromptTemplate:
    if isinstance(setting, TemplateSettings):
        return TextTemplate(setting.name, (setting.prompt,), setting.response)
    if setting not in BUILTIN_TEMPLATES:
        hint = "; a template of your own is given as data.template.prompt=..." if "{" in setting else ""
        raise DataError(
            f"unknown template {setting!r}{suggest(setting, BUILTIN_TEMPLATES)}; "
            f"there are: {', '.join(BUILTIN_TEMPLATES)}{hint}"
        )
    return BUILTIN_TEMPLATES[setting]


def from_mapping(mapping: Mapping[str, Any]) -> PromptTemplate:
    """Rebuild a template from what its `to_mapping` gave; raise DataError for anything else."""
    kind = str(mapping.get("kind"))
    if kind not in _KINDS:
        raise DataError(f"a saved template has the kind {kind!r}{suggest(kind, _KINDS)}; known: {', '.join(_KINDS)}")
    try:
        return _KINDS[kind](mapping)
    except (KeyError, TypeError) as error:
        raise DataError(f"a saved template of the kind {kind!r} is incomplete or damaged: {error}") from None


def _text_from_mapping(mapping: Mapping[str, Any]) -> PromptTemplate:
    return TextTemplate(str(mapping["name"]), tuple(mapping["prompts"]), str(mapping["response"]))


_KINDS: dict[str, Callable[[Mapping[str, Any]], PromptTemplate]] = {
    "text": _text_from_mapping,
    "chat": lambda mapping: ChatTemplate(str(mapping["name"])),
}
