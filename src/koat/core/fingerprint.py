"""Fingerprints that pin the content of files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TypedDict

from koat.core.errors import DataError


class Fingerprint(TypedDict):
    """What pins a file's content."""

    sha256: str
    bytes: int


def fingerprint_file(path: str | Path) -> Fingerprint:
    """Return the SHA-256 and size of a file; raises DataError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256")
            return {"sha256": digest.hexdigest(), "bytes": file.tell()}
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
