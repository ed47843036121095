"""Look at data before training on it: rows, lengths, what would overflow, what a forest saves."""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import dataclass

from koat.core.settings import DataSettings, ModelSettings
from koat.data.encode import EncodeReport, encode_records
from koat.data.lengths import LengthSummary, summarise_lengths
from koat.data.prompts import resolve_template
from koat.data.readers import RecordFile
from koat.model import load_tokenizer
from koat.workflows.training.examples import read_file


@dataclass(frozen=True, slots=True)
class Inspection:
    """What one file holds, and what becomes of it as token sequences."""

    path: str
    file: RecordFile
    report: EncodeReport
    lengths: LengthSummary | None
    sample: str
    """The first sequence as text, the supervised part between guillemets."""


def inspect_files(paths: ListLike[str], settings: DataSettings, model: ModelSettings) -> list[Inspection]:
    """Read, render and encode each file as training would, dropping nothing for its length."""
    tokenizer = load_tokenizer(model)
    templates = resolve_template(settings.template)
    found = []
    for path in paths:
        file = read_file(settings, path, "skip")
        encoded = encode_records(
            file.records, templates, tokenizer, loss_on=settings.loss_on, max_length=None, overflow="error"
        )
        sequences = encoded.sequences
        sample = ""
        if sequences:
            first = sequences[0]
            border = first.supervised.index(True)
            given, wanted = first.token_ids[:border], first.token_ids[border:]
            sample = f"{tokenizer.decode(given)}«{tokenizer.decode(wanted)}»"
        lengths = summarise_lengths(sequences) if sequences else None
        found.append(Inspection(path, file, encoded.report, lengths, sample))
    return found
