"""From a file, folder or Hub id to records: the format found or named, columns mapped, broken rows told."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from koat.core.errors import DataError, suggest
from koat.data.formats import ROW_FORMATS, describe_formats, hash_context, recognise_format
from koat.data.hub import STORED_SUFFIXES, looks_like_hub_id, read_stored, split_part
from koat.data.messages import describe_unread, put_system_first
from koat.data.opening import RawRow, holds_json_lines, parse_document, read_json_lines, read_text
from koat.data.records import Record, Turn
from koat.data.row_values import RowProblem, compose, compose_keys, describe_value, join_names
from koat.data.squad import find_misplaced_answers, is_squad_document, read_questions
from koat.data.tables import guess_delimiter, read_table

LARGEST_GROUP = 64
"""Rows on one context, beyond which it is taken for a category or an instruction and not for an article."""
_JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
_NOT_HANGUL = re.compile(r"[^가-힣ㄱ-ㅎㅏ-ㅣ\s]")
_CLEANERS: dict[str, Callable[[str], str]] = {
    # Syllables taken apart (NFD, which macOS writes) are made of other letters than these, so they are joined first.
    "hangul": lambda text: _NOT_HANGUL.sub("", unicodedata.normalize("NFC", text)),
    "strip": lambda text: text.strip(),
}


@dataclass(frozen=True, slots=True)
class RecordFile:
    """What was read from one place: records, the format found, and what was wrong with the rest.

    `bad_rows` lists the rows that were skipped, with their problems. `warnings` lists oddities in rows that
    were kept, `remarks` says of all rows together what was not read.
    """

    records: list[Record]
    format: str
    bad_rows: list[str]
    path: str
    warnings: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def describe_oddities(self) -> list[str]:
        """Say with numbers what is odd about rows that were kept, one thing a line."""
        misplaced = f"{len(self.warnings)} answers not where the file says, the first: " if self.warnings else ""
        return [*(f"{misplaced}{line}" for line in self.warnings[:1]), *self.remarks]


def clean_text(name: str, text: str) -> str:
    """Return `text` cleaned: `hangul` keeps Hangul and white space alone, `strip` trims both ends.

    Raises DataError for an unknown name.
    """
    if name not in _CLEANERS:
        raise DataError(f"unknown cleaning {name!r}{suggest(name, _CLEANERS)}; there are: {join_names(_CLEANERS)}")
    return _CLEANERS[name](text)


def read_records(
    path_or_id: str,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    values: Mapping[str, Mapping[str, str]] | None = None,
    clean: Mapping[str, str] | None = None,
    on_bad_row: str = "error",
) -> RecordFile:
    """Read records from a file (plain or gzip), a folder, or a Hub id (`owner/name`, `owner/name:part`).

    `columns` maps a template's field to the file's column, which then loses its own name; on conversations
    and SQuAD it maps to a field of the record, which keeps its name. `clean` comes before `values`, which
    turns coded values into words. Names of columns and codes are the same however their letters are put together
    (NFC). Raises DataError for a file that cannot be read or recognised and for the first broken row, or, with
    `on_bad_row="skip"`, only when no good row is left.
    """
    columns = {compose(new): compose(old) for new, old in (columns or {}).items()}
    values = {key: compose_keys(words) for key, words in compose_keys(values or {}).items()}
    clean = compose_keys(clean or {})
    known = ("auto", *ROW_FORMATS, "datasets")
    if format not in known:
        raise DataError(f"unknown format {format!r}{suggest(format, known)}; there are: {join_names(known)}")
    found, rows = _open_rows(path_or_id, format)
    rows = [_compose_row(row) for row in rows]
    if not rows:
        raise DataError(f"{path_or_id}: holds no rows; at least one is needed")
    found = found or _recognise(path_or_id, rows, columns, plain=format == "datasets")
    collector = _Collector(path_or_id, skip=on_bad_row == "skip", num_rows=len(rows))
    if not ROW_FORMATS[found].nested:
        rows = _rename(path_or_id, rows, columns)
        columns = {}
    records = collector.collect(((row.source, row) for row in rows), ROW_FORMATS[found].parse)
    kept = {record.source for record in records}
    good = [row for row in rows if row.source in kept]
    warnings = [f"{row.source}: {note}" for row in good for note in find_misplaced_answers(_keys(row.value))]
    remarks = describe_unread(row.value for row in good) if found == "chat" else []
    refine = _Refiner(path_or_id, records, columns, values, clean)
    records = collector.collect(((record.source, record) for record in records), refine)
    return RecordFile(_group_by_context(records), found, collector.bad_rows, path_or_id, warnings, remarks)


def _open_rows(path_or_id: str, format: str) -> tuple[str, list[RawRow]]:
    """Return the row format as far as the container tells it (or an empty string) and the raw rows."""
    path = Path(path_or_id)
    stored = path.is_dir() or path.suffix in STORED_SUFFIXES or Path(split_part(path_or_id)[0]).is_dir()
    if not path.exists() and looks_like_hub_id(path_or_id, named=format == "datasets"):
        stored = True
    if stored or (format == "datasets" and path.exists()):
        rows = list(read_stored(path_or_id))
        return _recognise(path_or_id, rows, {}, plain=True) if format in (
            "auto",
            "datasets",
        ) else format, rows
    text = read_text(path)
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix in _JSON_SUFFIXES or (text.lstrip()[0] in "[{" and suffix not in (".tsv", ".csv")):
        return _open_json(text, path_or_id, suffix, format)
    header = text.lstrip("\n\r").split("\n", 1)[0]
    delimiter = guess_delimiter(header, suffix)
    if not delimiter or format not in ("auto", "table"):
        what = f"a table with the columns {header!r:.80}" if delimiter else f"text that starts with {header!r:.80}"
        raise DataError(_refuse_format(path_or_id, f"it holds {what}", format))
    return "table", list(read_table(text, path_or_id, delimiter)[1])


def _open_json(text: str, name: str, suffix: str, format: str) -> tuple[str, list[RawRow]]:
    known = "" if format in ("auto", "datasets") else format
    if holds_json_lines(text, suffix):
        return known, list(read_json_lines(text, name))
    document = parse_document(text, name)
    if known in ("", "squad") and (is_squad_document(document) or (known and isinstance(document, dict))):
        return "squad", list(read_questions(document, name))
    if isinstance(document, dict):
        document = document["data"] if isinstance(document.get("data"), list) else [document]
    items = document if isinstance(document, list) else [document]
    return known, [RawRow(f"{name}: item {index}", item) for index, item in enumerate(items, 1)]


def _keys(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _compose_row(row: RawRow) -> RawRow:
    return replace(row, value=compose_keys(row.value)) if isinstance(row.value, Mapping) else row


def _recognise(name: str, rows: Sequence[RawRow], columns: Mapping[str, str], *, plain: bool) -> str:
    """Return the format of the first rows that have one; `plain` takes any other keys as they are."""
    heads = [set(_keys(row.value)) - set(columns.values()) | set(columns) for row in rows[:100] if not row.problem]
    # The file's own keys count too: a mapping onto a conversation's fields hides nothing.
    heads += [set(_keys(row.value)) for row in rows[:100] if not row.problem]
    found = next((kind for kind in map(recognise_format, heads) if kind), "")
    if found or plain or columns or not any(heads):
        return found or "table"
    first = next(row for row in rows if _keys(row.value))
    raise DataError(_refuse_format(name, f"its rows have the keys: {join_names(_keys(first.value))}", "auto"))


def _refuse_format(name: str, found: str, format: str) -> str:
    asked = "is in no format that koat knows" if format == "auto" else f"is not in the format {format!r}"
    return (
        f"{name}: {asked}; {found}. The formats are:\n{describe_formats()}\n"
        "Map columns (data.columns='{instruction: question, output: answer}') or name a format (data.format=table)"
    )


def _check_known(name: str, setting: str, asked: Iterable[str], known: Mapping[str, None]) -> None:
    for word in asked:
        if word not in known:
            raise DataError(
                f"{name}: {setting} names {word!r}, which is not there{suggest(word, known)}; "
                f"the file has: {join_names(known)}"
            )


def _rename(name: str, rows: list[RawRow], columns: Mapping[str, str]) -> list[RawRow]:
    """Give mapped columns their new names; raise DataError when no row has a mapped column."""
    if not columns:
        return rows
    present = dict.fromkeys(str(key) for row in rows for key in _keys(row.value))
    if present:
        _check_known(name, "columns", columns.values(), present)
    taken = set(columns.values())
    renamed = []
    for row in rows:
        if isinstance(row.value, Mapping):
            kept = {key: value for key, value in row.value.items() if key not in taken and key not in columns}
            mapped = {new: row.value[old] for new, old in columns.items() if old in row.value}
            row = replace(row, value=kept | mapped)
        renamed.append(row)
    return renamed


class _Collector:
    """Turns rows into records one by one, and stops at, or lists, those that cannot be used."""

    def __init__(self, name: str, *, skip: bool, num_rows: int) -> None:
        self.name, self.skip, self.num_rows = name, skip, num_rows
        self.bad_rows: list[str] = []

    def collect(self, rows: Iterable[tuple[str, Any]], parse: Callable[[Any, str], Record]) -> list[Record]:
        records = []
        for source, row in rows:
            try:
                records.append(parse(_unwrap(row), source))
            except RowProblem as problem:
                self._refuse(f"{source}: {problem}")
        if not records:
            raise DataError(f"{self.name}: all {self.num_rows} rows are bad. The first: {self.bad_rows[0]}")
        return records

    def _refuse(self, message: str) -> None:
        if not self.skip:
            raise DataError(f"{message}. Correct the row, or set data.on_bad_row=skip to leave broken rows out")
        self.bad_rows.append(message)


def _unwrap(row: Any) -> Any:
    if not isinstance(row, RawRow):
        return row
    if row.problem:
        raise RowProblem(row.problem)
    if not isinstance(row.value, Mapping):
        raise RowProblem(f"a row must be an object with named fields, but is {describe_value(row.value)}")
    return row.value


class _Refiner:
    """Applies column mapping (where it is still to do), cleaning and value words to a record."""

    def __init__(
        self,
        name: str,
        records: Sequence[Record],
        columns: Mapping[str, str],
        values: Mapping[str, Mapping[str, str]],
        clean: Mapping[str, str],
    ) -> None:
        self.columns, self.values, self.clean = columns, values, clean
        present = dict.fromkeys(key for record in records for key in record.fields)
        _check_known(name, "columns", columns.values(), present)
        present |= dict.fromkeys(columns)
        _check_known(name, "clean", clean, present)
        _check_known(name, "values", values, present)
        for rule in clean.values():
            clean_text(rule, "")
        inside = sorted({"instruction", "output"} & (clean.keys() | values.keys()))
        if inside and any(record.turns for record in records):
            raise DataError(f"{name}: clean and values do not reach into conversations ({join_names(inside)})")

    def __call__(self, record: Record, source: str) -> Record:
        fields = dict(record.fields)
        fields |= {new: record.fields[old] for new, old in self.columns.items() if old in record.fields}
        for key, rule in self.clean.items():
            if key in fields:
                fields[key] = clean_text(rule, fields[key])
        for key, words in self.values.items():
            if key not in fields:
                raise RowProblem(f"field {key!r} is missing; the row has: {join_names(fields)}")
            code = compose(fields[key])
            if code not in words:
                raise RowProblem(f"field {key!r} holds {fields[key]!r}; values has words for: {join_names(words)}")
            fields[key] = words[code]
        turns = put_system_first(record.turns, fields.get("system", ""))
        _check_characters(fields, turns)
        if not fields.get("output", "-").strip():
            raise RowProblem("field 'output' is empty after cleaning; it must hold text")
        return replace(record, fields=fields, turns=turns)


def _group_by_context(records: list[Record]) -> list[Record]:
    """Let records that no format has grouped stand with those on the same `context`.

    One that more rows have than `LARGEST_GROUP`, or the only one of a file, is no article but a category or an
    instruction: as a group it would be trained on without being shuffled, and could not be divided.
    """
    contexts = [record.fields.get("context", "") for record in records]
    counts = Counter(context for context in contexts if context.strip())
    if len(counts) < 2:
        return records
    return [
        replace(record, group=hash_context("", context))
        if not record.group and 0 < counts[context] <= LARGEST_GROUP
        else record
        for record, context in zip(records, contexts, strict=True)
    ]


def _check_characters(fields: Mapping[str, str], turns: Sequence[Turn]) -> None:
    """Raise RowProblem for half a surrogate pair, which JSON can spell and no tokenizer takes."""
    for name, text in [*fields.items(), *((turn.role, turn.text) for turn in turns)]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RowProblem(f"field {name!r} holds {text[error.start]!r}, half of a character") from None
