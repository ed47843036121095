"""What a comparison found, as a sentence for practitioners, in English and Korean."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import ceil, floor, log10
from typing import Any

from koat.evaluation.differences import MEANINGLESS, PHRASES, UNSAID
from koat.evaluation.metrics import FEW
from koat.report.words import Language

MILLION = 1_000_000
TEMPLATES: dict[Language, dict[str, str]] = {
    "en": {
        "better": "{first} is better than {second} by {low} to {high} points (95 %, {test}, {p}).",
        "unsure": "{first} looks better than {second} by {low} to {high} points (95 %, {test}, {p_alone}), but as one "
        "of {num_comparisons} comparisons that may be chance ({p}){needed}",
        "open": "{first} and {second} cannot be told apart with {items} items ({low} to {high} points, 95 %, {test}, "
        "{p}){needed}",
        "needed": ": about {number} would be needed.",
        "needed_texts": ": about {number} would be needed, on as many more texts.",
        "many": ": more than a million would be needed.",
        "more": ": more would be needed.",
        "seeds": ": the seeds spread too far for any number of items to tell; more seeds would be needed.",
        "none": ": they score the same.",
        "smallest": "{items} items would have shown a difference of {points} points (power 0.8).",
        "few": "{items} items are too few to show any difference.",
        "blind": "{items} items could have shown no difference at all: the two hardly disagree.",
        "conditions": "They were asked under different conditions: {parts}.",
        "refused": "{left} and {right} are not ranked on {task}: {reasons}.",
    },
    "ko": {
        "better": "{first}의 점수가 {second}보다 {low}~{high}점 높습니다(95 %, {test}, {p}).",
        "unsure": "{first}의 점수가 {second}보다 {low}~{high}점 높아 보이지만(95 %, {test}, {p_alone}), "
        "비교 {num_comparisons}개 가운데 하나이므로 우연일 수 있습니다({p}). {needed}",
        "open": "{first}의 점수와 {second}의 점수는 문항 {items}개로는 구별되지 않습니다({low}~{high}점, "
        "95 %, {test}, {p}). {needed}",
        "needed": "구별하려면 문항이 약 {number}개 필요합니다.",
        "needed_texts": "구별하려면 지문도 그만큼 늘려 문항이 약 {number}개 필요합니다.",
        "many": "구별하려면 문항이 백만 개 넘게 필요합니다.",
        "more": "구별하려면 문항이 더 필요합니다.",
        "seeds": "시드에 따른 차이가 커서 문항을 늘려도 구별되지 않습니다. 시드가 더 필요합니다.",
        "none": "점수가 같습니다.",
        "smallest": "문항 {items}개로는 {points}점 이상의 차이를 볼 수 있었습니다(검정력 0.8).",
        "few": "문항 {items}개는 어떤 차이를 보이기에도 너무 적습니다.",
        "blind": "문항 {items}개로는 어떤 차이도 볼 수 없었습니다. 두 대상의 답이 거의 같습니다.",
        "conditions": "서로 다른 조건에서 물었습니다: {parts}.",
        "refused": "{task}에서는 {left}, {right}의 순위를 매기지 않습니다. 이유: {reasons}.",
    },
}
TESTS_KO = {
    "exact McNemar": "정확 맥니마 검정",
    "paired bootstrap": "대응 부트스트랩",
    "paired t test": "대응표본 t 검정",
    "paired bootstrap over texts": "지문 단위 대응 부트스트랩",
    "paired t test over texts": "지문 단위 대응표본 t 검정",
    "t test over seeds and items": "시드와 문항을 함께 본 t 검정",
    "t test over seeds and texts": "시드와 지문을 함께 본 t 검정",
    "chi-square, unpaired": "비대응 카이제곱 검정",
    "Fisher's exact test, unpaired": "비대응 피셔 정확 검정",
}
PHRASES_KO = {
    "items": "문항이 다름",
    "shots": "예시가 다름",
    "prompt": "프롬프트가 다름",
    "labels": "답 후보가 다름",
    "normalisation": "정규화가 다름",
    "scoring": "답을 읽는 방식이 다름",
    "metric": "지표가 다름",
    "tokenizer": "토크나이저가 다름",
    "template": "프롬프트를 둘러싼 템플릿이 다름",
    "truncation": "자르는 방식이 다름",
    "precision": "정밀도가 다름",
    "layout": "배치 구성이 다름",
    "koat": "koat의 버전이 다름",
}
"""What `koat.evaluation.differences` says of each part that differs."""
SEEDS = re.compile(r" \((\d+) seeds\)$")
LEFT_OUT = re.compile(r"(.+), was left out: (.+)")
PROBLEMS_KO = {
    r"its predictions are not beside it .*": "곁에 예측이 없습니다(지워졌거나 다른 평가의 것으로 바뀌었습니다).",
    r"it is over (\S+) items, and (\S+) predictions are beside it\.": r"문항은 \1개인데 예측은 \2개입니다.",
    r"it is no share between 0 and 1; only shares are compared\.": "0과 1 사이의 비율이 아닙니다. 비율만 비교합니다.",
    r"it is (\S+), but the mean of its predictions is (\S+)\.": r"점수는 \1인데 예측의 평균은 \2입니다.",
}
"""Why `koat.workflows.comparing.scored` left a score out."""


def say_comparison(comparison: Mapping[str, Any], num_comparisons: int, language: Language = "en") -> str:
    """Return what one comparison found: which is better and by how much, or how many items would tell."""
    words = TEMPLATES[language]
    claimed = comparison["better"] or comparison["unsure"]
    turned = claimed == comparison["left"]
    first, second = (comparison[side] for side in (("left", "right") if turned or not claimed else ("right", "left")))
    low, high = comparison["low"], comparison["high"]
    if turned:
        low, high = -high, -low
    first, second = name_subject(first, language), name_subject(second, language)
    kind = "better" if comparison["better"] else "unsure" if claimed else "open"
    corrected = format_p(comparison["p_holm"])
    return words[kind].format(
        first=first, second=second, low=format_points(low), high=format_points(high),
        test=TESTS_KO.get(comparison["test"], comparison["test"]) if language == "ko" else comparison["test"],
        p=f"Holm {corrected}" if num_comparisons > 1 else corrected, p_alone=format_p(comparison["p"]),
        items=f"{comparison['num_items']:,}", num_comparisons=num_comparisons,
        needed=say_needed(comparison["needed"], comparison, language),
    )  # fmt: skip


def name_subject(name: str, language: Language = "en") -> str:
    """Return a subject's name, with the number of its seeds in a language."""
    return SEEDS.sub(r"(시드 \1개)", name) if language == "ko" else name


