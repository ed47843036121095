"""Prompts byte for byte, tokens at the border, long items, and labels that no first token tells apart."""

from __future__ import annotations

from typing import Any

import pytest

from koat.core.errors import DataError
from koat.evaluation.catalogue import load_task
from koat.evaluation.harvest import Item, read_items
from koat.evaluation.protocol import build_requests, check_labels, encode_requests, render_context
from koat.evaluation.task import Task

FIRST, SECOND = load_task("nsmc-prompt1"), load_task("nsmc-prompt2")


def make_item(name: str, text: str, gold: int) -> Item:
    return Item(name, {"text": text}, {"text": text}, gold)


SHOTS = [make_item("a", "또 보고 싶다", 1), make_item("b", "시간이 아깝다", 0)]
ITEM = make_item("c", "감동 그 자체", 1)


def test_prompt_1_is_the_published_one_byte_for_byte() -> None:
    expected = "문장: 또 보고 싶다\n감정: 긍정\n문장: 시간이 아깝다\n감정: 부정\n문장: 감동 그 자체\n감정:"
    assert render_context(FIRST, ITEM, SHOTS).encode() == expected.encode()
    assert render_context(FIRST, ITEM, []) == "문장: 감동 그 자체\n감정:"


def test_prompt_2_is_the_published_one_byte_for_byte() -> None:
    expected = (
        "다음 문장은 긍정일까요 부정일까요?\n또 보고 싶다\n정답: 긍정\n"
        "다음 문장은 긍정일까요 부정일까요?\n시간이 아깝다\n정답: 부정\n"
        "다음 문장은 긍정일까요 부정일까요?\n감동 그 자체\n정답:"
    )
    assert render_context(SECOND, ITEM, SHOTS).encode() == expected.encode()


def test_braces_in_a_review_are_text() -> None:
    assert render_context(FIRST, make_item("d", "{text} {label} {}", 0), []) == "문장: {text} {label} {}\n감정:"


@pytest.mark.parametrize("task", [FIRST, SECOND])
def test_a_request_is_the_whole_text_tokenised_at_once(task: Task, tokenizer: Any, opening_tokenizer: Any) -> None:
    for made in (tokenizer, opening_tokenizer):
        (request,) = build_requests(task, [ITEM], [SHOTS], made).requests
        context = render_context(task, ITEM, SHOTS)
        assert list(request.context_ids) == made(context).input_ids
        whole = [made(context + word).input_ids for word in (" 부정", " 긍정")]
        assert [[*request.context_ids, *choice] for choice in request.choices] == whole
        assert request.context_ids.count(made.bos_token_id) == (made is opening_tokenizer)
        assert (request.item_id, request.gold, request.shot_ids) == ("c", 1, ("a", "b"))


def test_a_choice_that_would_melt_into_the_prompt_is_tokenised_by_itself(tokenizer: Any) -> None:
    # The vocabulary joins the two halves, but the prompt's own tokens must not change for it.
    joined = tokenizer.decode([max(tokenizer.get_vocab().values(), key=lambda i: len(tokenizer.decode([i])))])
    half = len(joined) // 2
    choice = joined[half:] + " 긍정 부정 긍정"
    task = FIRST.model_copy(update={"prompt": "{text}" + joined[:half], "labels": {"0": choice, "1": " 긍정"}})
    (request,) = encode_requests(task, [make_item("e", "가", 0)], [[]], tokenizer)
    assert list(request.context_ids) == tokenizer("가" + joined[:half]).input_ids
    whole, length = tokenizer("가" + joined[:half] + choice).input_ids, len(request.context_ids)
    assert len(whole) > length
    assert whole[:length] != list(request.context_ids)
    assert list(request.choices[0]) == tokenizer(choice).input_ids


def test_many_items_are_tokenised_as_one_would_be(reviews: dict[str, str], tokenizer: Any) -> None:
    items = read_items(reviews["test"], FIRST).items
    together = list(encode_requests(FIRST, items, [SHOTS] * len(items), tokenizer))
    assert together == [next(encode_requests(FIRST, [item], [SHOTS], tokenizer)) for item in items]


