"""Records in templates to token sequences; whatever is left out or shortened is counted and said."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING

from koat.core import sequence as core
from koat.core.errors import DataError, suggest
from koat.data.choices import render_others
from koat.data.overflow import Example, shorten_contexts
from koat.data.records import Record
from koat.data.templates import PromptTemplate, Segment
from koat.data.tokens import encode_continuations, encode_prompt, encode_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["EncodeReport", "Encoded", "encode_prompt", "encode_records"]


_CHAT = "data.template=chat"


@dataclass(slots=True)
class EncodeReport:
    """Counts of one encoding. A row in two templates counts once as a row and twice as sequences."""

    num_rows: int = 0
    num_templates: int = 0
    num_sequences: int = 0
    num_tokens: int = 0
    num_supervised: int = 0
    num_unsupervised: int = 0
    """Left out because no token of theirs would be supervised."""
    num_dropped: int = 0
    """Left out because they are longer than `max_length`."""
    num_truncated: int = 0
    """Kept with a shortened context."""
    num_unfit: int = 0
    """Left out because they are too long even with an empty context."""
    num_cut_away_answers: int = 0
    """Of the truncated: no answer stands in the kept context any more, though one did in the whole."""
    num_trailing: int = 0
    """Conversations that do not end with the assistant; what follows its last turn teaches nothing."""
    num_blank: int = 0
    """Rows whose prompt is made of empty fields alone; they are kept."""
    num_unheard: dict[str, int] = field(default_factory=dict)
    """By template: rows with a system message that it has no place for."""
    max_length: int | None = None
    longest: int = 0
    """Length in tokens of the longest sequence before anything was left out or shortened."""
    left_out: list[str] = field(default_factory=list)
    """Sources of all that was left out."""

    def lines(self) -> list[str]:
        """Say in sentences what happened, leaving out what did not."""
        templates = f" in {self.num_templates} templates" if self.num_templates > 1 else ""
        limit = f"max_length={self.max_length}"
        told = [
            (
                f"{self.num_rows:,} rows{templates} became {self.num_sequences:,} sequences of "
                f"{self.num_tokens:,} tokens, {self.num_supervised:,} of them supervised; "
                f"the longest had {self.longest:,}."
            )
        ]
        notes = (
            (
                self.num_unsupervised,
                "left out: no token of theirs would be supervised (the response is empty).",
            ),
            (self.num_dropped, f"left out: longer than {limit} tokens."),
            (self.num_truncated, f"kept with a shortened context, to fit into {limit} tokens."),
            (
                self.num_cut_away_answers,
                "of these lost their answer: it stood in the part that was cut away.",
            ),
            (self.num_unfit, f"left out: longer than {limit} tokens even with no context at all."),
            (
                self.num_trailing,
                "conversations end without the assistant; what follows its last turn is not used.",
            ),
            (self.num_blank, "rows have nothing in their prompt: all its fields are empty."),
            *(
                (count, f"rows have a system message, and the template {name} has no place for it: use {_CHAT}.")
                for name, count in self.num_unheard.items()
            ),
        )
        told += [f"{count:,} {text}" for count, text in notes if count]
        if self.left_out:
            told.append(f"Left out, for example: {', '.join(self.left_out[:3])}.")
        return told


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token sequences, in the order of their records (each in every template), and what was counted."""

    sequences: list[core.Sequence]
    report: EncodeReport


def encode_records(
    records: Sequence[Record],
    templates: Sequence[PromptTemplate],
    tokenizer: PreTrainedTokenizerBase,
    *,
    loss_on: str = "response",
    max_length: int | None = None,
    overflow: str = "error",
    choices: Mapping[str, Sequence[str]] | None = None,
) -> Encoded:
    """Encode every record in every template.

    The prompt's tokens are those of `encode_prompt`, exactly as at inference; the response is tokenised apart
    and joined to them, so no token straddles the border. One end-of-text token ends each sequence and is
    supervised. `loss_on="all"` supervises every token but the first. `max_length` counts tokens, the end's
    included; None is no limit. `choices` holds all words of a field; a sequence then carries the responses with the
    others as its wrong answers. Raises DataError for a template that does not fit a record, for sequences
    that are too long under `overflow="error"`, for a tokenizer without an end-of-text token, for `loss_on="all"` with
    answers that are not to be supervised, and when nothing is left.
    """
    _check_option("overflow", overflow, _OVERFLOW)
    _check_option("loss_on", loss_on, _MARKS)
    _check_weights(records, loss_on)
    end = _find_end(tokenizer)
    report = EncodeReport(num_rows=len(records), num_templates=len(templates), max_length=max_length)
    bound = [template.bind(tokenizer) for template in templates]
    _count_oddities(records, bound, report)
    examples = _make_examples(records, bound, tokenizer, end, choices or {}, report)
    report.longest = max(map(len, examples), default=0)
    if max_length is not None and report.longest > max_length:
        examples = _OVERFLOW[overflow](examples, tokenizer, max_length, report)
    sequences = [_MARKS[loss_on](example) for example in examples]
    report.num_sequences = len(sequences)
    report.num_tokens = sum(map(len, sequences))
    report.num_supervised = sum(sequence.num_supervised for sequence in sequences)
    if not sequences:
        raise DataError("no sequence is left to work with. " + " ".join(report.lines()))
    return Encoded(sequences, report)


