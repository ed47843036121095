"""The short answer: who leads, whom that beats and from whom it cannot be told, in both languages."""

from __future__ import annotations

from typing import Any

from koat.report.answers import find_leader, say_answer

KEY = {"task": "reviews", "scoring": "likelihood"}


def make_row(name: str, value: float, *, meaningful: bool = True) -> dict[str, Any]:
    """Return a row of a column, five points of interval on each side."""
    return {"subject": name, "value": value, "low": value - 0.05, "high": value + 0.05, "meaningful": meaningful}


def make_pair(left: str, right: str, low: float, high: float, **more: Any) -> dict[str, Any]:
    """Return a comparison that found no difference, unless `more` says so."""
    return {
        **KEY, "contract": "c", "left": left, "right": right, "better": None, "unsure": None, "low": low, "high": high,
        "num_items": 500, "needed": 1462, **more,
    }  # fmt: skip


COLUMN = {
    **KEY, "contract": {"hash": "c"},
    "rows": [make_row("base", 0.5), make_row("LoRA", 0.7), make_row("IA3", 0.71), make_row("prompt", 0.6)],
}  # fmt: skip
FOUND = {
    "comparisons": [
        make_pair("base", "IA3", 0.16, 0.26, better="IA3"),
        make_pair("base", "LoRA", 0.15, 0.25, better="LoRA"),
        make_pair("LoRA", "IA3", -0.02, 0.04),
        make_pair("IA3", "prompt", -0.2, -0.011, unsure="IA3"),
        make_pair("base", "IA3", 0.3, 0.4, better="IA3") | {"task": "another"},
    ]
}


def test_the_leader_is_set_against_all_others() -> None:
    assert say_answer(FOUND, COLUMN) == {
        "en": "IA3 scores highest (71.0 %, 66.0–76.0): better than base by 16.0 to 26.0 points; looks better than "
        "prompt by 1.1 to 20.0 points, which may be chance among so many comparisons; with 500 items cannot be told "
        "apart from LoRA (about 1,500 would tell).",
        "ko": "가장 높은 점수는 IA3(71.0 %, 66.0–76.0): base보다 16.0~26.0점 높음; prompt보다 1.1~20.0점 높아 "
        "보이나, 비교가 많아 우연일 수 있음; 문항 500개로는 구별되지 않음: LoRA(약 1,500개 필요).",
    }


def test_likes_are_said_together() -> None:
    pairs = [make_pair("A", "B", -0.3, -0.2, better="A"), make_pair("A", "C", -0.4, -0.3, better="A")]
    column = {**COLUMN, "rows": [make_row("A", 0.9), make_row("B", 0.6), make_row("C", 0.5)]}
    said = say_answer({"comparisons": pairs}, column)["en"]
    assert said.endswith(": better than B by 20.0 to 30.0 points, C by 30.0 to 40.0 points.")


def test_one_alone_has_a_score() -> None:
    column = {**COLUMN, "rows": [make_row("A", 0.9)]}
    assert say_answer({"comparisons": []}, column)["en"] == "A scores 90.0 %, 85.0–95.0."


def test_what_is_not_meaningful_does_not_lead() -> None:
    rows = [make_row("A", 0.9, meaningful=False), make_row("B", 0.6)]
    assert find_leader({"rows": rows})["subject"] == "B"
    assert find_leader({"rows": rows[:1]})["subject"] == "A"
