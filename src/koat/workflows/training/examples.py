"""From data settings to token sequences: read, divide, render, encode."""

from __future__ import annotations

import random
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from typing import Any, Literal

from koat.core.errors import DataError
from koat.core.sequence import Sequence
from koat.core.settings import DataSettings
from koat.data.encode import EncodeReport, encode_records
from koat.data.prompts import PromptTemplate, resolve_template
from koat.data.readers import RecordFile, read_records
from koat.data.records import Record
from koat.data.row_values import compose
from koat.data.splits import split_by_title


@dataclass(frozen=True, slots=True)
class Examples:
    """Training and validation sequences, the templates that made them, and what was counted on the way."""

    train: list[Sequence]
    validation: list[Sequence]
    templates: list[PromptTemplate]
    reports: dict[str, EncodeReport]
    remarks: list[str]
    """Rows that were skipped and answers that do not stand where the file says."""


def load_examples(
    settings: DataSettings, tokenizer: Any, context_length: int | None, seed: int, *, with_choices: bool = False
) -> Examples:
    """Read and encode all that `settings` names; `with_choices` gives each answer the wrong ones of its field.

    Raises DataError when nothing is left to train on, or no answer has a choice.
    """
    templates = resolve_template(settings.template)
    remarks: list[str] = []
    train, validation = divide_records(settings, seed, remarks)
    limits = [length for length in (settings.max_length, context_length) if length]
    encoded = {
        part: encode_records(
            records,
            templates,
            tokenizer,
            loss_on=settings.loss_on,
            max_length=min(limits, default=None),
            overflow=settings.overflow,
            choices=list_choices(settings) if with_choices else None,
        )
        for part, records in (("train", train), ("validation", validation))
        if records
    }
    if "train" not in encoded or not encoded["train"].sequences:
        raise DataError(f"No training example is left of {', '.join(settings.train)}. See `koat data inspect`.")
    if with_choices and not any(sequence.alternatives for sequence in encoded["train"].sequences):
        raise DataError(
            "training.unlikelihood and training.choice_loss weigh an answer against the other words of its field, and "
            "no answer has any: name them in data.values and keep data.loss_on=response, or set both weights to 0."
        )
    held_out = encoded["validation"].sequences if "validation" in encoded else []
    reports = {part: found.report for part, found in encoded.items()}
    return Examples(encoded["train"].sequences, held_out, templates, reports, remarks)


def check_vocabulary(examples: Examples, tokenizer: Any, base_config: Any) -> None:
    """Raise DataError where the tokenizer makes a token that the base model has no embedding for."""
    known: int | None = getattr(base_config.get_text_config(), "vocab_size", None)
    sequences = [*examples.train, *examples.validation]
    highest = max(max(ids) for each in sequences for ids in (each.token_ids, *each.alternatives) if ids)
    if known is not None and highest >= known:
        token = tokenizer.convert_ids_to_tokens(highest)
        raise DataError(
            f"the tokenizer makes the token {token!r}, id {highest}, and the base model knows {known} tokens, ids 0 to "
            f"{known - 1}: it was added to the tokenizer alone. Take it out of the tokenizer, or give the base an "
            "embedding for it (transformers' resize_token_embeddings) and save both into one folder."
        )


def list_choices(settings: DataSettings) -> dict[str, list[str]]:
    """Return all words of each coded field, by the name that records have it under."""
    return {compose(field): list(words.values()) for field, words in settings.values.items()}


def divide_records(settings: DataSettings, seed: int, remarks: list[str]) -> tuple[list[Record], list[Record]]:
    """Return (training, validation) records as the settings divide them; `remarks` gets what was passed over."""
    everything = read_all(settings, settings.train, remarks)
    if settings.splits is not None:
        train = split_by_title(everything, settings.splits, "train")
        validation = split_by_title(everything, settings.splits, "validation")
    elif settings.validation:
        train, validation = everything, read_all(settings, settings.validation, remarks)
    else:
        train, validation = hold_out(everything, settings.validation_fraction, seed)
    rng = random.Random(seed)
    validation_limit = settings.validation_limit
    if settings.limit and validation_limit is None and not settings.validation and settings.splits is None:
        # What is held out shrinks with what is trained on: a hundred rows are not validated on thirty thousand.
        validation_limit = max(1, round(len(validation) * settings.limit / max(1, len(train))))
    return draw(train, settings.limit, rng), draw(validation, validation_limit, rng)


def read_all(settings: DataSettings, paths: list[str], remarks: list[str]) -> list[Record]:
    """Read the records of several files, folders or Hub ids."""
    records = []
    for path in paths:
        found = read_file(settings, path, settings.on_bad_row)
        records += found.records
        skipped = [f"{len(found.bad_rows)} broken rows skipped, the first: {line}" for line in found.bad_rows[:1]]
        remarks += [f"{path}: {line}" for line in [*skipped, *found.describe_oddities()]]
    return records


def read_file(settings: DataSettings, path: str, on_bad_row: Literal["error", "skip"]) -> RecordFile:
    """Read one file, folder or Hub id as the settings describe it."""
    return read_records(
        path,
        format=settings.format,
        columns=settings.columns,
        values=settings.values,
        clean=settings.clean,
        on_bad_row=on_bad_row,
    )


def hold_out(records: list[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Hold a share of the groups out: records of one article never stand on both sides."""
    if fraction == 0:
        return records, []
    names = list(dict.fromkeys(record.group or record.source for record in records))
    random.Random(seed).shuffle(names)
    held = set(names[: max(1, round(len(names) * fraction))])
    train = [record for record in records if (record.group or record.source) not in held]
    if records and not train:
        raise DataError(
            f"data.validation_fraction={fraction:g} holds out all {len(names)} groups (articles, or rows), and none is "
            "left to train on. Set it to 0, or name a file in data.validation."
        )
    return train, [record for record in records if (record.group or record.source) in held]


def draw(records: ListLike[Record], limit: int | None, rng: random.Random) -> list[Record]:
    """Return at most `limit` records in their own order, drawn by whole groups so that contexts stay shared."""
    if limit is None or limit >= len(records):
        return list(records)
    groups: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        groups.setdefault(record.group or f"\0{index}", []).append(index)
    names = list(groups)
    rng.shuffle(names)
    drawn = [index for name in names for index in groups[name]][:limit]
    return [records[index] for index in sorted(drawn)]