def say_note(note: str, language: Language = "en") -> str:
    """Return a note about a score that was left out in a language; any other note stays as it was written."""
    found = LEFT_OUT.fullmatch(note)
    if language == "en" or not found:
        return note
    problem = found[2]
    for english, korean in PROBLEMS_KO.items():
        problem = re.sub(rf"^{english}$", korean, problem)
    return f"{found[1]}: 비교에서 뺐습니다. {problem}"


def say_needed(needed: int | None, comparison: Mapping[str, Any], language: Language = "en") -> str:
    """Return how many items would be needed, in two digits, or that seeds are wanting, as the end of a sentence."""
    words = TEMPLATES[language]
    if needed is None:
        return words["seeds" if comparison["value"] else "none"]
    if needed > MILLION:
        return words["many"]
    if needed <= comparison["num_items"]:
        return words["more"]
    kind = "needed_texts" if comparison["test"].endswith("texts") else "needed"
    return words[kind].format(number=f"{round_up(needed):,}")


def say_smallest(comparison: Mapping[str, Any], language: Language = "en") -> str:
    """Return the smallest difference that the items could have shown."""
    words, items = TEMPLATES[language], f"{comparison['num_items']:,}"
    if comparison["smallest"] is None:
        return words["few" if comparison["num_items"] < FEW else "blind"].format(items=items)
    return words["smallest"].format(items=items, points=format_points(comparison["smallest"]))


def say_conditions(comparison: Mapping[str, Any], language: Language = "en") -> str:
    """Return how the conditions of the two differ, empty where they do not."""
    parts = say_reasons(comparison["conditions"].values(), language)
    return TEMPLATES[language]["conditions"].format(parts=parts) if parts else ""


def say_refusal(refusal: Mapping[str, Any], language: Language = "en") -> str:
    """Return why two scores are not ranked."""
    reasons = say_reasons(refusal["reasons"], language)
    names = {side: name_subject(refusal[side], language) for side in ("left", "right")}
    return TEMPLATES[language]["refused"].format(**{**refusal, **names, "reasons": reasons})


def say_reasons(reasons: Iterable[str], language: Language = "en") -> str:
    """Return in what two contracts, or two sets of conditions, differ."""
    joined = "; ".join(reasons)
    if language == "en":
        return joined
    for part, phrase in PHRASES.items():
        joined = re.sub(rf"\b{phrase}\b", PHRASES_KO[part], joined)
    joined = re.sub(r"\banother ([\w-]+(?: [\w-]+)*)(?=;|: one|$)", r"\1: 다름", joined)
    joined = joined.replace(UNSAID, "한쪽은 밝히지 않음").replace(" against ", " 대 ")
    joined = joined.replace(MEANINGLESS, "그 토크나이저에서는 첫 토큰으로 답 후보를 구별할 수 없음")
    return re.sub(r"(\w+) of them in common", lambda found: f"공통 {found[1].replace('none', '0')}개", joined)


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
