"""The forest against a trie made of Python sets of prefixes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from koat.core.sequence import Sequence
from koat.forest.build import Forest, build_forest, count_shared

# The same examples every time, however busy the machine is.
STEADY = settings(
    max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
# Three letters and short bodies: equal sequences, prefixes of each other and single tokens come up all the time.
BODY = st.lists(st.integers(0, 2), min_size=1, max_size=7).map(tuple)


@st.composite
def draw_sets(draw: st.DrawFn) -> list[Sequence]:
    bodies = draw(st.lists(BODY, max_size=9))
    return [Sequence(body, (False, *draw(st.tuples(*[st.booleans()] * (len(body) - 1))))) for body in bodies]


def count_needed(sequence: Sequence) -> int:
    """Return how many tokens some prediction stands on; all of them where nothing is predicted."""
    targets = [at for at, supervised in enumerate(sequence.supervised) if supervised]
    return max(targets) if targets else len(sequence.token_ids)


def list_prefixes(sequences: list[Sequence]) -> set[tuple[int, ...]]:
    return {s.token_ids[: end + 1] for s in sequences for end in range(count_needed(s))}


def spell(forest: Forest, token: int) -> tuple[int, ...]:
    """Return the tokens that `token` sees, in order, by the definition of visibility."""
    return tuple(int(forest.token_ids[key]) for key in range(token + 1) if token < forest.subtree_end[key])


@STEADY
@given(draw_sets())
def test_every_distinct_prefix_is_one_token(sequences: list[Sequence]) -> None:
    forest = build_forest(sequences)
    spelt = [spell(forest, token) for token in range(len(forest))]
    assert len(spelt) == len(set(spelt))
    assert set(spelt) == list_prefixes(sequences)


@STEADY
@given(draw_sets())
def test_position_and_subtree_end_agree_with_the_trie(sequences: list[Sequence]) -> None:
    forest = build_forest(sequences)
    spelt = [spell(forest, token) for token in range(len(forest))]
    for token, prefix in enumerate(spelt):
        assert forest.position[token] == len(prefix) - 1
        below = [other for other, longer in enumerate(spelt) if longer[: len(prefix)] == prefix]
        # What lies below a token is one run, starting with the token itself.
        assert below == list(range(token, int(forest.subtree_end[token])))


@STEADY
@given(draw_sets())
def test_predictions_are_complete(sequences: list[Sequence]) -> None:
    forest = build_forest(sequences)
    found = sorted(
        (int(owner), spell(forest, int(source)), int(target))
        for source, target, owner in zip(forest.source, forest.target, forest.owner, strict=True)
    )
    expected = sorted(
        (owner, sequence.token_ids[:at], sequence.token_ids[at])
        for owner, sequence in enumerate(sequences)
        for at, supervised in enumerate(sequence.supervised)
        if supervised
    )
    assert found == expected


@STEADY
@given(BODY, BODY)
def test_count_shared(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    expected = 0
    while expected < min(len(left), len(right)) and left[expected] == right[expected]:
        expected += 1
    assert count_shared(left, right) == expected


@pytest.mark.parametrize("differs_at", [0, 1, 511, 512, 998, 999])
def test_count_shared_of_long_sequences(differs_at: int) -> None:
    left = tuple(range(1000))
    right = (*left[:differs_at], -1, *left[differs_at + 1 :])
    assert count_shared(left, right) == differs_at


def test_predictions_of_one_sequence_are_in_order() -> None:
    rng = np.random.default_rng(0)
    body = tuple(int(token) for token in rng.integers(0, 9, 30))
    forest = build_forest([Sequence(body, (False,) + (True,) * 29)])
    assert forest.source.tolist() == list(range(29))
    assert forest.target.tolist() == list(body[1:])


def test_a_chain_of_prefixes_is_its_longest_member() -> None:
    body = (5, 4, 3, 2, 1)
    forest = build_forest([Sequence(body[:end], (False,) * end) for end in (3, 1, 5, 2, 4)])
    assert forest.token_ids.tolist() == list(body)
    assert forest.subtree_end.tolist() == [5] * 5


def test_nothing_shared_is_laid_end_to_end() -> None:
    forest = build_forest([Sequence((9, 9), (False, False)), Sequence((1, 9), (False, False))])
    assert forest.token_ids.tolist() == [1, 9, 9, 9]
    assert forest.subtree_end.tolist() == [2, 2, 4, 4]
    assert forest.position.tolist() == [0, 1, 0, 1]


def test_one_token_choices_cost_nothing_beyond_their_prompt() -> None:
    forest = build_forest([Sequence((4, 5, choice), (False, False, True)) for choice in (1, 2, 3)])
    assert forest.token_ids.tolist() == [4, 5]
    assert forest.source.tolist() == [1, 1, 1]
    assert forest.target.tolist() == [1, 2, 3]


def test_no_sequences_make_an_empty_forest() -> None:
    forest = build_forest([])
    assert len(forest) == 0
    assert len(forest.source) == len(forest.target) == len(forest.owner) == 0