def _check_option(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise DataError(f"unknown {name} {value!r}{suggest(value, known)}; there are: {', '.join(known)}")


def _check_weights(records: Sequence[Record], loss_on: str) -> None:
    masked = [record.source for record in records if not all(turn.supervised for turn in record.turns)]
    if masked and loss_on == "all":
        raise DataError(
            f"data.loss_on=all trains on every token, but {len(masked):,} rows have messages of weight 0, which are "
            f"not to be trained on; the first is {masked[0]}. Set data.loss_on=response, or take the weights out"
        )


def _count_oddities(records: Sequence[Record], templates: Sequence[PromptTemplate], report: EncodeReport) -> None:
    """Count what is odd about rows that are kept."""
    report.num_trailing = sum(bool(record.turns) and record.turns[-1].role != "assistant" for record in records)
    report.num_blank = sum(any(template.is_blank(record) for template in templates) for record in records)
    for template in templates:
        if unheard := sum(template.drops_system(record) for record in records):
            report.num_unheard[template.name] = unheard


def _find_end(tokenizer: PreTrainedTokenizerBase) -> int:
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise DataError(
            "the tokenizer has no end-of-text token, so a model could never learn to stop; name one in its "
            'tokenizer_config.json ("eos_token": "<|endoftext|>", a token of its vocabulary)'
        )
    return end


def _make_examples(
    records: Sequence[Record],
    templates: Sequence[PromptTemplate],
    tokenizer: PreTrainedTokenizerBase,
    end: int,
    choices: Mapping[str, Sequence[str]],
    report: EncodeReport,
) -> list[Example]:
    """Render and tokenise everything, each distinct text once; leave out what has nothing supervised."""
    rendered: list[tuple[Record, tuple[Segment, ...], list[Segment], list[str]]] = []
    for record in records:
        for template in templates:
            segments = template.render(record)
            given = tuple(takewhile(lambda segment: not segment.supervised, segments))
            tail = segments[len(given) :]
            if any(segment.supervised and segment.text.strip() for segment in tail):
                rendered.append((record, given, tail, render_others(record, template, segments, choices)))
            else:
                report.num_unsupervised += 1
                report.left_out.append(record.source)
    prompt_ids = _encode_once(("".join(s.text for s in given) for _, given, *_ in rendered), tokenizer, encode_prompts)
    texts = (text for _, _, tail, others in rendered for text in (*(s.text for s in tail), *others))
    tail_ids = _encode_once(texts, tokenizer, encode_continuations)
    examples = []
    for record, given, tail, others in rendered:
        runs = [(tail_ids[segment.text], segment.supervised) for segment in tail]
        if not _ends(runs[-1][0], end):
            runs.append(([end], True))
        prompt = prompt_ids["".join(segment.text for segment in given)]
        wrong = [tail_ids[text] if _ends(tail_ids[text], end) else [*tail_ids[text], end] for text in others]
        examples.append(Example(record, given, runs, prompt, wrong))
    return examples


def _ends(ids: Sequence[int], end: int) -> bool:
    return bool(ids) and ids[-1] == end


def _encode_once(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    encode: Callable[[Sequence[str], PreTrainedTokenizerBase], list[list[int]]],
) -> dict[str, list[int]]:
    distinct = list(dict.fromkeys(texts))
    return dict(zip(distinct, encode(distinct, tokenizer), strict=True))


def _join(example: Example) -> tuple[int, ...]:
    return (*example.prompt_ids, *(token for ids, _ in example.tail for token in ids))


def _supervise_responses(example: Example) -> core.Sequence:
    marks = [False] * len(example.prompt_ids)
    for ids, supervised in example.tail:
        marks += [supervised] * len(ids)
    marks[0] = False
    return core.Sequence(_join(example), tuple(marks), example.record.group, tuple(map(tuple, example.others)))


def _supervise_all(example: Example) -> core.Sequence:
    return core.supervise_from(_join(example), 1, example.record.group)


def _refuse(
    examples: list[Example], tokenizer: PreTrainedTokenizerBase, max_length: int, report: EncodeReport
) -> list[Example]:
    over = [example for example in examples if len(example) > max_length]
    longest = max(over, key=len)
    first = ", ".join(f"{example.record.source} ({len(example):,})" for example in over[:3])
    raise DataError(
        f"{len(over):,} of {len(examples):,} sequences are longer than max_length={max_length} tokens; the "
        f"longest has {len(longest):,} ({longest.record.source}). The first: {first}. Raise data.max_length "
        "as far as the model allows, or set data.overflow=drop to leave them out, or "
        "data.overflow=truncate_context to shorten their contexts"
    )


def _drop(
    examples: list[Example], tokenizer: PreTrainedTokenizerBase, max_length: int, report: EncodeReport
) -> list[Example]:
    kept = [example for example in examples if len(example) <= max_length]
    report.num_dropped = len(examples) - len(kept)
    report.left_out += [example.record.source for example in examples if len(example) > max_length]
    return kept


def _truncate(
    examples: list[Example], tokenizer: PreTrainedTokenizerBase, max_length: int, report: EncodeReport
) -> list[Example]:
    result = shorten_contexts([example for example in examples if len(example) > max_length], tokenizer, max_length)
    report.num_truncated = len(result.shortened)
    report.num_unfit = len(result.unfit)
    report.num_cut_away_answers = result.num_cut_away_answers
    report.left_out += [example.record.source for example in result.unfit]
    return [example for example in examples if len(example) <= max_length]


_OVERFLOW = {"error": _refuse, "drop": _drop, "truncate_context": _truncate}
_MARKS = {"response": _supervise_responses, "all": _supervise_all}
