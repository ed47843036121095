"""Examples, the stage between records and sequences, and shortening their contexts until they fit."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from koat.data.records import Record
from koat.data.templates import Segment
from koat.data.tokens import encode_prompt, encode_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(slots=True)
class Example:
    """One record in one template: text and tokens of its first prompt, and the tokens of all that follows.

    `tail` holds runs of token ids with their supervision: answers, and in conversations what stands between.
    `others` are wrong answers that could stand in its place.
    """

    record: Record
    given: tuple[Segment, ...]
    tail: list[tuple[list[int], bool]]
    prompt_ids: list[int]
    others: list[list[int]] = field(default_factory=list)

    @property
    def num_tail_tokens(self) -> int:
        """How many tokens stand behind the first prompt, at most."""
        return max([sum(len(ids) for ids, _ in self.tail), *map(len, self.others)])

    def __len__(self) -> int:
        return len(self.prompt_ids) + self.num_tail_tokens

    def split_context(self) -> tuple[str, str, str]:
        """Return the prompt's text before, of, and after its context; all is before where it has none."""
        at = next((index for index, segment in enumerate(self.given) if segment.is_context), len(self.given))
        texts = [segment.text for segment in self.given]
        return "".join(texts[:at]), "".join(texts[at : at + 1]), "".join(texts[at + 1 :])


@dataclass(slots=True)
class Shortening:
    """What shortening contexts came to: which examples now fit, which never will, which lost their answer."""

    shortened: list[Example]
    unfit: list[Example]
    num_cut_away_answers: int


def shorten_contexts(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Shortening:
    """Shorten the contexts of examples that are longer than `max_length` tokens, from the end, in place.

    Examples on the same context are cut at the same character, so that they still begin alike. An example
    without a context, or too long even without it, is unfit and stays as it was.
    """
    groups: dict[tuple[str, str], list[Example]] = defaultdict(list)
    for example in examples:
        before, context, _ = example.split_context()
        groups[before, context].append(example)
    result = Shortening([], [], 0)
    cut: list[tuple[Example, str, str]] = []
    for (before, context), members in groups.items():
        kept = context
        fitting = []
        for member in sorted(members, key=len, reverse=True):
            num_kept = _find_cut(member, before, kept, tokenizer, max_length)
            if num_kept is None:
                result.unfit.append(member)
            else:
                fitting.append(member)
                kept = kept[:num_kept]
        cut += [(member, context, kept) for member in fitting]
    for member, _, kept in cut:
        _replace_context(member, kept)
    prompts = encode_prompts(["".join(segment.text for segment in member.given) for member, _, _ in cut], tokenizer)
    for (member, context, kept), ids in zip(cut, prompts, strict=True):
        member.prompt_ids = ids
        # A shorter context can, rarely, be one token more: then a sibling's cut does not do for this one.
        (result.shortened if len(member) <= max_length else result.unfit).append(member)
        result.num_cut_away_answers += len(member) <= max_length and _loses_answer(member.record, context, kept)
    return result


def _replace_context(example: Example, context: str) -> None:
    example.given = tuple(
        Segment(context, supervised=False, is_context=True) if segment.is_context else segment
        for segment in example.given
    )


def _find_cut(
    example: Example, before: str, context: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> int | None:
    """Return how many characters of the context fit, or None if the example is too long with none of them."""
    after = example.split_context()[2]
    budget = max_length - example.num_tail_tokens

    def count(num_kept: int) -> int:
        return len(encode_prompt(before + context[:num_kept] + after, tokenizer))

    return _search(count, budget, len(context))


def _search(count: Callable[[int], int], budget: int, high: int) -> int | None:
    """Return the largest number up to `high` with `count(number) <= budget`; `count` grows with it.

    Bisection, every other step of it guessed from the counts at both ends, which mostly finds an exact fit
    in a few steps. Token counts are not quite monotone in characters; what is returned fits.
    """
    most = count(high)
    if most <= budget:
        return high
    low, least = 0, count(0)
    if least > budget:
        return None
    guess = True
    while high - low > 1 and least < budget:
        share = (budget - least) / max(most - least, 1) if guess else 0.5
        middle = min(max(low + int((high - low) * share), low + 1), high - 1)
        counted = count(middle)
        if counted <= budget:
            low, least = middle, counted
        else:
            high, most = middle, counted
        guess = not guess
    return low


def _loses_answer(record: Record, context: str, kept: str) -> bool:
    """Tell whether some answer stood in the whole context and none stands in what is kept of it."""
    try:
        answers = [str(answer) for answer in json.loads(record.fields.get("answers", ""))]
    except (ValueError, TypeError):
        answers = [record.fields.get("output", "")]
    answers = [answer for answer in answers if answer.strip()]
    return any(answer in context for answer in answers) and not any(answer in kept for answer in answers)
