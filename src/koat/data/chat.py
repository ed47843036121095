"""The `chat` template: conversations as the tokenizer's own chat template writes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from koat.core.errors import DataError, suggest
from koat.data.records import Record, Turn
from koat.data.templates import CONTEXT_FIELDS, PromptTemplate, Segment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ChatTemplate(PromptTemplate):
    """Renders turns through `apply_chat_template`; usable once bound to a tokenizer that has a chat template.

    A record that is no conversation becomes one user turn (its context first, where it has one) and one
    assistant turn. Every assistant turn is supervised but those of weight 0, with the end-of-turn mark that the
    template writes; white space behind that mark belongs to what follows. Turns after the last that is supervised
    are left out.
    """

    name: str = "chat"
    tokenizer: PreTrainedTokenizerBase | None = field(default=None, compare=False, repr=False)
    _marks: tuple[str, ...] = field(default=(), compare=False, repr=False)

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
        """Return the template for this tokenizer; raise DataError if it has no chat template."""
        if not tokenizer.chat_template:
            raise DataError(
                "template 'chat' needs a tokenizer with a chat template, and this one has none; use an "
                "instruction-tuned model's tokenizer, or another template (koalpaca, koat, alpaca)"
            )
        added = tokenizer.added_tokens_decoder.values()
        marks = dict.fromkeys([*tokenizer.all_special_tokens, *(token.content for token in added if token.special)])
        return replace(self, tokenizer=tokenizer, _marks=tuple(marks))

    def render(self, record: Record) -> list[Segment]:
        """Return what is given and what is supervised, in turn."""
        turns = record.turns or (*_make_question(record), Turn("assistant", _take(record, "output")))
        segments: list[Segment] = []
        done = ""
        for index, turn in enumerate(_cut_off(turns)):
            if turn.role != "assistant":
                continue
            given = self._apply(turns[:index], record, generate=True)
            full = self._apply(turns[: index + 1], record, generate=False)
            if not full.startswith(given):
                raise DataError(_explain_break(record, index, "begins an answer otherwise than it writes one", given))
            if not given.startswith(done):
                raise DataError(_explain_break(record, index, "rewrites earlier turns when later ones come", done))
            answer = self._trim(full[len(given) :])
            segments += [Segment(given[len(done) :], supervised=False), Segment(answer, turn.supervised)]
            done = given + answer
        return _mark_context(segments, record)

    def render_prompt(self, record: Record) -> str:
        """Return the conversation up to its next answer: the last one's place if it ends with an answer."""
        turns = record.turns or _make_question(record)
        if turns[-1].role == "assistant":
            turns = turns[:-1]
        return self._apply(turns, record, generate=True)

    def is_blank(self, record: Record) -> bool:
        """Whether the record is no conversation, and asks nothing."""
        return not (record.turns or _find_context(record) or record.fields.get("instruction", "").strip())

    def to_mapping(self) -> dict[str, Any]:
        """Describe the template in plain values; its text is the tokenizer's and is saved with that."""
        return {"kind": "chat", "name": self.name}

    def _apply(self, turns: Sequence[Turn], record: Record, *, generate: bool) -> str:
        if self.tokenizer is None:
            raise ValueError("bind the chat template to a tokenizer before rendering with it")
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        except Exception as error:  # what a template raises is the template's choice
            roles = ", ".join(turn.role for turn in turns) or "none"
            raise DataError(
                f"{record.source or 'a row'}: the tokenizer's chat template refuses the conversation "
                f"(roles: {roles}): {error}. Correct the row, or use another template"
            ) from None
        return str(text)

    def _trim(self, answer: str) -> str:
        """Cut white space that follows an end-of-turn mark: generation stops at the mark."""
        bare = answer.rstrip()
        return bare if bare.endswith(self._marks) else answer


def _cut_off(turns: Sequence[Turn]) -> Sequence[Turn]:
    """Return the turns up to the last that is trained on."""
    answers = [index for index, turn in enumerate(turns) if turn.role == "assistant" and turn.supervised]
    return turns[: answers[-1] + 1] if answers else ()


def _explain_break(record: Record, index: int, what: str, lost: str) -> str:
    return (
        f"{record.source or 'a row'}, message {index + 1}: the tokenizer's chat template {what} (the text up "
        f"to {lost[-40:]!r} does not stay), as some templates for reasoning models do, so one sequence "
        "cannot train what inference will see. Train on single exchanges, give the tokenizer a chat "
        "template that only adds to what it wrote, or use another template"
    )


def _take(record: Record, name: str) -> str:
    if name not in record.fields:
        raise DataError(
            f"template 'chat' needs the field {name!r}{suggest(name, record.fields)}, which the row "
            f"{record.source or 'given'} does not have; it has: {', '.join(record.fields) or 'no fields'}"
        )
    return record.fields[name]


def _find_context(record: Record) -> str:
    return next((text for name in CONTEXT_FIELDS if (text := record.fields.get(name, "").strip())), "")


def _make_question(record: Record) -> tuple[Turn, ...]:
    context, question = _find_context(record), _take(record, "instruction")
    asked = Turn("user", f"{context}\n\n{question}" if context else question)
    system = record.fields.get("system", "")
    return (Turn("system", system), asked) if system.strip() else (asked,)


def _mark_context(segments: list[Segment], record: Record) -> list[Segment]:
    """Split the context out of the first given text, where it stands there unchanged."""
    context = "" if record.turns else _find_context(record)
    at = segments[0].text.find(context) if context and segments else -1
    if at < 0:
        return segments
    text = segments[0].text
    parts = (text[:at], context, text[at + len(context) :])
    return [Segment(part, False, is_context=index == 1) for index, part in enumerate(parts)] + segments[1:]
