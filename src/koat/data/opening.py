"""From a path to text: find the file, unpack it, and make sure that it is UTF-8."""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from koat.core.errors import DataError

_WIDE_MARKS = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)


@dataclass(frozen=True, slots=True)
class RawRow:
    """One item of a JSON file; `problem` says why it could not be parsed, and is empty otherwise."""

    source: str
    value: Any = None
    problem: str = ""


def describe_missing(path: Path) -> str:
    """Say that a file is not there, with the nearest names in its folder (or the nearest folder)."""
    folder = path.parent
    if not folder.is_dir():
        return f"{path}: there is no such file, nor the folder {folder} (looked for from {Path.cwd()})"
    # Compared without case, because a slip in upper and lower case is the commonest one.
    names = {entry.name.lower(): entry.name for entry in folder.iterdir()}
    near = [names[name] for name in get_close_matches(path.name.lower(), names, n=3, cutoff=0.5)]
    hint = f"; near it are: {', '.join(near)}" if near else f"; {folder} holds {len(names)} other files"
    return f"{path}: there is no such file{hint}"


def read_text(path: Path) -> str:
    """Return a file's text, unpacked when it is gzip and without a byte-order mark.

    Raises DataError for a file that cannot be read or unpacked, is empty, or is not UTF-8 (with the encoding
    that it looks like and the command that converts it).
    """
    try:
        data = Path(os.path.expanduser(path)).read_bytes()  # which, unlike Path's own, leaves an unknown home as it is
    except FileNotFoundError:
        raise DataError(describe_missing(path)) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    if data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: starts like a gzip file but cannot be unpacked: {error}") from None
    text = _decode(path, data)
    if not text.strip():
        raise DataError(f"{path}: the file is empty; at least one row is needed")
    return text


def _decode(path: Path, data: bytes) -> str:
    encoding = next((name for mark, name in _WIDE_MARKS if data.startswith(mark)), "")
    if not encoding and data[:4096].count(0) > len(data[:4096]) // 8:
        encoding = "UTF-16LE" if data[1::2].count(0) >= data[::2].count(0) else "UTF-16BE"
    if encoding:
        raise DataError(_refuse_encoding(path, encoding, ""))
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        where = f" (byte 0x{data[error.start]:02x} in line {line} cannot be UTF-8)"
    try:
        looks_korean = re.search("[가-힣]", data.decode("cp949")) is not None
    except UnicodeDecodeError:
        looks_korean = False
    raise DataError(_refuse_encoding(path, "CP949" if looks_korean else "", where))


def _refuse_encoding(path: Path, encoding: str, where: str) -> str:
    likely = f"it looks like {encoding}" if encoding else "its encoding is unknown, or the file is damaged"
    plain = path.with_name(path.name.removesuffix(".gz"))
    command = f"iconv -f {encoding or 'ENCODING'} -t UTF-8 {plain.name} > {plain.stem}.utf8{plain.suffix}"
    unpack = "unpack it, then " if plain != path else ""
    return f"{path}: is not UTF-8 text{where}; {likely}. Convert it: {unpack}{command}"


def holds_json_lines(text: str, suffix: str) -> bool:
    """Tell JSON Lines (one object per line) from one JSON document."""
    if suffix in (".jsonl", ".ndjson"):
        return True
    lines = (line for line in text.split("\n") if line.strip())
    first, second = next(lines, "").strip(), next(lines, "").strip()
    # A document that is spread over lines does not close its first one.
    return first.startswith("{") and first.endswith("}") and bool(second)


def read_json_lines(text: str, name: str) -> Iterator[RawRow]:
    """Yield one row per line that is not blank, broken ones with their problem."""
    # Not splitlines: JSON strings may hold U+2028 and its like unescaped.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield RawRow(f"{name}:{number}", json.loads(line))
        except json.JSONDecodeError as error:
            yield RawRow(f"{name}:{number}", problem=f"is not valid JSON: {error.msg} (column {error.colno})")
        except RecursionError:
            yield RawRow(f"{name}:{number}", problem="is not a row: its JSON is nested too deeply")


def parse_document(text: str, name: str) -> Any:
    """Return the value of a JSON document; raise DataError with line and column when it is broken."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{name}:{error.lineno}: is not valid JSON: {error.msg} (column {error.colno}). "
            "A broken document cannot be read in part; one object per line in a .jsonl file can"
        ) from None
    except RecursionError:
        raise DataError(f"{name}: its JSON is nested too deeply to be rows of data") from None
