"""A sequence keeps its tokens and supervision marks in step."""

from __future__ import annotations

import dataclasses

import pytest

from koat.core.sequence import Sequence, supervise_from


def test_supervise_from_marks_the_response_alone() -> None:
    sequence = supervise_from((5, 6, 7, 8), 2, group="article")
    assert sequence.supervised == (False, False, True, True)
    assert (sequence.num_supervised, len(sequence), sequence.group) == (2, 4, "article")


@pytest.mark.parametrize("start", [0, 1])
def test_the_first_token_is_never_supervised(start: int) -> None:
    assert supervise_from((5, 6, 7), start).supervised == (False, True, True)


def test_a_start_past_the_end_supervises_nothing() -> None:
    assert supervise_from((5, 6), 9).num_supervised == 0


@pytest.mark.parametrize(
    ("token_ids", "supervised", "words"),
    [
        ((1, 2), (False,), "2 tokens but 1"),
        ((), (), "at least one token"),
        ((1, 2), (True, True), "nothing predicts it"),
    ],
)
def test_contradictions_are_refused(token_ids: tuple[int, ...], supervised: tuple[bool, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Sequence(token_ids, supervised)


def test_sequences_are_values() -> None:
    one, same = supervise_from((1, 2, 3), 1), supervise_from((1, 2, 3), 1)
    assert one == same and len({one, same}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.group = "other"  # type: ignore[misc]
