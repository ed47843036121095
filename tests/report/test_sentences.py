"""Sentences about comparisons: the words, the figures, and both languages."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from koat.evaluation.differences import PHRASES, explain_differences
from koat.report.sentences import (
    PHRASES_KO,
    TESTS_KO,
    format_p,
    format_points,
    round_up,
    say_comparison,
    say_conditions,
    say_needed,
    say_note,
    say_reasons,
    say_refusal,
    say_smallest,
)
from koat.workflows.comparing.scored import _find_problem

FOUND: dict[str, Any] = {
    "task": "reviews", "scoring": "likelihood", "left": "A", "right": "B", "better": "B", "unsure": None,
    "value": 0.042, "low": 0.0213, "high": 0.0641, "p": 0.001, "p_holm": 0.003, "test": "exact McNemar",
    "paired": True, "num_items": 500, "smallest": 0.031, "needed": 600,
    "conditions": {"template": "none against koalpaca: another template around the prompt"},
}  # fmt: skip


def test_the_better_one_comes_first() -> None:
    sentence = "B is better than A by 2.1 to 6.4 points (95 %, exact McNemar, Holm p = 0.003)."
    assert say_comparison(FOUND, 3) == sentence
    turned = {**FOUND, "left": "B", "right": "A", "value": -0.042, "low": -0.0641, "high": -0.0213}
    assert say_comparison(turned, 3) == sentence
    assert say_comparison({**FOUND, "p_holm": 0.001}, 1).endswith("(95 %, exact McNemar, p = 0.001).")


def test_what_cannot_be_told_apart_says_what_would() -> None:
    found = {**FOUND, "better": None, "low": -0.011, "high": 0.035, "p_holm": 0.31, "needed": 3861}
    assert say_comparison(found, 2) == (
        "A and B cannot be told apart with 500 items (-1.1 to 3.5 points, 95 %, exact McNemar, Holm p = 0.31): about "
        "3,900 would be needed."
    )
    assert say_comparison({**found, "needed": None, "value": 0.0}, 2).endswith(": they score the same.")
    assert say_comparison({**found, "needed": None}, 2).endswith("more seeds would be needed.")
    assert say_comparison({**found, "needed": 2_000_000}, 2).endswith("more than a million would be needed.")


def test_chance_among_many_is_said_to_be_possible() -> None:
    found = {**FOUND, "better": None, "unsure": "B", "p": 0.018, "p_holm": 0.052}
    assert say_comparison(found, 6) == (
        "B looks better than A by 2.1 to 6.4 points (95 %, exact McNemar, p = 0.018), but as one of 6 comparisons that "
        "may be chance (Holm p = 0.052): about 600 would be needed."
    )


@pytest.mark.parametrize("kind", [{}, {"better": None}, {"better": None, "unsure": "B"}])
@pytest.mark.parametrize("test", list(TESTS_KO))
def test_korean_says_the_same_figures(kind: dict[str, Any], test: str) -> None:
    found = {**FOUND, **kind, "test": test}
    sentence = say_comparison(found, 6, "ko")
    assert "2.1~6.4점" in sentence and TESTS_KO[test] in sentence and "p = 0.003" in sentence
    assert test not in sentence


def test_figures() -> None:
    assert [round_up(number) for number in (7, 99, 101, 1462, 3861, 12001)] == [7, 99, 110, 1500, 3900, 13000]
    assert [format_p(p) for p in (0.0004, 0.0312, 0.5)] == ["p < 0.001", "p = 0.031", "p = 0.50"]
    assert [format_points(share) for share in (0.0213, -0.011, 0.0004, 0.0)] == ["2.1", "-1.1", "0.04", "0.0"]
    assert say_needed(400, FOUND) == ": more would be needed."


def test_the_smallest_difference_and_the_conditions() -> None:
    assert say_smallest(FOUND) == "500 items would have shown a difference of 3.1 points (power 0.8)."
    assert "no difference at all" in say_smallest({**FOUND, "smallest": None})
    lone = {**FOUND, "smallest": None, "num_items": 1}
    assert say_smallest(lone) == "1 items are too few to show any difference."
    assert "koalpaca" in say_conditions(FOUND)
    assert say_conditions({**FOUND, "conditions": {}}) == ""


REFUSAL = {"task": "arc", "left": "A", "right": "B", "reasons": ["acc against acc_norm: another metric"]}


def test_a_refusal_names_its_reason() -> None:
    assert say_refusal(REFUSAL) == "A and B are not ranked on arc: acc against acc_norm: another metric."
    assert say_refusal(REFUSAL, "ko") == (
        "arc에서는 A, B의 순위를 매기지 않습니다. 이유: acc 대 acc_norm: 지표가 다름."
    )


def test_korean_counts_seeds_in_korean() -> None:
    seeded = {**FOUND, "left": "A (3 seeds)", "right": "B (2 seeds)", "better": "B (2 seeds)"}
    assert say_comparison(seeded, 3, "ko").startswith("B(시드 2개)의 점수가 A(시드 3개)보다 2.1~6.4점 높습니다(")
    assert "A(시드 3개), B" in say_refusal({**REFUSAL, "left": "A (3 seeds)"}, "ko")
    assert say_comparison(seeded, 3).startswith("B (2 seeds) is better")


@pytest.mark.parametrize(
    ("values", "num_items", "value"),
    [({}, 2, 0.5), ({"1": 1.0}, 2, 0.5), ({"1": 7.0, "2": 1.0}, 2, 4.0), ({"1": 1.0, "2": 1.0}, 2, 0.5)],
    ids=["gone", "fewer", "no share", "another mean"],
)
def test_what_is_left_out_is_said_in_korean(values: dict[str, float], num_items: int, value: float) -> None:
    problem = _find_problem(SimpleNamespace(predictions=values, values=values, num_items=num_items, value=value))
    note = f"base: nsmc, likelihood, was left out: {problem}"
    assert problem and say_note(note) == note
    assert re.fullmatch(r"base: nsmc, likelihood: 비교에서 뺐습니다\. [^a-z]+\.", say_note(note, "ko"))


def test_every_reason_has_its_korean() -> None:
    assert PHRASES_KO.keys() == PHRASES.keys()
    left = {name: f"{name}-1" for name in PHRASES}
    right = {name: f"{name}-2" for name in PHRASES}
    for name, reason in explain_differences(left, right).items():
        assert say_reasons([reason], "ko") == f"{name}-1 대 {name}-2: {PHRASES_KO[name]}"
    assert say_reasons(["500 against 400: other items, 12 of them in common"], "ko") == (
        "500 대 400: 문항이 다름, 공통 12개"
    )
    missing = explain_differences({"shots": 5, "colour": "red"}, {})
    assert say_reasons(missing.values(), "ko") == "예시가 다름: 한쪽은 밝히지 않음; colour: 다름: 한쪽은 밝히지 않음"


def test_what_one_side_does_not_say_is_no_difference_that_was_seen() -> None:
    left, right = {"items": {"num": 500}}, {"items": {"num": 500, "fingerprint": "0123456789abcdef"}}
    assert explain_differences(left, right) == {"items": "other items: one of the two does not say which"}
    assert "against" in explain_differences(left, {"items": {"num": 400, "fingerprint": "f"}})["items"]
    # Of other parts a contract leaves out what is not there: that is a difference, and known.
    plain, cleaned = {"prompt": {"clean": {}}}, {"prompt": {"clean": {"document": "strip"}}}
    assert explain_differences(plain, cleaned) == {"prompt": "another prompt"}


def test_reasons_in_two_words_have_their_korean() -> None:
    reasons = ["one against two: another few-shot style", "another few-shot style"]
    assert say_reasons(reasons, "ko") == "one 대 two: few-shot style: 다름; few-shot style: 다름"
    void = "B: first tokens cannot tell the answer words apart in its tokenizer"
    assert say_reasons([void], "ko") == "B: 그 토크나이저에서는 첫 토큰으로 답 후보를 구별할 수 없음"
