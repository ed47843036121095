"""Questions on a text: what is asked, what a model writes, what counts, and what does not fit."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from koat.core.errors import ConfigError, DataError
from koat.data.prompts import KOAT
from koat.data.templates import TextTemplate
from koat.evaluation.answer_task import AnswerTask, adjust_answers
from koat.evaluation.answering import (
    build_prompts,
    evaluate_answers,
    make_answer_contract,
    name_template,
    note_shared_texts,
    predict_answer,
    read_questions,
)
from koat.evaluation.answers import score_answer
from koat.evaluation.catalogue import load_task
from koat.evaluation.continuations import read_text
from koat.evaluation.contract import hash_value
from koat.evaluation.metrics import score_values
from koat.forest.verify import verify_layout
from tests.evaluation.conftest import VOCABULARY

TASK = AnswerTask(name="own-qa", max_new_tokens=6)
ARTICLES = {
    "영화": ("최고의 영화 ㅋㅋ 감동 그 자체", [("영화는?", ["최고", "최고의 영화"]), ("감동은?", ["그 자체"])]),
    "결말": ("최악의 결말 1점. " * 4, [("결말은?", ["최악"]), ("몇 점?", ["1점"])]),
}


@pytest.fixture
def questions(tmp_path: Path) -> str:
    """A file of two articles with two questions each, in KorQuAD's format."""
    data = [
        {
            "title": title,
            "paragraphs": [
                {
                    "context": context,
                    "qas": [
                        {"id": f"{title}-{number}", "question": asked, "answers": [{"text": text} for text in golds]}
                        for number, (asked, golds) in enumerate(listed)
                    ],
                }
            ],
        }
        for title, (context, listed) in ARTICLES.items()
    ]
    (tmp_path / "qa.json").write_text(json.dumps({"data": data}, ensure_ascii=False), encoding="utf-8")
    return str(tmp_path / "qa.json")


def write_singly(model: Any, tokenizer: Any, prompt: str, num_new: int) -> str:
    """The oracle: one plain pass per token."""
    ids = tokenizer(prompt).input_ids
    start = len(ids)
    for _ in range(num_new):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True))


def test_answers_are_greedy_and_every_prediction_is_kept(
    model: Any, tokenizer: Any, questions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, _ = verify_layout(model)
    shown: list[tuple[int, int]] = []
    result = evaluate_answers(
        model, layout, tokenizer, TASK, questions, token_budget=300, on_progress=lambda *pair: shown.append(pair)
    )
    assert [row["id"] for row in result.predictions] == ["영화-0", "영화-1", "결말-0", "결말-1"]
    for row, (title, asked, golds) in zip(
        result.predictions, [(t, *pair) for t, (_, listed) in ARTICLES.items() for pair in listed], strict=True
    ):
        prompt = f"### 맥락: {ARTICLES[title][0]}\n\n### 질문: {asked}\n\n### 답변:"
        text = write_singly(model, tokenizer, prompt, 6).split("\n")[0].strip()
        assert row["text"] == {"title": title, "question": asked}
        assert (row["gold"], row["golds"]) == (golds[0], golds)
        assert row["predicted"] == {"exact_match": text, "f1": text}
        assert row["correct"] == score_answer(text, golds)
    mean = sum(row["correct"]["f1"] for row in result.predictions) / 4
    assert result.scores["f1"].value == pytest.approx(mean)
    assert result.scores["f1"].low <= mean <= result.scores["f1"].high
    assert shown[-1] == (4, 4)
    assert result.conditions.parts["template"] == "koalpaca-context"
    assert json.loads(json.dumps(result.to_mapping(), allow_nan=False))["num_items"] == 4


def test_the_run_s_template_is_a_condition_and_the_metric_part_of_the_contract(
    model: Any, tokenizer: Any, questions: str
) -> None:
    layout, _ = verify_layout(model)
    found = [evaluate_answers(model, layout, tokenizer, TASK, questions, template=each) for each in (None, KOAT)]
    assert found[0].contracts == found[1].contracts
    assert [each.conditions.parts["template"] for each in found] == ["koalpaca-context", "koat"]
    parts = found[0].contracts["exact_match"].parts
    assert [part for part in parts if parts[part] != found[0].contracts["f1"].parts[part]] == ["metric"]
    longer = evaluate_answers(model, layout, tokenizer, TASK.model_copy(update={"max_new_tokens": 7}), questions)
    assert longer.contracts["f1"].hash != found[0].contracts["f1"].hash
    own = TextTemplate("koat", ("{context} {question}",))
    assert name_template(own).startswith("koat (")


def test_a_question_that_does_not_fit_is_kept_out_and_told(
    make_model: Callable[..., Any], tokenizer: Any, questions: str, caplog: pytest.LogCaptureFixture
) -> None:
    asked = build_prompts(TASK, read_questions(TASK, questions), KOAT, tokenizer, None)
    lengths = [len(ids) for ids in asked.prompts]
    room = sorted(lengths)[1] + TASK.max_new_tokens
    short = make_model("llama", vocab_size=VOCABULARY, max_position_embeddings=room)
    layout, _ = verify_layout(short)
    result = evaluate_answers(short, layout, tokenizer, TASK, questions, template=KOAT)
    assert [entry.num_tokens for entry in result.kept_out] == [n + 6 for n in lengths if n + 6 > room]
    assert result.num_items == 2
    assert result.conditions.parts["truncation"] == "2 items kept out"
    assert "2 items do not fit" in result.notes[0]
    assert result.notes[0] in caplog.text
    with pytest.raises(DataError, match="none of the 4 questions"):
        build_prompts(TASK, read_questions(TASK, questions), KOAT, tokenizer, 10)


def test_an_answer_ends_at_the_first_stop(tokenizer: Any) -> None:
    for text, expected in [(" 긍정\n부정", "긍정"), ("영화 감정 긍정\n", "영화"), ("\n긍정", ""), (" 긍정", "긍정")]:
        assert read_text(tokenizer(text).input_ids, ["\n", "감정"], tokenizer) == expected


def test_a_draw_is_smaller_and_repeats(model: Any, tokenizer: Any, questions: str) -> None:
    layout, _ = verify_layout(model)
    drawn = [
        evaluate_answers(model, layout, tokenizer, adjust_answers(TASK, 2), questions).predictions for _ in range(2)
    ]
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 2
    many = evaluate_answers(model, layout, tokenizer, adjust_answers(TASK, 9), questions)
    assert "9 items were asked for" in many.notes[0]
    with pytest.raises(ConfigError, match="items"):
        adjust_answers(TASK, 0)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"instruction": "가", "output": "나"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="context"):
        read_questions(TASK, str(tmp_path / "rows.jsonl"))


