"""Items and shots: the draws of pandas and of Python's random, and files with something wrong."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable
from typing import Any

import pandas
import pytest

from koat.core.errors import DataError
from koat.evaluation.catalogue import load_task
from koat.evaluation.harvest import draw_shots, pick_pool, read_items, sample_items
from koat.evaluation.task import adjust_task

TASK = load_task("nsmc-prompt1")
Write = Callable[..., str]


def test_items_are_read_cleaned_and_kept_raw(write: Write) -> None:
    path = write([("7", '"별점 10/10" ㅎㅎ 최고!', "1"), ("9", "a♥", "0")])
    first, second = read_items(path, TASK).items
    assert (first.id, first.fields, first.gold) == ("7", {"text": "별점  ㅎㅎ 최고"}, 1)
    assert first.raw == {"text": '"별점 10/10" ㅎㅎ 최고!'}
    # A text of which cleaning leaves nothing is asked all the same, as the protocol has it.
    assert (second.fields, second.gold) == ({"text": ""}, 0)


def test_rows_with_empty_text_are_dropped_and_counted(write: Write) -> None:
    found = read_items(write([("1", "좋다", "1"), ("2", "", "0"), ("3", " ", "0")]), TASK)
    assert [item.id for item in found.items] == ["1", "3"]
    assert found.num_empty == 1


def test_the_items_are_those_of_pandas(write: Write) -> None:
    rows = [(str(10_000 + 3 * number), f"영화 {number}" if number % 50 else "", "1") for number in range(1200)]
    path = write(rows)
    frame = pandas.read_csv(path, sep="\t", quoting=csv.QUOTE_NONE).dropna()
    items = read_items(path, TASK).items
    for count in (1, 20, 500):
        expected = frame.sample(count, random_state=1234)["id"].astype(str).tolist()
        assert [item.id for item in sample_items(items, adjust_task(TASK, limit=count))] == expected
    for everything in ("all", len(items), 5000):
        assert sample_items(items, adjust_task(TASK, limit=everything)) == items


def test_the_shots_are_those_of_random_sample(reviews: dict[str, str], tokenizer: Any) -> None:
    items = read_items(reviews["train"], TASK).items
    pool = pick_pool(items, TASK, tokenizer)
    frame = pandas.read_csv(reviews["train"], sep="\t", quoting=csv.QUOTE_NONE)
    short = frame[[len(tokenizer(text).input_ids) <= 25 for text in frame["document"]]]
    assert 10 < len(short) < len(frame)
    random.seed(1234)
    expected = [random.sample(short["id"].astype(str).tolist(), 10) for _ in range(30)]
    assert [[shot.id for shot in shots] for shots in draw_shots(pool, TASK, 30)] == expected
    fixed = draw_shots(pool, TASK.model_copy(update={"shot_rule": "fixed"}), 30)
    assert [[shot.id for shot in shots] for shots in fixed] == expected[:1] * 30
    other = draw_shots(pool, adjust_task(TASK, seed=1), 30)
    assert [[shot.id for shot in shots] for shots in other] != expected


def test_drawing_leaves_the_global_generators_alone(reviews: dict[str, str], tokenizer: Any) -> None:
    items = read_items(reviews["train"], TASK).items
    random.seed(5)
    before = random.getstate()
    draw_shots(items, TASK, 3)
    sample_items(items, adjust_task(TASK, limit=3))
    assert random.getstate() == before


def test_the_pool_measures_special_tokens_and_uncleaned_text(
    reviews: dict[str, str], tokenizer: Any, opening_tokenizer: Any
) -> None:
    items = read_items(reviews["train"], TASK).items
    for made in (tokenizer, opening_tokenizer):
        expected = [item.id for item in items if len(made(item.raw["text"]).input_ids) <= 25]
        assert [item.id for item in pick_pool(items, TASK, made)] == expected


def test_a_pool_that_is_too_small_says_what_to_do(write: Write, tokenizer: Any) -> None:
    items = read_items(write([("1", "좋다", "1"), ("2", "나쁘다", "0")]), TASK).items
    with pytest.raises(DataError, match=r"draws 10 shots.*only 2 rows of at most 25 tokens.*--shots"):
        draw_shots(pick_pool(items, TASK, tokenizer), TASK, 4)


def test_an_unknown_label_is_named_with_file_and_line(write: Write) -> None:
    with pytest.raises(DataError, match=r"rows\.tsv:3: the label is '2'.*'0', '1'"):
        read_items(write([("1", "좋다", "1"), ("2", "그저", "2")]), TASK)


def test_a_missing_column_is_answered_with_the_nearest(tmp_path: Any) -> None:
    (tmp_path / "odd.tsv").write_text("id\tdocumnt\tlabel\n1\t좋다\t1\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"'document'.*did you mean 'documnt'"):
        read_items(str(tmp_path / "odd.tsv"), TASK)
    (tmp_path / "odd.jsonl").write_text('{"document": "a", "label": 1}\n{"document": "b"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"odd\.jsonl:2.*'label'"):
        read_items(str(tmp_path / "odd.jsonl"), TASK)


def test_ids_that_cannot_tell_rows_apart_give_way_to_row_numbers(write: Write, tmp_path: Any) -> None:
    assert [item.id for item in read_items(write([("1", "가", "1"), ("1", "나", "0")]), TASK).items] == [
        "1",
        "2",
    ]
    (tmp_path / "bare.csv").write_text("document,label\n가,1\n나,0\n", encoding="utf-8")
    assert [item.id for item in read_items(str(tmp_path / "bare.csv"), TASK).items] == ["1", "2"]


def test_numbers_in_json_are_labels_too(tmp_path: Any) -> None:
    (tmp_path / "rows.jsonl").write_text('{"document": "좋다", "label": 1}\n', encoding="utf-8")
    assert read_items(str(tmp_path / "rows.jsonl"), TASK).items[0].gold == 1
