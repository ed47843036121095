"""Ask a model questions in the words it was trained with, and read what it writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as ListLike
from contextlib import nullcontext
from dataclasses import dataclass, field

from koat.core.errors import ConfigError, DataError, ModelError, suggest
from koat.core.seeding import seeded
from koat.core.settings import SPELT_OUT
from koat.data.prompts import PromptTemplate, resolve_template
from koat.data.records import Record
from koat.data.templates import CONTEXT_FIELDS, TextTemplate
from koat.data.tokens import encode_prompts
from koat.evaluation.continuations import Ending, continue_prompts, list_end_tokens, read_text
from koat.evaluation.room import find_room
from koat.forest.score import unwrap
from koat.workflows.evaluating.subject import Subject
from koat.workflows.out_of_memory import TO_EVALUATE, explain_out_of_memory

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
        if isinstance(self.until, str):
            object.__setattr__(self, "until", (self.until,))
        if self.max_new_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"max_new_tokens={self.max_new_tokens}, temperature={self.temperature}, top_p={self.top_p}: allowed "
                "are at least 1, at least 0, and above 0 to 1."
            )
        for text in self.until:
            if not text:
                raise ConfigError("until='' would end every answer before it begins. Give a text, or leave it out.")
            if "\n" not in text and SPELT_OUT.search(text):
                raise ConfigError(
                    f"until={text!r} holds a backslash and the letter n where a line break is meant. In a shell write "
                    "it as --until $'\\n'."
                )

    def to_ending(self, limit: int) -> Ending:
        """Return when an answer of at most `limit` tokens is done."""
        # Left out, transformers draws from the 50 likeliest.
        drawn = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return Ending(self.until, limit, drawn if self.temperature else {"do_sample": False})


@dataclass(frozen=True, slots=True)
class Answer:
    """What was written, and whether it was cut at the longest that was allowed."""

    text: str
    is_cut: bool


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
        """Return the field that the question fills: `instruction`, or the only one that nothing else fills.

        A context's field is the question's only where no other is left. Raises DataError for none, or several.
        """
        if not isinstance(self.template, TextTemplate):
            return QUESTION
        named = self.template.list_fields()
        given = {*self.fields, *(CONTEXT_FIELDS if "context" in self.fields and "context" not in named else ())}
        left = [name for name in named if name not in given]
        free = [name for name in left if name not in CONTEXT_FIELDS] or left
        if QUESTION in free:
            return QUESTION
        if not free:
            raise DataError(
                f"the template {self.template.name!r} has no field left for the question: its fields are "
                f"{', '.join(named) or 'none'}, and each is given. Leave one of them out, or name another template."
            )
        if len(free) > 1:
            raise DataError(
                f"the template {self.template.name!r} has the fields {', '.join(named)}, and it cannot be told which "
                f"of {', '.join(free)} is the question. Give the others: --field {free[0]}=TEXT."
            )
        return free[0]


def choose_form(subject: Subject, template: str | None, fields: Mapping[str, str]) -> Form:
    """Return the form of the questions: the named template, the one that the subject was trained with, or none."""
    chosen = resolve_template(template)[0] if template else subject.template
    if chosen is None:
        if fields:
            raise ConfigError(
                f"{subject.name} was trained with no prompt template, so there is no place for {', '.join(fields)}. "
                "Name a template."
            )
        return Form(None)
    named = chosen.list_fields() if isinstance(chosen, TextTemplate) else [QUESTION, *CONTEXT_FIELDS, "system"]
    places = {*named, *(("context",) if set(CONTEXT_FIELDS) & set(named) else ())}
    if unknown := [name for name in fields if name not in places]:
        raise ConfigError(
            f"the template {chosen.name!r} has no place for {unknown[0]!r}{suggest(unknown[0], named)}; its fields "
            f"are: {', '.join(named)}."
        )
    return Form(chosen.bind(subject.tokenizer), fields)


@explain_out_of_memory(ModelError, "while answering", TO_EVALUATE)
def ask_model(
    subject: Subject,
    questions: ListLike[str],
    form: Form,
    writing: Writing | None = None,
    *,
    token_budget: int = 8192,
    on_progress: OnProgress = lambda done, total: None,
) -> list[Answer]:
    """Return what a model answers to each question; what their prompts share is computed once where it is greedy.

    Raises DataError for a question that is empty or leaves no room for an answer.
    """
    writing, num_done = writing or Writing(), 0
    prompts = [tuple(ids) for ids in encode_prompts([form.fill(text) for text in questions], subject.tokenizer)]
    limits = find_limits(prompts, find_room(subject.model), writing.max_new_tokens)
    answers: dict[int, Answer] = {}

    def show(num_new: int) -> None:
        nonlocal num_done
        num_done += num_new
        on_progress(num_done, len(prompts))

    with seeded(writing.seed) if writing.temperature else nullcontext():
        for limit in sorted(set(limits)):  # one, but where a prompt leaves little room
            ending, places = writing.to_ending(limit), [place for place, own in enumerate(limits) if own == limit]
            written = continue_prompts(
                subject.model, subject.layout, subject.tokenizer, [prompts[place] for place in places], ending,
                token_budget=token_budget, on_progress=show,
            )  # fmt: skip
            answers |= {
                place: read_answer(ids, ending, subject) for place, ids in zip(places, written.token_ids, strict=True)
            }
    return [answers[place] for place in range(len(prompts))]


def find_limits(prompts: ListLike[tuple[int, ...]], room: int | None, max_new_tokens: int) -> list[int]:
    """Return how many tokens each answer may have. Raises DataError for a prompt that leaves room for none."""
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise DataError(f"question {number} is empty. Ask something.")
        if room is not None and len(prompt) >= room:
            raise DataError(
                f"question {number} makes a prompt of {len(prompt):,} tokens, and the model sees {room:,} at once. "
                "Shorten the question, or the context beside it."
            )
    return [max_new_tokens if room is None else min(max_new_tokens, room - len(prompt)) for prompt in prompts]


def read_answer(token_ids: ListLike[int], ending: Ending, subject: Subject) -> Answer:
    """Return an answer as text, and whether it came to an end by itself."""
    text = str(subject.tokenizer.decode(list(token_ids), skip_special_tokens=True))
    ends = list_end_tokens(unwrap(subject.model), subject.tokenizer)
    ended = {*token_ids[-1:]} & ends or any(end in text for end in ending.until)
    is_cut = len(token_ids) >= ending.max_new_tokens and not ended
    return Answer(read_text(token_ids, ending.until, subject.tokenizer), is_cut)
