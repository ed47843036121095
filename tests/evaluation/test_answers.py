"""KorQuAD's exact match and character F1, on cases worked by hand."""

from __future__ import annotations

import unicodedata

import pytest

from koat.evaluation.answers import match_exactly, measure_overlap, normalise_answer, score_answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("《삼국사기》", "삼국사기"),
        ("〈홍길동전〉과 <춘향전>", "홍길동전 과 춘향전"),
        ("'임수경'(본명)", "임수경 본명"),
        ("‘서울’", "서울"),
        ("“서울”", "“서울”"),
        ("1,000.5%", "10005"),
        ("F-16 전투기", "f16 전투기"),
        ("  New\tYORK \n", "new york"),
        ("The Beatles", "the beatles"),
        ("「」·。", "「」·。"),
        ("!?", ""),
    ],
)
def test_what_does_not_count_goes(text: str, expected: str) -> None:
    assert normalise_answer(text) == expected


@pytest.mark.parametrize(
    ("predicted", "right", "exact", "overlap"),
    [
        ("서울", "서울", 1, 1),
        # Particles stay: 서 울 에 서 against 서 울 share two; precision 2/4, recall 2/2.
        ("서울에서", "서울", 0, 2 * (1 / 2) * 1 / (1 / 2 + 1)),
        ("1989년 2월 15일", "1989년 2월 15일.", 1, 1),
        # White space parts words for exact match and counts as no character.
        ("1989년2월15일", "1989년 2월 15일", 0, 1),
        ("《삼국사기》의", "삼국사기", 0, 2 * (4 / 5) * 1 / (4 / 5 + 1)),
        ("TIME", "time", 1, 1),
        # Characters count as often as they stand there: 가 가 나 against 가 나 나 share 가 and 나.
        ("가가나", "가나나", 0, 2 / 3),
        ("나가", "가나", 0, 1),
        ("부산", "서울", 0, 0),
        ("", "서울", 0, 0),
        ("...", "서울", 0, 0),
        # Two answers of which nothing is left are the same answer, but have no character in common.
        ("", "?!", 1, 0),
    ],
)
def test_answers_worked_by_hand(predicted: str, right: str, exact: float, overlap: float) -> None:
    assert match_exactly(predicted, right) == exact
    assert measure_overlap(predicted, right) == pytest.approx(overlap)
    assert measure_overlap(right, predicted) == pytest.approx(overlap)


@pytest.mark.parametrize("text", ["임수경", "《값》의 Café", "F-16 전투기"])
def test_an_answer_taken_apart_is_the_joined_one(text: str) -> None:
    apart = unicodedata.normalize("NFD", text)
    assert apart != text
    assert normalise_answer(apart) == normalise_answer(text)
    assert score_answer(text, [apart]) == score_answer(apart, [text]) == {"exact_match": 1.0, "f1": 1.0}


def test_the_best_of_several_right_answers_counts_for_each_metric() -> None:
    assert score_answer("임수경", ["전대협", "임수경 대표", "임수경"]) == {"exact_match": 1.0, "f1": 1.0}
    found = score_answer("임수경 씨", ["전대협 대표", "임수경", "임수경 대표"])
    assert found["exact_match"] == 0.0
    assert found["f1"] == pytest.approx(2 * (3 / 4) * 1 / (3 / 4 + 1))
