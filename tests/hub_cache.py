"""A base model laid out as the Hub's cache on this machine has it."""

from __future__ import annotations

import shutil
from pathlib import Path

NAME = "me/tiny"


def cache_base(folder: Path, base: Path, commit: str, *, weights: bool = True) -> None:
    """Put a base model's files into a cache as a commit, the latest of its branch."""
    repository = folder / "models--me--tiny"
    shutil.copytree(base, repository / "snapshots" / commit)
    if not weights:
        (repository / "snapshots" / commit / "model.safetensors").unlink()
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")
