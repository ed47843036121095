"""Ask a model questions in the words it was trained with, and read what it writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as ListLike
from contextlib import nullcontext
from dataclasses import dataclass, field

from koat.core.errors import ConfigError, DataError
from koat.core.seeding import seeded
from koat.data.prompts import PromptTemplate, resolve_template
from koat.data.records import Record
from koat.data.templates import CONTEXT_FIELDS, TextTemplate
from koat.data.tokens import encode_prompts
from koat.evaluation.continuations import Ending, continue_prompts, read_text
from koat.evaluation.room import find_room
from koat.workflows.evaluating.subject import Subject

QUESTION = "instruction"
"""The field that a question fills where the prompt template has it."""
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Writing:
    """How an answer is written: at most so many tokens, and greedily unless `temperature` is above zero."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    until: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise ConfigError for what cannot be."""
        if self.max_new_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"max_new_tokens={self.max_new_tokens}, temperature={self.temperature}, top_p={self.top_p}: allowed "
                "are at least 1, at least 0, and above 0 to 1."
            )

    def to_ending(self, room: int) -> Ending:
        """Return when an answer is done, in a context that has `room` tokens left for it."""
        drawn = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
        options = drawn if self.temperature else {"do_sample": False}
        return Ending(self.until, min(self.max_new_tokens, room), options)


@dataclass(frozen=True, slots=True)
class Form:
    """The words around a question: a template (None: the question as it stands) and texts for its other fields."""

    template: PromptTemplate | None
    fields: Mapping[str, str] = field(default_factory=dict)

    def fill(self, question: str) -> str:
        """Return the prompt that asks a question. Raises DataError when the template wants a field that is missing."""
        if self.template is None:
            return question
        known = {**dict.fromkeys(CONTEXT_FIELDS, self.fields.get("context", "")), **self.fields}
        return self.template.render_prompt(Record({**known, self.find_place(): question}, source="question"))

    def find_place(self) -> str:
        """Return the field that the question fills: `instruction`, or the only one that nothing else fills."""
        if not isinstance(self.template, TextTemplate):
            return QUESTION
        named = self.template.list_fields()
        free = [name for name in named if name not in self.fields and name not in CONTEXT_FIELDS]
        if QUESTION in free or not free:
            return QUESTION
        if len(free) > 1:
            raise DataError(
                f"the template {self.template.name!r} has the fields {', '.join(named)}, and it cannot be told which "
                f"of {', '.join(free)} is the question. Give the others: --field {free[0]}=TEXT."
            )
        return free[0]


def choose_form(subject: Subject, template: str | None, fields: Mapping[str, str]) -> Form:
    """Return the form of the questions: the named template, the one that the subject was trained with, or none."""
    chosen = resolve_template(template)[0] if template else subject.template
    bound = chosen.bind(subject.tokenizer) if chosen is not None else None
    if bound is None and fields:
        raise ConfigError(f"{subject.name} was trained with no prompt template: give --template to use --field.")
    return Form(bound, fields)


def ask_model(
    subject: Subject,
    questions: ListLike[str],
    form: Form,
    writing: Writing | None = None,
    *,
    token_budget: int = 8192,
    on_progress: OnProgress = lambda done, total: None,
) -> list[str]:
    """Return what a model answers to each question; what their prompts share is computed once where it is greedy.

    Raises DataError for a question that leaves no room for an answer.
    """
    writing, num_done = writing or Writing(), 0
    prompts = encode_prompts([form.fill(question) for question in questions], subject.tokenizer)
    longest, room = max(map(len, prompts)), find_room(subject.model)
    if room is not None and longest >= room:
        raise DataError(
            f"the longest prompt has {longest:,} tokens, and the model sees {room:,} at once. Shorten the question, or "
            "the context beside it."
        )

    def show(num_new: int) -> None:
        nonlocal num_done
        num_done += num_new
        on_progress(num_done, len(prompts))

    ending = writing.to_ending(room - longest if room is not None else writing.max_new_tokens)
    with seeded(writing.seed) if writing.temperature else nullcontext():
        written = continue_prompts(
            subject.model, subject.layout, subject.tokenizer, [tuple(ids) for ids in prompts], ending,
            token_budget=token_budget, on_progress=show,
        )  # fmt: skip
    return [read_text(ids, ending.until, subject.tokenizer) for ids in written.token_ids]
