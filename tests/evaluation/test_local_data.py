"""Local files as harness tasks: columns found or named as missing, answers taken apart, metrics worked by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from koat.core.errors import ConfigError, DataError
from koat.evaluation.harness.local_data import load_local, read_rows, unquote
from koat.evaluation.harness.local_tasks import (
    average_f1,
    load_mmlu,
    make_hellaswag,
    make_truthfulqa,
    score_truth,
    split_answers,
    tidy_wikihow,
)

pytest.importorskip("datasets", reason="datasets is not installed (extra `data`)")
COLUMNS = {"question": "Text", "answer": "Answer"}


def test_columns_fill_fields_and_first_rows_are_shots(tmp_path: Path) -> None:
    rows = ["ID\tText\tAnswer", '1\t"그는 ""네"" 했다"\tTRUE', "2\t둘\tFalse", "3\t셋\ttrue"]
    (tmp_path / "dev.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    splits = load_local(str(tmp_path), files={"validation": "dev.tsv"}, columns=COLUMNS, pool=1, pretrained="nano")
    assert splits["shots"][0] == {"question": '그는 "네" 했다', "answer": "TRUE"}
    assert splits["validation"]["question"] == ["둘", "셋"]


@pytest.mark.parametrize("name", ["dev.csv", "dev.jsonl"])
def test_quotation_marks_that_are_text_stay(tmp_path: Path, name: str) -> None:
    quoted = ['"네"', '"네" 또는 "아니오"', '그는 ""네"" 했다']
    if name == "dev.csv":
        cells = ['"' + text.replace('"', '""') + '"' for text in quoted]
        lines = ["Text,Answer", *(f"{cell},x" for cell in cells)]
    else:
        lines = [json.dumps({"Text": text, "Answer": "x"}, ensure_ascii=False) for text in quoted]
    (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    splits = load_local(str(tmp_path), files={"validation": name}, columns=COLUMNS)
    assert splits["validation"]["question"] == quoted


def test_a_table_without_header_gets_one(tmp_path: Path) -> None:
    for split in ("dev", "test"):
        folder = tmp_path / "mmlu" / split
        folder.mkdir(parents=True)
        (folder / f"art_{split}.csv").write_text('"What, then?",w,x,y,z,B\n', encoding="utf-8")
    found = load_mmlu(str(tmp_path), subject="art")
    assert found["test"][0] == {"question": "What, then?", "A": "w", "B": "x", "C": "y", "D": "z", "answer": "B"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"Texts": "x", "Answer": "y"}\n', r"a.jsonl:1: .*'Text'.*did you mean 'Texts'"),
        ("a.jsonl", '{"Text": "x", "Answer": "y"}\n[1]\n', r"a.jsonl:2: is no object"),
        ("a.jsonl", '{"Text": \n', r"a.jsonl:1: is not valid JSON"),
        ("a.tsv", "Text\tAnswer\nx\n", r"a.tsv:2: has 1 columns"),
        ("b.tsv", "Text\tAnswer\nx\ty\n", r"a.tsv: there is no such file"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    wanted = name.replace("b.", "a.")
    with pytest.raises(DataError, match=message):
        load_local(str(tmp_path), files={"test": wanted}, columns=COLUMNS)


def test_what_is_missing_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--data-dir"):
        load_local(files={"test": "a.tsv"}, columns=COLUMNS)
    (tmp_path / "a.tsv").write_text("Text\tAnswer\nx\ty\n", encoding="utf-8")
    with pytest.raises(DataError, match="the first 1 are shots"):
        load_local(str(tmp_path), files={"test": "a.tsv"}, columns=COLUMNS, pool=1)
    assert [row.value for row in read_rows(tmp_path / "a.tsv", None)] == [{"Text": "x", "Answer": "y"}]


def test_texts_are_put_right() -> None:
    assert unquote('"') == '"'
    assert unquote('"그는 ""네"" 했다"') == '그는 "네" 했다'
    assert tidy_wikihow(" How to cook [title] Wash it. [step] Rub ") == "How to cook. Wash it. Rub"
    row = {"activity": "Diving", "context": "A man jumps. he", "endings": ["falls.", "[header] flies."], "gold": "1"}
    assert make_hellaswag(row)["query"] == "Diving: A man jumps. he"
    assert make_hellaswag(row)["gold"] == 1


def test_truthfulqa_has_its_best_answer_first_and_true_ones_before_false_ones() -> None:
    assert split_answers("One; Two.;  ;Three") == ["One.", "Two.", "Three."]
    doc = make_truthfulqa({"question": "Q", "best": "B", "right": "A; B; C", "wrong": "X; Y"})
    assert doc == {
        "question": "Q", "mc1": ["B.", "X.", "Y."], "mc2": ["B.", "A.", "C.", "X.", "Y."], "num_true": 3
    }  # fmt: skip


def test_mc2_is_the_share_of_true_answers() -> None:
    results = [(math.log(value) - 900, False) for value in (0.1, 0.2, 0.05, 0.05)]
    assert score_truth({"num_true": 2}, results)["acc"] == pytest.approx(0.75)


def test_macro_f1_by_hand() -> None:
    # Class 0: 2 hits of 3 named and 2 asked, 4/5; class 1: 1 hit of 1 named and 2 asked, 2/3.
    assert average_f1([(0, 0), (0, 0), (1, 0), (1, 1)]) == pytest.approx((4 / 5 + 2 / 3) / 2)
    # A class that is only guessed counts, with nothing right.
    assert average_f1([(0, 0), (0, 2)]) == pytest.approx((2 / 3 + 0) / 2)
