"""Dividing records into parts by title, so that no article stands on both sides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from koat.core.errors import DataError, suggest
from koat.data.opening import read_text
from koat.data.records import Record
from koat.data.row_values import join_names
from koat.data.tables import read_table


def read_split_file(split_file: str | Path) -> dict[str, str]:
    """Return the part of each title from a TSV with the columns `title` and `split`.

    Raises DataError when a column is missing, a row is broken, or a title stands in two parts.
    """
    columns, rows = read_table(read_text(Path(split_file)), str(split_file), "\t")
    for needed in ("title", "split"):
        if needed not in columns:
            raise DataError(
                f"{split_file}: has no column {needed!r}{suggest(needed, columns)}; it has: "
                f"{join_names(columns)}. A split file is a TSV with the columns title and split"
            )
    parts: dict[str, str] = {}
    for row in rows:
        if row.problem:
            raise DataError(f"{row.source}: {row.problem}")
        title, part = row.value["title"], row.value["split"]
        if parts.setdefault(title, part) != part:
            raise DataError(f"{row.source}: {title!r} is in {part!r} here and in {parts[title]!r} further up")
    return parts


def split_by_title(records: Sequence[Record], split_file: str | Path, part: str) -> list[Record]:
    """Return the records whose `title` field the split file puts in `part`.

    Raises DataError for a part that the file does not name, for records without a title, for titles that the
    file does not list (with their number), and when nothing is left.
    """
    parts = read_split_file(split_file)
    names = dict.fromkeys(parts.values())
    if part not in names:
        raise DataError(f"{split_file}: has no part {part!r}{suggest(part, names)}; it has: {join_names(names)}")
    untitled = [record for record in records if not record.fields.get("title")]
    if untitled:
        raise DataError(
            f"{split_file}: {len(untitled)} of {len(records)} records have no 'title' to split by, "
            f"the first is {untitled[0].source}; map a column to it (columns: {{title: ...}})"
        )
    unlisted = [record for record in records if record.fields["title"] not in parts]
    if unlisted:
        titles = dict.fromkeys(record.fields["title"] for record in unlisted)
        raise DataError(
            f"{split_file}: {len(unlisted)} of {len(records)} records have a title that it does not list "
            f"({len(titles)} titles, such as {next(iter(titles))!r} of {unlisted[0].source}); add them to it"
        )
    chosen = [record for record in records if parts[record.fields["title"]] == part]
    if not chosen:
        raise DataError(f"{split_file}: none of the {len(records)} records is in the part {part!r}")
    return chosen
