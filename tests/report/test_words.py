"""The words of reports: every one in both languages, with the same blanks, and none that nobody says."""

from __future__ import annotations

import re
from pathlib import Path
from string import Formatter

import pytest

import koat
from koat.report.words import LANGUAGES, load_words, say, say_both

SOURCE = Path(koat.__file__).parent
BY_NAME = ("means_", "part_", "axis_")
"""Words that are looked up by a name from elsewhere."""


def list_blanks(text: str) -> set[str]:
    """Return the names of the values that a text wants."""
    return {name for _, name, _, _ in Formatter().parse(text) if name}


@pytest.mark.parametrize("key", list(load_words()))
def test_both_languages_have_the_same_blanks(key: str) -> None:
    texts = load_words()[key]
    assert set(texts) == set(LANGUAGES) and all(texts.values())
    assert list_blanks(texts["en"]) == list_blanks(texts["ko"])
    assert texts["ko"] == texts["en"] or not texts["ko"].isascii(), "Korean without Hangul"


def test_every_word_is_said_and_every_said_word_is_there() -> None:
    files = [*SOURCE.glob("report/**/*.py"), *SOURCE.glob("report/template/*.jinja")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    said = set(re.findall(r'\b(?:t|say|say_both|words)\(\s*"(\w+)"', text))
    assert said - {"axis_"} <= set(load_words())
    assert not [key for key in load_words() if f'"{key}"' not in text and not key.startswith(BY_NAME)]


def test_a_value_may_be_in_both_languages() -> None:
    assert say("num_scores", "ko", number=4) == "점수 4종"
    assert say_both("on_log", axis=say_both("axis_loss")) == {"en": "loss (logarithmic)", "ko": "손실(로그)"}
