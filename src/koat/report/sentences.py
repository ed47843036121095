"""What a comparison found, as a sentence for practitioners, in English and Korean."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, floor, log10
from typing import Any, Literal

Language = Literal["en", "ko"]
MILLION = 1_000_000
TEMPLATES: dict[Language, dict[str, str]] = {
    "en": {
        "better": "{first} is better than {second} by {low} to {high} points (95 %, {test}, {p}).",
        "unsure": "{first} looks better than {second} by {low} to {high} points (95 %, {test}, {p_alone}), but as one "
        "of {num_comparisons} comparisons that may be chance ({p}){needed}",
        "open": "{first} and {second} cannot be told apart with {items} items ({low} to {high} points, 95 %, {test}, "
        "{p}){needed}",
        "needed": ": about {number} would be needed.",
        "many": ": more than a million would be needed.",
        "more": ": more would be needed.",
        "none": ": they score the same.",
        "smallest": "{items} items would have shown a difference of {points} points (power 0.8).",
        "blind": "{items} items could have shown no difference at all: the two hardly disagree.",
        "conditions": "They were asked under different conditions: {parts}.",
        "refused": "{left} and {right} are not ranked on {task}: {reasons}.",
    },
    "ko": {
        "better": "{first}: {second}보다 {low}~{high}점 높음 (95 %, {test}, {p}).",
        "unsure": "{first}: {second}보다 {low}~{high}점 높아 보이나 (95 %, {test}, {p_alone}), "
        "비교 {num_comparisons}개 가운데 하나로는 우연일 수 있음 ({p}){needed}",
        "open": "{first} / {second}: 문항 {items}개로는 구별되지 않음 ({low}~{high}점, 95 %, {test}, {p}){needed}",
        "needed": ": 약 {number}개가 필요함.",
        "many": ": 백만 개 넘게 필요함.",
        "more": ": 더 많이 필요함.",
        "none": ": 점수가 같음.",
        "smallest": "문항 {items}개로는 {points}점 이상의 차이를 볼 수 있음 (검정력 0.8).",
        "blind": "문항 {items}개로는 어떤 차이도 볼 수 없음: 두 답이 거의 같음.",
        "conditions": "서로 다른 조건에서 물음: {parts}.",
        "refused": "{left} / {right}: {task}의 순위를 매기지 않음. {reasons}.",
    },
}
TESTS_KO = {
    "exact McNemar": "정확 맥니마 검정",
    "paired bootstrap": "짝지은 부트스트랩",
    "t test over seeds and items": "시드와 문항에 걸친 t 검정",
    "chi-square, unpaired": "카이제곱 검정, 짝짓지 않음",
    "Fisher's exact test, unpaired": "피셔의 정확 검정, 짝짓지 않음",
}


def say_comparison(comparison: Mapping[str, Any], num_comparisons: int, language: Language = "en") -> str:
    """Return what one comparison found: which is better and by how much, or how many items would tell."""
    words = TEMPLATES[language]
    claimed = comparison["better"] or comparison["unsure"]
    turned = claimed == comparison["left"]
    first, second = (comparison[side] for side in (("left", "right") if turned or not claimed else ("right", "left")))
    low, high = comparison["low"], comparison["high"]
    if turned:
        low, high = -high, -low
    kind = "better" if comparison["better"] else "unsure" if claimed else "open"
    needed = comparison["needed_corrected" if claimed else "needed"]
    corrected = format_p(comparison["p_holm"])
    return words[kind].format(
        first=first, second=second, low=format_points(low), high=format_points(high),
        test=TESTS_KO.get(comparison["test"], comparison["test"]) if language == "ko" else comparison["test"],
        p=f"Holm {corrected}" if num_comparisons > 1 else corrected, p_alone=format_p(comparison["p"]),
        items=f"{comparison['num_items']:,}", num_comparisons=num_comparisons,
        needed=say_needed(needed, comparison["num_items"], language),
    )  # fmt: skip


def say_needed(needed: int | None, num_items: int, language: Language = "en") -> str:
    """Return how many items would be needed, in two digits, with the colon before it."""
    words = TEMPLATES[language]
    if needed is None:
        return words["none"]
    if needed > MILLION:
        return words["many"]
    if needed <= num_items:
        return words["more"]
    return words["needed"].format(number=f"{round_up(needed):,}")


def say_smallest(comparison: Mapping[str, Any], language: Language = "en") -> str:
    """Return the smallest difference that the items could have shown."""
    words, items = TEMPLATES[language], f"{comparison['num_items']:,}"
    if comparison["smallest"] is None:
        return words["blind"].format(items=items)
    return words["smallest"].format(items=items, points=format_points(comparison["smallest"]))


def say_conditions(comparison: Mapping[str, Any], language: Language = "en") -> str:
    """Return how the conditions of the two differ, empty where they do not."""
    parts = "; ".join(comparison["conditions"].values())
    return TEMPLATES[language]["conditions"].format(parts=parts) if parts else ""


def say_refusal(refusal: Mapping[str, Any], language: Language = "en") -> str:
    """Return why two scores are not ranked."""
    reasons = "; ".join(refusal["reasons"])
    return TEMPLATES[language]["refused"].format(**{**refusal, "reasons": reasons})


def format_points(share: float) -> str:
    """Return a share in points of percent, with a digit more where one would show nothing."""
    points = 100 * share
    return f"{points:.1f}" if abs(points) >= 0.05 or abs(points) < 0.005 else f"{points:.2f}"


def format_p(p: float) -> str:
    """Return a p-value as people write it."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def round_up(number: int) -> int:
    """Round a number up to two digits."""
    unit: int = 10 ** max(0, floor(log10(number)) - 1)
    return ceil(number / unit) * unit
