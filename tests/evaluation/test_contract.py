"""Contracts and conditions: they differ when, and only when, a part does."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from koat.evaluation.catalogue import load_task
from koat.evaluation.contract import (
    Parts,
    compare_contracts,
    describe_conditions,
    fingerprint_source,
    fingerprint_tokenizer,
    make_contract,
)
from koat.evaluation.harvest import Item, read_items
from koat.evaluation.task import Task
from koat.forest.score import make_padded
from koat.forest.verify import verify_layout

TASK = load_task("nsmc-prompt1")


@pytest.fixture
def items(reviews: dict[str, str]) -> list[Item]:
    return read_items(reviews["test"], TASK).items[:5]


def change(**values: Any) -> Task:
    return TASK.model_copy(update=values)


def test_equal_questions_have_equal_contracts(items: list[Item]) -> None:
    pinned = make_contract(TASK, items, "abc", "likelihood")
    assert list(pinned.parts) == ["items", "shots", "prompt", "labels", "normalisation", "scoring", "metric"]
    # Names and words for people are no part of what is asked.
    same = make_contract(change(name="other", title=load_task("nsmc-prompt2").title), list(items), "abc", "likelihood")
    assert compare_contracts(pinned, same) == []
    assert pinned.hash == same.hash
    assert len(pinned.hash) == 16
    again = json.loads(json.dumps(pinned.to_mapping()))
    assert compare_contracts(pinned, again) == []
    assert Parts(again["parts"]).hash == again["hash"]


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"num_shots": 9}, "shots"),
        ({"shot_seed": 1}, "shots"),
        ({"shot_rule": "fixed"}, "shots"),
        ({"shot_separator": "\n\n"}, "shots"),
        ({"shot_pool": load_task("nsmc-prompt1").shot_pool.model_copy(update={"max_tokens": 26})}, "shots"),
        ({"prompt": "문장: {text}\n감정은"}, "prompt"),
        ({"clean": {}}, "prompt"),
        ({"labels": {"0": " 나쁨", "1": " 좋음"}}, "labels"),
        ({"normalisation": "per-character"}, "normalisation"),
    ],
)
def test_a_change_of_one_part_is_named(items: list[Item], values: dict[str, Any], part: str) -> None:
    left = make_contract(TASK, items, "abc", "likelihood")
    right = make_contract(change(**values), items, "abc", "likelihood")
    assert compare_contracts(left, right) == [part]
    assert left.hash != right.hash


def test_items_source_and_scoring_are_parts(items: list[Item]) -> None:
    pinned = make_contract(TASK, items, "abc", "likelihood")
    flipped = replace(items[0], gold=1 - items[0].gold)
    reworded = replace(items[0], fields={"text": "?"})
    changed = [[first, *items[1:]] for first in (flipped, reworded, replace(items[0], id="0"))]
    for other in (items[::-1], items[:-1], *changed):
        assert compare_contracts(pinned, make_contract(TASK, other, "abc", "likelihood")) == ["items"]
    assert compare_contracts(pinned, make_contract(TASK, items, "abd", "likelihood")) == ["shots"]
    assert compare_contracts(pinned, make_contract(TASK, items, "abc", "first-token")) == ["scoring"]


def test_what_does_not_bear_on_the_score_is_left_out(items: list[Item]) -> None:
    bare = [make_contract(change(num_shots=0, shot_seed=seed), items, None, "likelihood") for seed in (1, 2)]
    assert compare_contracts(*bare) == []
    ways = (None, "per-token")
    first = [make_contract(change(normalisation=way), items, "abc", "first-token") for way in ways]
    assert compare_contracts(*first) == []


def test_the_shots_source_is_its_content_not_its_path(reviews: dict[str, str]) -> None:
    items = read_items(reviews["train"], TASK).items
    assert fingerprint_source(items) == fingerprint_source(read_items(reviews["train"], TASK).items)
    assert fingerprint_source(items) != fingerprint_source(items[:-1])
    # The pool is measured on the text as it stands in the file.
    raw = [replace(items[0], raw={"text": items[0].raw["text"] + "!"}), *items[1:]]
    assert fingerprint_source(items) != fingerprint_source(raw)


def test_conditions_name_what_differs(
    model: Any, make_model: Callable[..., Any], tokenizer: Any, byte_tokenizer: Any
) -> None:
    layout = verify_layout(model)[0]
    plain = describe_conditions(model, layout, tokenizer)
    assert list(plain.parts) == ["tokenizer", "template", "truncation", "precision", "layout", "koat"]
    assert (plain.parts["precision"], plain.parts["layout"]) == ("float32", "forest, walk")
    others = {
        "tokenizer": describe_conditions(model, layout, byte_tokenizer),
        "template": describe_conditions(model, layout, tokenizer, template="chat"),
        "truncation": describe_conditions(model, layout, tokenizer, truncation="1 items kept out"),
        "precision": describe_conditions(make_model("llama").to(torch.bfloat16), layout, tokenizer),
        "layout": describe_conditions(model, make_padded(), tokenizer),
    }
    for part, other in others.items():
        assert compare_contracts(plain, other) == [part]
        assert plain.hash != other.hash
    with torch.autocast("cpu", torch.bfloat16):
        cast = describe_conditions(model, layout, tokenizer)
    assert compare_contracts(plain, cast) == ["precision"]
    assert cast.parts["precision"] == "float32, autocast bfloat16"


def test_a_part_that_is_missing_differs() -> None:
    assert compare_contracts(Parts({"a": 1, "b": None}), Parts({"a": 1, "c": 2})) == ["b", "c"]


def test_a_tokenizers_fingerprint_survives_saving_and_padding(tmp_path: Any, tokenizer: Any) -> None:
    from transformers import AutoTokenizer

    before = fingerprint_tokenizer(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    again.pad_token = again.eos_token
    again(["가", "나다"], padding=True, truncation=True, max_length=1)
    assert fingerprint_tokenizer(again) == before
