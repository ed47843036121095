"""TSV and CSV files: a header row, then one row of texts per line."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from koat.core.errors import DataError
from koat.data.opening import RawRow
from koat.data.row_values import compose, join_names

Cells = tuple[int, list[str], str]
"""Line number, cells, and why the line could not be read (empty when it could)."""


def guess_delimiter(header: str, suffix: str) -> str:
    """Return a table's delimiter from its header line and suffix, or an empty string if it is no table."""
    if suffix == ".tsv" or "\t" in header:
        return "\t"
    return "," if suffix == ".csv" or "," in header else ""


def read_table(text: str, name: str, delimiter: str) -> tuple[list[str], Iterator[RawRow]]:
    """Return a table's columns and its rows, broken ones with their problem.

    TSV is read with quoting off, as NSMC is: a quotation mark is a character like any other. CSV has standard
    quoting. Raises DataError for a header that cannot name columns, and for several lines of CSV that cannot be read
    as one row.
    """
    lines = _split_tsv(text) if delimiter == "\t" else _split_csv(text, name)
    number, header, problem = next(lines, (1, [], "has no header row"))
    columns = [compose(cell.strip()) or f"column_{index}" for index, cell in enumerate(header, 1)]
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if problem or twice:
        reason = problem or f"the header names {join_names(twice)} more than once; each column needs its own name"
        raise DataError(f"{name}:{number}: {reason}")
    return columns, _pair_rows(lines, columns, name)


def _pair_rows(lines: Iterator[Cells], columns: list[str], name: str) -> Iterator[RawRow]:
    for number, cells, problem in lines:
        source = f"{name}:{number}"
        if not problem and len(cells) != len(columns):
            problem = f"has {len(cells)} columns, but the header names {len(columns)}: {join_names(columns)}"
        yield (RawRow(source, problem=problem) if problem else RawRow(source, dict(zip(columns, cells, strict=True))))


def _split_tsv(text: str) -> Iterator[Cells]:
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if line.strip():
            yield number, line.split("\t"), ""


def _split_csv(text: str, name: str) -> Iterator[Cells]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        number = reader.line_num + 1
        try:
            cells = _read_cells(reader, len(text))
        except StopIteration:
            return
        except csv.Error as error:
            problem = f"({error}); is a quotation mark open? TSV has no quoting"
            if reader.line_num > number:
                # Left out as one bad row, everything from here to the next quotation mark would be lost.
                span = f"lines {number} to {reader.line_num}"
                raise DataError(f"{name}: {span} cannot be read as CSV {problem}. Correct line {number}") from None
            yield number, [], f"is not valid CSV {problem}"
            continue
        if any(cell.strip() for cell in cells) or len(cells) > 1:
            yield number, cells, ""


def _read_cells(rows: Iterator[list[str]], longest: int) -> list[str]:
    """Return the next row of a CSV reader, whose cells may have up to `longest` characters.

    The csv module refuses more than 131,072, which long articles have. Its limit holds for the whole process, so it is
    put back after each row.
    """
    before = csv.field_size_limit()
    csv.field_size_limit(max(before, longest))
    try:
        return next(rows)
    finally:
        csv.field_size_limit(before)
