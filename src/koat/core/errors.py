"""Errors that a user can cause: each says what was received, what is allowed, and what to do.

KoatError
 |- ConfigError      a setting is unknown, missing or contradictory
 |- DataError        a file, row or template cannot be used
 |- ModelError       a base model or tokenizer cannot be used
 |- AdapterError     a method, target or adapter file cannot be used
 |- RunFolderError   a run folder is missing, incomplete or cannot be written
 |- TrainingError    training cannot go on
 `- HubError         the Hugging Face Hub cannot be reached, or refuses

The command line prints the message alone and exits with status 2. Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class KoatError(Exception):
    """Base of every error that a user can cause."""


class ConfigError(KoatError):
    """A setting is unknown, missing or contradictory."""


class DataError(KoatError):
    """A file, row or template cannot be used."""


class ModelError(KoatError):
    """A base model or tokenizer cannot be used."""


class AdapterError(KoatError):
    """A method, target or adapter file cannot be used."""


class RunFolderError(KoatError):
    """A run folder is missing, incomplete or cannot be written."""


class TrainingError(KoatError):
    """Training cannot go on."""


class HubError(KoatError):
    """The Hugging Face Hub cannot be reached, or refuses."""


def summarise_error(error: Exception) -> str:
    """Return an error's first line, with the one that it announces, and its kind where the words alone say little."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    first = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    telling = first and not isinstance(error, KeyError | AttributeError | TypeError | ArithmeticError)
    return first if telling else ": ".join(part for part in (type(error).__name__, first) if part)


def suggest(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the nearest known word, or an empty string."""
    nearest = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""
