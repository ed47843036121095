"""Errors form one tree and suggest near words."""

from __future__ import annotations

import pytest

from koat.core import errors


@pytest.mark.parametrize(
    "name", ["ConfigError", "DataError", "ModelError", "AdapterError", "RunFolderError", "TrainingError", "HubError"]
)
def test_every_user_error_is_a_koat_error_but_no_other_builtin(name: str) -> None:
    kind = getattr(errors, name)
    assert kind.__mro__[1:] == (errors.KoatError, Exception, BaseException, object)


def test_suggest_names_the_nearest_known_word() -> None:
    assert errors.suggest("cosin", ["linear", "cosine", "constant"]) == " (did you mean 'cosine'?)"


def test_suggest_is_silent_when_nothing_is_near() -> None:
    assert errors.suggest("banana", ["linear", "cosine"]) == ""
    assert errors.suggest("banana", []) == ""


def test_suggest_takes_any_iterable_and_korean() -> None:
    assert errors.suggest("질뭄", (word for word in ["질문", "답변"])) == ""  # half the letters differ
    assert errors.suggest("질문들", iter(["질문", "답변"])) == " (did you mean '질문'?)"


def test_an_error_is_named_where_it_has_no_words() -> None:
    assert errors.summarise_error(MemoryError()) == "MemoryError"
    assert errors.summarise_error(ValueError("")) == "ValueError"
    assert errors.summarise_error(KeyError("x")) == "KeyError: 'x'"
    assert errors.summarise_error(ValueError("these are wrong:\n  a\n  b")) == "these are wrong: a"