def test_each_item_of_a_later_block_has_its_own_shots(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("koat.evaluation.protocol.BLOCK", 7)
    items = [make_item(f"q{number}", f"영화 {number}", number % 2) for number in range(16)]
    shots = [[make_item(f"s{number}", f"예시 {number}", number // 2 % 2)] for number in range(16)]
    requests = list(encode_requests(FIRST, items, shots, tokenizer))
    assert [(each.item_id, each.shot_ids) for each in requests] == [(f"q{n}", (f"s{n}",)) for n in range(16)]
    for number, request in enumerate(requests):
        word = ("부정", "긍정")[number // 2 % 2]
        text = f"문장: 예시 {number}\n감정: {word}\n문장: 영화 {number}\n감정:"
        assert list(request.context_ids) == tokenizer(text).input_ids


def test_long_items_are_kept_out_and_listed(tokenizer: Any) -> None:
    long = make_item("long", "아주 " * 200, 0)
    length = 2 + len(tokenizer(render_context(FIRST, ITEM, SHOTS)).input_ids)
    found = build_requests(FIRST, [long, ITEM], [SHOTS, SHOTS], tokenizer, length)
    assert [request.item_id for request in found.requests] == ["c"]
    (entry,) = found.kept_out
    expected = len(tokenizer(render_context(FIRST, long, SHOTS) + " 긍정").input_ids)
    assert (entry.item_id, entry.num_tokens, entry.context_length) == ("long", expected, length)
    assert found.truncation == "1 items kept out"
    assert not found.dropped_shots
    with pytest.raises(DataError, match=r"none of the 1 items.*fits.*drop_shots"):
        build_requests(FIRST, [long], [SHOTS], tokenizer, length)


def test_the_longest_request_that_fits_is_asked(tokenizer: Any) -> None:
    length = len(tokenizer(render_context(FIRST, ITEM, SHOTS) + " 긍정").input_ids)
    assert not build_requests(FIRST, [ITEM, ITEM], [SHOTS, []], tokenizer, length).kept_out
    assert build_requests(FIRST, [ITEM, ITEM], [SHOTS, []], tokenizer, length - 1).kept_out[0].num_tokens == length


def test_whole_shots_are_dropped_from_the_front_where_the_task_has_it(tokenizer: Any) -> None:
    task = FIRST.model_copy(update={"overflow": "drop_shots"})
    short = len(tokenizer(render_context(FIRST, ITEM, SHOTS[1:]) + " 긍정").input_ids)
    found = build_requests(task, [ITEM, ITEM], [SHOTS, SHOTS[1:]], tokenizer, short)
    first, second = found.requests
    assert first == second
    assert first.shot_ids == ("b",)
    assert found.dropped_shots == {"c": 1}
    assert found.truncation == "1 shots dropped from 1 items"
    hopeless = build_requests(task, [make_item("x", "아주 " * 200, 0), ITEM], [SHOTS, SHOTS], tokenizer, short)
    assert [entry.item_id for entry in hopeless.kept_out] == ["x"]


def test_labels_that_are_one_token_each_can_be_told_apart(tokenizer: Any, opening_tokenizer: Any) -> None:
    for made in (tokenizer, opening_tokenizer):
        found = check_labels(FIRST, build_requests(FIRST, [ITEM], [SHOTS], made).requests, made)
        assert found.meaningful
        assert not found.notes


def test_labels_that_begin_alike_make_the_first_token_mean_nothing(byte_tokenizer: Any) -> None:
    found = check_labels(FIRST, build_requests(FIRST, [ITEM], [SHOTS], byte_tokenizer).requests, byte_tokenizer)
    assert not found.meaningful
    assert "부정, 긍정 begin with the same token" in found.notes[0]
    assert "more than one token" in found.notes[1]


def test_a_label_of_several_tokens_is_named(tokenizer: Any) -> None:
    task = FIRST.model_copy(update={"labels": {"0": " 부정", "1": " 훌륭합니다"}})
    (note,) = check_labels(task, build_requests(task, [ITEM], [SHOTS], tokenizer).requests, tokenizer).notes
    assert "훌륭합니다 takes more than one token" in note
    assert "부정" not in note