def test_questions_stand_in_tables_and_rows_as_well(tmp_path: Path, questions: str) -> None:
    """The same questions from CSV, from JSON lines and from SQuAD's format are one contract but for their ids."""
    expected = [replace(each, answers=each.answers[:1], id="") for each in read_questions(TASK, questions)]
    rows = [
        {"context": fields["context"], "question": fields["question"], "answer": each.answers[0]}
        for each in expected
        if (fields := each.record.fields)
    ]
    with (tmp_path / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["context", "question", "answer"])
        writer.writeheader()
        writer.writerows(rows)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
    own = TASK.model_copy(update={"columns": {"instruction": "question", "output": "answer"}})
    for found in (read_questions(TASK, str(tmp_path / "rows.csv")), read_questions(own, str(tmp_path / "rows.jsonl"))):
        assert [each.id for each in found] == [str(number) for number in range(1, len(rows) + 1)]
        plain = [replace(each, id="") for each in found]
        contracts = {make_answer_contract(TASK, each, "f1").hash for each in (plain, expected)}
        assert len(contracts) == 1
        assert all(KOAT.render_prompt(each.record) for each in found)
        assert {predict_answer(each, "가")["text"]["title"] for each in found} == {""}
    plain = TextTemplate("plain", ("{context}\n{question}",), " {answer}")
    assert plain.render_prompt(read_questions(TASK, str(tmp_path / "rows.csv"))[0].record).endswith("\n영화는?")
    (tmp_path / "own.csv").write_text("context,instruction,output\n가 나,무엇?,가\n", encoding="utf-8")
    (found_one,) = read_questions(TASK, str(tmp_path / "own.csv"))
    assert (found_one.record.fields["instruction"], found_one.answers) == ("무엇?", ("가",))
    (tmp_path / "holes.csv").write_text("context,question,answer\n가 나,무엇?,가\n,무엇?,나\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"holes\.csv:3: context missing or empty"):
        read_questions(TASK, str(tmp_path / "holes.csv"))
    with pytest.raises(DataError, match="which is not there; the file has: context, question, answer"):
        read_questions(TASK.model_copy(update={"columns": {"output": "reply"}}), str(tmp_path / "rows.csv"))


def test_questions_without_a_text_are_asked_where_a_task_names_its_columns_so(
    tmp_path: Path, model: Any, tokenizer: Any
) -> None:
    (tmp_path / "rows.csv").write_text("q,a\n무엇?,가\n어디?,나\n무엇?,가\n", encoding="utf-8")
    task = TASK.model_copy(update={"columns": {"instruction": "q", "output": "a"}, "template": "koalpaca"})
    layout, _ = verify_layout(model)
    result = evaluate_answers(model, layout, tokenizer, task, str(tmp_path / "rows.csv"))
    assert [row["context"] for row in result.predictions] == [None] * 3
    assert result.notes == [] and result.scores["f1"].num_items == 3
    (tmp_path / "holes.csv").write_text("t,q,a\n가 나,무엇?,가\n,무엇?,나\n", encoding="utf-8")
    on_texts = task.model_copy(update={"columns": {**task.columns, "context": "t"}})
    with pytest.raises(DataError, match=r"holes\.csv:3: context missing or empty"):
        read_questions(on_texts, str(tmp_path / "holes.csv"))


def test_questions_on_one_text_are_no_independent_draws(model: Any, tokenizer: Any, questions: str) -> None:
    layout, _ = verify_layout(model)
    result = evaluate_answers(model, layout, tokenizer, TASK, questions)
    (note,) = result.notes
    assert note.startswith("4 questions on 2 texts") and "each text as one draw" in note
    asked = read_questions(TASK, questions)
    assert note_shared_texts(asked[::2]) == []
    assert "not for other texts" in note_shared_texts(asked[:2])[0]
    assert [row["context"] for row in result.predictions] == [
        hash_value(each.record.fields["context"]) for each in asked
    ]
    for name, score in result.scores.items():
        assert (score.low, score.high) != (0.0, 0.0)
        values, texts = ([row[part] for row in result.predictions] for part in ("correct", "context"))
        assert score == score_values(name, [each[name] for each in values], texts)


def test_the_task_that_ships_asks_korquad() -> None:
    task = load_task("context-qa")
    assert isinstance(task, AnswerTask)
    assert (task.template, task.until, task.items) == ("koalpaca-context", ["\n"], "all")
