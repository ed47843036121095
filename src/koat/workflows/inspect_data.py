"""Look at data before training on it: rows, lengths, what would overflow, what a forest saves."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

from koat.core.errors import DataError
from koat.core.sequence import Sequence
from koat.core.settings import DataSettings, ModelSettings, TrainingSettings
from koat.data.encode import Encoded, EncodeReport, encode_records
from koat.data.lengths import LengthSummary, summarise_lengths
from koat.data.prompts import resolve_template
from koat.data.readers import RecordFile
from koat.model import load_tokenizer
from koat.training.sampler import plan_steps
from koat.workflows.training.examples import read_file


@dataclass(frozen=True, slots=True)
class Inspection:
    """What one file holds, and what becomes of it as token sequences."""

    path: str
    file: RecordFile
    report: EncodeReport
    lengths: LengthSummary
    limit: list[str]
    """What `max_length` would do, in sentences; empty without one."""
    sample: str
    """The first sequence as text, the supervised parts between guillemets."""


def inspect_files(
    paths: ListLike[str], settings: DataSettings, model: ModelSettings, training: TrainingSettings | None = None
) -> list[Inspection]:
    """Read, render and encode each file as training would, dropping nothing for its length.

    What `max_length` would do is said beside it.
    What a forest saves is counted in the steps of an epoch of `training`, the whole file being trained on.
    """
    tokenizer = load_tokenizer(model)
    templates = resolve_template(settings.template)
    found = []
    for path in paths:
        file = read_file(settings, path, "skip")
        encode = partial(encode_records, file.records, templates, tokenizer, loss_on=settings.loss_on)
        encoded = encode()
        sequences = encoded.sequences
        lengths = summarise_lengths(sequences, list_steps(sequences, training or TrainingSettings()))
        limit = describe_limit(sequences, settings, encode)
        found.append(Inspection(path, file, encoded.report, lengths, limit, mark_supervised(sequences[0], tokenizer)))
    return found


def describe_limit(sequences: ListLike[Sequence], settings: DataSettings, encode: Callable[..., Encoded]) -> list[str]:
    """Say what `max_length` and `overflow` would do to sequences; `encode` makes them again under a limit."""
    limit = settings.max_length
    if limit is None:
        return []
    num_over = sum(len(sequence) > limit for sequence in sequences)
    if not num_over:
        return [f"all sequences fit into max_length={limit}."]
    if settings.overflow == "error":
        return [
            f"{num_over:,} sequences are longer than max_length={limit}: with overflow=error training refuses them."
        ]
    try:
        shortened = encode(max_length=limit, overflow=settings.overflow)
    except DataError as error:
        return [f"with max_length={limit} and overflow={settings.overflow}: {error}"]
    return [f"with max_length={limit} and overflow={settings.overflow}:", *shortened.report.lines()]


def list_steps(sequences: ListLike[Sequence], training: TrainingSettings) -> list[list[int]]:
    """Return the sequences of each step of the first epoch, as indices, in the order of the sampler."""
    return plan_steps(sequences, training.sampler, training.batch_size, 1, None, training.seed).order_epoch(0)


def mark_supervised(sequence: Sequence, tokenizer: Any) -> str:
    """Return a sequence as text, each run of supervised tokens between guillemets."""
    runs = groupby(zip(sequence.token_ids, sequence.supervised, strict=True), key=lambda pair: pair[1])
    texts = [(tokenizer.decode([token for token, _ in run]), supervised) for supervised, run in runs]
    return "".join(f"«{text}»" if supervised else text for text, supervised in texts)
