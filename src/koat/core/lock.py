"""Locks between processes: held until released or until the process ends, however it ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from koat.core.atomic import cannot_write
from koat.core.errors import RunFolderError


@contextmanager
def hold(file: Path, what: str | Path) -> Iterator[None]:
    """Hold the lock on a file, which is made for it and goes with it.

    Raises RunFolderError that names `what` is being worked on when another holder has it, in this process or another.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        held = _take(file)
    except OSError as error:
        raise cannot_write(file, error.errno, error) from error
    if held is None:
        raise RunFolderError(f"{what} is being worked on by another process. Wait for it, or end it, then try again.")
    with held:
        try:
            yield
        finally:
            with suppress(OSError):
                file.unlink()


def _take(file: Path) -> IO[str] | None:
    """Open a file and lock it; None where somebody else has it."""
    while True:
        opened = file.open("w")
        if not _lock(opened):
            opened.close()
            return None
        with suppress(OSError):
            if os.path.samestat(os.fstat(opened.fileno()), file.stat()):
                return opened
        opened.close()  # its last holder removed it between opening and locking


def _lock(file: IO[str]) -> bool:
    """Lock an open file; true where the system cannot."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True
