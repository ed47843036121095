"""Files of JSON lines that a killed writer cannot spoil: only the last line can be torn, and it is mended."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from koat.core.atomic import cannot_write, encode_text, write_text
from koat.core.errors import RunFolderError


def append_line(path: str | Path, mapping: Mapping[str, Any]) -> None:
    """Append one JSON line; a torn line that a killed process left at the end goes first.

    Raises RunFolderError, the lines before untouched.
    """
    line = encode_text(json.dumps(mapping, ensure_ascii=False, default=os.fspath) + "\n")
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
    except OSError as error:
        raise cannot_write(Path(path), error.errno, error) from error
    try:
        size = os.fstat(handle).st_size
        try:
            size = _mend(Path(path), handle)
            while line:
                line = line[os.write(handle, line) :]
        except OSError as error:
            os.ftruncate(handle, size)
            raise cannot_write(Path(path), error.errno, error) from error
    finally:
        os.close(handle)


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """Read JSON lines; a torn last line is left out and a missing file has none.

    Raises RunFolderError for a broken line before the last.
    """
    return [value for _, value in _parse_lines(Path(path))]


def truncate_lines(path: str | Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a file of JSON lines, whole or not at all, with the lines that `keep` wants."""
    if Path(path).exists():
        write_text(path, "".join(f"{text}\n" for text, value in _parse_lines(Path(path)) if keep(value)))


def _mend(path: Path, handle: int) -> int:
    """Make a file of lines end at the end of a line, and return its size in bytes."""
    size = os.fstat(handle).st_size
    if not size:
        return size
    os.lseek(handle, -1, os.SEEK_END)  # where to read; what is written goes to the end all the same
    if os.read(handle, 1) == b"\n":
        return size
    data = path.read_bytes()
    start = data.rfind(b"\n") + 1
    if _parse(data[start:]) is not None:  # whole, but for the line break
        return size + os.write(handle, b"\n")
    os.ftruncate(handle, start)
    return start


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line.decode("utf-8"))
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _parse_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.exists():
        return
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be read: {error.strerror or error}") from error
    last = max((number for number, line in enumerate(lines, 1) if line.strip()), default=0)
    for number, line in enumerate(lines, 1):
        value = _parse(line)
        if value is not None:
            yield line.decode("utf-8"), value
        elif line.strip() and number != last:
            raise RunFolderError(f"{path}, line {number}: is no JSON mapping; the file was damaged or edited")
