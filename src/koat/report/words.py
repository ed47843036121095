"""Words of tables and reports, in English and Korean, kept in `words.yaml`."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any, Literal

from koat.core.config_files import read_config_file

Language = Literal["en", "ko"]
LANGUAGES: tuple[Language, ...] = ("en", "ko")


@cache
def load_words() -> dict[str, dict[str, str]]:
    """Return every text by its key, and by language."""
    with resources.as_file(resources.files("koat").joinpath("report", "words.yaml")) as file:
        return read_config_file(file)


def say(key: str, language: Language = "en", **values: Any) -> str:
    """Return a text with its `values` filled in."""
    return load_words()[key][language].format(**values)


def say_both(key: str, **values: Any) -> dict[Language, str]:
    """Return a text in each language; a value may be such a mapping itself."""
    return {language: say(key, language, **pick(values, language)) for language in LANGUAGES}


def pick(values: dict[str, Any], language: Language) -> dict[str, Any]:
    """Return values with those that are texts in each language in one of them."""
    return {name: value[language] if isinstance(value, dict) else value for name, value in values.items()}


def has_words(key: str) -> bool:
    """Whether there is a text of that key."""
    return key in load_words()
