"""From items and shots to token sequences with choices, as a task's prompt has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from koat.core.errors import DataError
from koat.data.tokens import encode_continuations, encode_prompts
from koat.evaluation.harvest import Item
from koat.evaluation.task import PLACEHOLDER, Task

BLOCK = 1000
"""Items that are tokenised at once."""


@dataclass(frozen=True, slots=True)
class ChoiceRequest:
    """A context and the continuations that are weighed against each other.

    `gold` is the place of the right one in `choices`; `shot_ids` names the shots that stand in the context.
    """

    item_id: str
    context_ids: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    gold: int
    shot_ids: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Length of the context with its longest choice."""
        return len(self.context_ids) + max(map(len, self.choices))


@dataclass(frozen=True, slots=True)
class KeptOut:
    """An item that does not fit the model's context and was not asked."""

    item_id: str
    num_tokens: int
    context_length: int


@dataclass(frozen=True, slots=True)
class RequestSet:
    """What can be asked, what cannot, and the items whose first shots had to go (id: how many)."""

    requests: list[ChoiceRequest]
    kept_out: list[KeptOut]
    dropped_shots: dict[str, int]

    @property
    def truncation(self) -> str:
        """What was done to long items, in words; "none" when all fit."""
        parts = []
        if self.dropped_shots:
            parts.append(f"{sum(self.dropped_shots.values())} shots dropped from {len(self.dropped_shots)} items")
        if self.kept_out:
            parts.append(f"{len(self.kept_out)} items kept out")
        return "; ".join(parts) or "none"


@dataclass(frozen=True, slots=True)
class LabelCheck:
    """Whether reading off the first token can work under a tokenizer, and what stands against it."""

    meaningful: bool
    notes: list[str]


def render_prompt(task: Task, fields: Mapping[str, str]) -> str:
    """Return the question without its answer; braces inside a field's text stay as they are."""
    return PLACEHOLDER.sub(lambda found: fields[found[1]], task.prompt)


def render_context(task: Task, item: Item, shots: Sequence[Item]) -> str:
    """Return the shots with their answers, then the item's question."""
    answers = list(task.labels.values())
    solved = [render_prompt(task, shot.fields) + answers[shot.gold] + task.shot_separator for shot in shots]
    return "".join(solved) + render_prompt(task, item.fields)


def build_requests(
    task: Task,
    items: Sequence[Item],
    shots: Sequence[Sequence[Item]],
    tokenizer: Any,
    context_length: int | None = None,
) -> RequestSet:
    """Turn each item with its shots into a request of at most `context_length` tokens.

    Items that are longer are kept out and listed, or lose whole shots from the front, as the task has it.
    Raises DataError when no item fits, and for a tokenizer that turns a context or choice into nothing.
    """
    requests, kept_out, dropped = [], [], {}
    for item, given, request in zip(items, shots, encode_requests(task, items, shots, tokenizer), strict=True):
        if not context_length or request.num_tokens <= context_length:
            requests.append(request)
            continue
        shorter = _drop_shots(task, item, given, tokenizer, context_length)
        if shorter is None:
            kept_out.append(KeptOut(item.id, request.num_tokens, context_length))
        else:
            requests.append(shorter)
            dropped[item.id] = len(given) - len(shorter.shot_ids)
    if not requests:
        shortest = min((entry.num_tokens for entry in kept_out), default=0)
        raise DataError(
            f"none of the {len(items)} items of {task.name!r} fits the model's context of {context_length} "
            f"tokens; the shortest has {shortest}. "
            "Give fewer shots (--shots), or set the task's overflow: drop_shots"
        )
    return RequestSet(requests, kept_out, dropped)


def _drop_shots(
    task: Task, item: Item, shots: Sequence[Item], tokenizer: Any, context_length: int
) -> ChoiceRequest | None:
    """Return the request with as many of the last shots as fit; None where task or item forbids it."""
    for num_dropped in range(1, len(shots) + 1) if task.overflow == "drop_shots" else ():
        request = next(encode_requests(task, [item], [shots[num_dropped:]], tokenizer))
        if request.num_tokens <= context_length:
            return request
    return None


def encode_requests(
    task: Task, items: Sequence[Item], shots: Sequence[Sequence[Item]], tokenizer: Any
) -> Iterator[ChoiceRequest]:
    """Yield each item's request, whatever its length.

    A choice's tokens are those behind the context's when both are tokenised as one text. Where the tokenizer
    would join them across the border, the choice is tokenised by itself, so that the context stays what it is
    at generation. Raises DataError for a tokenizer that turns a context or choice into nothing.
    """
    answers = list(task.labels.values())
    alone = encode_continuations(answers, tokenizer)
    for start in range(0, len(items), BLOCK):
        part, given = items[start : start + BLOCK], shots[start : start + BLOCK]
        contexts = [render_context(task, item, drawn) for item, drawn in zip(part, given, strict=True)]
        context_ids = encode_prompts(contexts, tokenizer)
        joint = [encode_prompts([context + answer for context in contexts], tokenizer) for answer in answers]
        for place, (item, drawn) in enumerate(zip(part, given, strict=True)):
            head = context_ids[place]
            choices = tuple(_cut_choice(head, whole[place], own) for whole, own in zip(joint, alone, strict=True))
            if not head or not all(choices):
                raise DataError(
                    f"item {item.id} of {task.name!r}: the tokenizer turns the "
                    f"{'choices' if head else 'prompt'} into no tokens; another tokenizer or prompt is needed"
                )
            yield ChoiceRequest(item.id, tuple(head), choices, item.gold, tuple(shot.id for shot in drawn))


def _cut_choice(context_ids: list[int], whole: list[int], alone: list[int]) -> tuple[int, ...]:
    start = len(context_ids)
    return tuple(whole[start:] if len(whole) > start and whole[:start] == context_ids else alone)


def check_labels(task: Task, requests: Sequence[ChoiceRequest], tokenizer: Any) -> LabelCheck:
    """Check that the first token after the prompt can tell the label words apart under this tokenizer."""
    notes = []
    words = list(task.words)
    # The words stand after the same prompt everywhere, so there are one or two ways to tokenise them.
    for firsts in dict.fromkeys(tuple(choice[0] for choice in request.choices) for request in requests):
        if len(set(firsts)) < len(firsts):
            notes.append(
                f"Under this tokenizer the labels {', '.join(words)} begin with the same token "
                f"({tokenizer.decode([firsts[0]])!r}): the first token cannot tell them apart. Read the "
                "likelihood score; the first-token score means nothing."
            )
    split = [word for word, answer in zip(words, task.labels.values(), strict=True)
             if not _is_one_token(word, answer, tokenizer)]  # fmt: skip
    if split:
        notes.append(
            f"Under this tokenizer {', '.join(split)} takes more than one token, so the first generated "
            "token can never equal it. Read the likelihood score; the first-token score means nothing."
        )
    return LabelCheck(not notes, list(dict.fromkeys(notes)))


def _is_one_token(word: str, answer: str, tokenizer: Any) -> bool:
    """Whether some single token reads as the word: with the white space of the answer, or without."""
    forms = [tokenizer(form, add_special_tokens=False).input_ids for form in dict.fromkeys((answer, f" {word}", word))]
    return any(len(ids) == 1 and tokenizer.decode(ids).strip() == word for ids in forms)
