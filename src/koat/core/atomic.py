"""Writing files and folders whole or not at all.

A file or folder is first written under a temporary name beside its place (`.NAME.tmp-HOST-PID-LIFE-N`),
brought to disk, and renamed. A folder that was there before steps aside (`.NAME.old-...`) until the new one stands.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

from koat.core.config_files import dump_yaml
from koat.core.errors import RunFolderError

_LIFE = secrets.token_hex(4)  # tells this process from an earlier one that had its number
_HOST = blake2b(platform.node().encode(errors="replace"), digest_size=4).hexdigest()
_counter = itertools.count()
A_DAY = 86_400.0
"""Seconds after which nobody is still writing."""
_LEFTOVER = re.compile(
    r"\.(?P<name>.+)\.(?P<kind>tmp|old)-(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-(?P<life>[0-9a-f]{8})-\d+"
)
_REASONS = {
    errno.ENOSPC: ("the disk is full", "Free some space, or write to another disk, then try again."),
    errno.EDQUOT: (
        "your disk quota is used up",
        "Free some space, or write to another disk, then try again.",
    ),
    errno.EFBIG: (
        "the file is larger than allowed here",
        "Raise the limit on file sizes, or write elsewhere.",
    ),
    errno.EACCES: ("permission is refused", "Change the permissions of the folder, or write elsewhere."),
    errno.EPERM: ("permission is refused", "Change the permissions of the folder, or write elsewhere."),
    errno.EROFS: ("the file system is read-only", "Write to another folder."),
    errno.ENOTDIR: ("part of the path is a file", "Write to another folder."),
    errno.ENAMETOOLONG: ("the name is too long", "Choose a shorter one."),
    errno.EIO: ("the disk reports an error", "Check the disk, or write to another one."),
}


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text whole or not at all; raises RunFolderError and leaves what was there untouched."""
    path = Path(os.path.realpath(path))
    temporary = _beside(path, "tmp")
    try:
        with _open_new(temporary) as file:
            file.write(encode_text(text))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise cannot_write(path, error.errno, error) from error
        raise
    _sync(path.parent)


def write_json(path: str | Path, value: Any) -> None:
    """Write plain values (and paths) as indented JSON, whole or not at all; raises RunFolderError."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=os.fspath) + "\n")


def write_yaml(path: str | Path, value: Any) -> None:
    """Write plain values as YAML, whole or not at all; raises RunFolderError."""
    write_text(path, dump_yaml(value))


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Give a temporary folder to fill; on success it takes the place of `path`, on an exception it goes.

    Raises RunFolderError where the disk refuses, also when a library inside the block met the refusal.
    """
    target = Path(os.path.realpath(path))
    temporary = _beside(target, "tmp")
    try:
        recover(target)
        temporary.mkdir(parents=True)
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                _sync(Path(folder, name), strict=True)
            _sync(Path(folder))
        _take_place(temporary, target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if (number := _refusal(error)) is not None:
            raise cannot_write(target, number, error) from error
        raise


def recover(path: str | Path) -> bool:
    """Put back a folder that had stepped aside when its writer was killed, and remove what the dead left.

    Returns whether something was put back. Leftovers of living processes stay. Processes of other machines cannot be
    asked; what they left is taken for dead after a day (a container has another name after each start).
    """
    target, restored = Path(path), False
    for entry, kind in _leftovers(target.parent, target.name):
        if kind == "old" and not os.path.lexists(target):
            os.rename(entry, target)
            restored = True
        else:
            remove(entry)
    return restored


def clean_leftovers(folder: str | Path) -> None:
    """Recover all that killed writers left directly in a folder; does nothing where it may not write."""
    with suppress(OSError):
        for name in {_name_of(entry) for entry, _ in _leftovers(Path(folder))}:
            recover(Path(folder, name))


def check_writable(folder: Path) -> None:
    """Raise RunFolderError where a folder cannot be made or written; leaves nothing behind, no new folder either."""
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    probe = folder / f"probe-{_LIFE}.txt"
    write_text(probe, "")
    remove(probe)
    with suppress(OSError):  # somebody else writes there already
        for place in new:
            place.rmdir()


def remove(path: Path) -> None:
    """Remove a file, link or folder as far as it can be; one that is not there is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def encode_text(text: str) -> bytes:
    """Encode a text as UTF-8, whatever it holds."""
    # Half a surrogate pair has no UTF-8; escaped it is still valid JSON, and nothing is lost.
    return text.encode("utf-8", errors="backslashreplace")


def cannot_write(path: Path, number: int | None, error: BaseException) -> RunFolderError:
    """Make the error for a refused write from its error number: the reason, and what to do."""
    reason, advice = _REASONS.get(
        number or 0, (getattr(error, "strerror", None) or str(error), "Choose another place.")
    )
    return RunFolderError(f"cannot write {path}: {reason}. What was there before is untouched. {advice}")


def _refusal(error: BaseException) -> int | None:
    """Return the error number if the disk refused; libraries written in Rust hide it in their message."""
    if isinstance(error, OSError):
        return error.errno if error.errno in _REASONS else None
    found = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, Exception) else None
    return int(found[1]) if found and int(found[1]) in _REASONS else None


def _open_new(path: Path) -> BinaryIO:
    """Open a file for writing, its folders made where they lack."""
    for tries_left in (2, 1, 0):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("wb")
        except FileNotFoundError:  # another process' `check_writable` takes new folders away while they are empty
            if not tries_left:
                raise
    raise AssertionError


def _sync(path: Path, *, strict: bool = False) -> None:
    """Bring a file, or a folder's list of names, to disk. Some file systems cannot do it for folders."""
    try:
        # Windows brings to disk only what is open for writing.
        handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError:
        if strict:
            raise


def _take_place(temporary: Path, target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise RunFolderError(
            f"cannot write the folder {target}: there is a file of that name. Move it away, or choose another name."
        )
    aside = _beside(target, "old")
    replaces = os.path.lexists(target)
    if replaces:
        os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except BaseException:
        if replaces:
            os.rename(aside, target)
        raise
    _sync(target.parent)
    if replaces:  # under a name that is never put back, so that a kill while removing does no harm
        doomed = _beside(target, "tmp")
        os.rename(aside, doomed)
        remove(doomed)


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}-{_HOST}-{os.getpid()}-{_LIFE}-{next(_counter)}")


def _name_of(leftover: Path) -> str:
    found = _LEFTOVER.fullmatch(leftover.name)
    assert found is not None
    return found["name"]


def _leftovers(folder: Path, name: str | None = None) -> list[tuple[Path, str]]:
    """List what dead processes left in a folder, for one name or all, the newest first."""
    found: list[tuple[float, Path, str]] = []
    for entry in folder.iterdir() if folder.is_dir() else ():
        match = _LEFTOVER.fullmatch(entry.name)
        if match and name in (None, match["name"]):
            changed, here = entry.lstat().st_mtime, match["host"] == _HOST
            if not (_is_alive(int(match["pid"]), match["life"]) if here else time.time() - changed < A_DAY):
                found.append((changed, entry, match["kind"]))
    return [(entry, kind) for _, entry, kind in sorted(found, reverse=True)]


def _is_alive(pid: int, life: str) -> bool:
    if pid == os.getpid():
        return life == _LIFE
    if os.name != "posix":  # there, signal 0 is no question but a signal
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
