"""Local files as the data of lm-evaluation-harness tasks: what the YAML files in `lm_tasks` name by `!function`.

A task says which files it reads and which column fills which field; `--data-dir` (or `--metadata data_dir=DIR`
in plain lm-eval) says where they lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from koat.core.errors import ConfigError, DataError, suggest
from koat.data.opening import RawRow, read_json_lines, read_text
from koat.data.row_values import join_names
from koat.data.tables import read_table

Row = dict[str, Any]


def load_local(
    data_dir: str | None = None,
    *,
    files: Mapping[str, str],
    columns: Mapping[str, str],
    header: list[str] | None = None,
    pool: int = 0,
    make: Callable[[Row], Row] | None = None,
    **_: Any,
) -> dict[str, Any]:
    """Return a `datasets.Dataset` per split of `files` (paths inside `data_dir`).

    `columns` maps a field to the file's column; `header` names the columns of a CSV file that has no header row.
    The first `pool` rows of a file become the split `shots` and are not asked. `make` rewrites each row. Other
    arguments are the harness' own metadata. Raises ConfigError without a folder, DataError for a file or column
    that is not there and for broken rows.
    """
    from datasets import Dataset

    if data_dir is None:
        raise ConfigError(f"this task reads local files ({join_names(files.values())}): give --data-dir FOLDER.")
    splits: dict[str, Any] = {}
    for split, name in files.items():
        rows = [pick_columns(row, columns) for row in read_rows(Path(data_dir).expanduser() / name, header)]
        rows = [make(row) for row in rows] if make else rows
        if len(rows) <= pool:
            raise DataError(f"{Path(data_dir) / name} has {len(rows)} rows, but the first {pool} are shots.")
        if pool:
            splits["shots"] = Dataset.from_list(rows[:pool])
        splits[split] = Dataset.from_list(rows[pool:])
    return splits


def read_rows(path: Path, header: list[str] | None) -> Iterator[RawRow]:
    """Yield a file's rows: JSON lines, CSV or TSV, plain or gzip. Raises DataError for a broken row.

    TSV is read with quoting off, so a spreadsheet's quotation marks come off its cells here; in the other formats a
    quotation mark that is left is part of the text.
    """
    text, suffix = read_text(path), Path(path.name.removesuffix(".gz")).suffix
    if header:
        text = ",".join(header) + "\n" + text
    if suffix in (".csv", ".tsv"):
        rows = read_table(text, str(path), "\t" if suffix == ".tsv" else ",")[1]
    else:
        rows = read_json_lines(text, str(path))
    for row in rows:
        if row.problem or not isinstance(row.value, Mapping):
            raise DataError(f"{row.source}: {row.problem or 'is no object with named fields'}")
        if suffix == ".tsv":
            row = replace(row, value={column: unquote(cell) for column, cell in row.value.items()})
        yield row


def pick_columns(row: RawRow, columns: Mapping[str, str]) -> Row:
    """Return the fields of a row. Raises DataError naming a column that is not there."""
    for column in columns.values():
        if column not in row.value:
            raise DataError(
                f"{row.source}: the task needs the column {column!r}, which is not there{suggest(column, row.value)}. "
                f"The file has: {join_names(list(row.value))}."
            )
    return {field: row.value[column] for field, column in columns.items()}


def unquote(cell: str) -> str:
    """Take a spreadsheet's quotation marks off a cell: those around it, and the doubling of those within."""
    if len(cell) > 1 and cell[0] == cell[-1] == '"':
        return cell[1:-1].replace('""', '"')
    return cell
