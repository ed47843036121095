"""Everything else: Hub ids, Parquet and Arrow files, saved folders, read through the `datasets` library."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from koat.core.errors import DataError, suggest
from koat.data.opening import RawRow, describe_missing
from koat.data.row_values import join_names

STORED_SUFFIXES = (".parquet", ".arrow")
_FILE_SUFFIXES = (".json", ".jsonl", ".ndjson", ".tsv", ".csv", ".txt", ".gz", *STORED_SUFFIXES)
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def split_part(path_or_id: str) -> tuple[str, str]:
    """Take `owner/name:validation` apart into the id and the part asked for (empty for none)."""
    name, colon, part = path_or_id.rpartition(":")
    return (name, part) if colon and re.fullmatch(r"[\w.-]+", part) and len(name) > 1 else (path_or_id, "")


def looks_like_hub_id(path_or_id: str, *, named: bool) -> bool:
    """Tell whether a name that is no file may be a Hub id; `named` when `datasets` was asked for."""
    name, _ = split_part(path_or_id)
    if not _HUB_ID.fullmatch(name):
        return False
    path = Path(name)
    # A path into a folder that exists, or with a data file's suffix, is far likelier a slip of the pen.
    return named or ("/" in name and path.suffix not in _FILE_SUFFIXES and not path.parent.is_dir())


def read_stored(path_or_id: str) -> Iterator[RawRow]:
    """Yield the rows of a Parquet or Arrow file, a saved folder, or a data set on the Hub.

    `:part` behind a folder or id chooses one of several parts; without it `train` is taken, or the only one.
    Raises DataError when nothing can be loaded or the part is not there.
    """
    name, part = split_part(path_or_id)
    if Path(path_or_id).exists():
        name, part = path_or_id, ""
    try:
        table = _load(name)
    except ImportError as error:
        raise DataError(f"{name}: cannot be read: {error}. Install it: pip install 'koat[data]'") from None
    except Exception as error:  # the library and its file systems raise every kind
        if not Path(name).exists():
            reason = str(error).strip().split("\n")[0]
            raise DataError(
                f"{describe_missing(Path(name))}; nor could it be loaded from the Hugging Face Hub: {reason}"
            ) from None
        raise DataError(f"{name}: cannot be read as stored data: {error}") from None
    if isinstance(table, dict):
        table = _choose_part(table, name, part)
    elif part:
        raise DataError(f"{name}: has no parts, so {part!r} cannot be chosen; leave ':{part}' out")
    for index, row in enumerate(table, 1):
        yield RawRow(f"{path_or_id}: item {index}", row)


def _load(name: str) -> Any:
    # Imported here: it takes seconds and most data never needs it.
    import datasets

    path = Path(name)
    if path.is_dir():
        saved = (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()
        return datasets.load_from_disk(name) if saved else datasets.load_dataset(name)
    if path.suffix == ".arrow":
        return datasets.Dataset.from_file(name)
    if path.suffix == ".parquet":
        # Read directly: from_parquet would leave a converted copy in the user's cache.
        import pyarrow.parquet

        return datasets.Dataset(pyarrow.parquet.read_table(name))
    return datasets.load_dataset(name)


def _choose_part(parts: Mapping[str, Any], name: str, part: str) -> Any:
    chosen = part or ("train" if "train" in parts or len(parts) != 1 else next(iter(parts)))
    if chosen not in parts:
        raise DataError(
            f"{name}: there is no part {chosen!r}{suggest(chosen, parts)}; it has: {join_names(parts)}. "
            f"Name one behind a colon: {name}:{next(iter(parts), 'train')}"
        )
    return parts[chosen]
