"""Looking at data: counts, lengths, sharing and broken rows are those of the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import koat
from koat.core.config import Layer, resolve
from koat.core.settings import DataSettings, ModelSettings, TrainingSettings
from koat.data.readers import read_records
from koat.workflows.inspect_data import Inspection, inspect_files
from koat.workflows.training.examples import divide_records, hold_out
from tests.tiny_base import call_koat, need_shared


def inspect(place: Path, file: Path | str, **values: Any) -> Inspection:
    """Inspect one file with the tiny base's tokenizer."""
    settings = resolve(DataSettings, [Layer("flag", {"train": [str(file)], **values})]).settings
    (found,) = inspect_files([str(file)], settings, ModelSettings(base=str(place / "base")))
    return found


def test_counts_are_those_of_the_tokenizer(place: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    rows = [json.loads(line) for line in (place / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    pairs = [(f"### 질문: {row['instruction']}\n\n### 답변:", f" {row['output']}") for row in rows]
    bodies = [tuple(tokenizer(prompt).input_ids + tokenizer(answer).input_ids + [0]) for prompt, answer in pairs]
    found = inspect(place, place / "rows.jsonl")
    assert found.report.num_rows == found.report.num_sequences == len(rows)
    assert found.report.num_tokens == sum(map(len, bodies))
    assert found.report.longest == max(map(len, bodies))
    # A forest of everything computes each distinct prefix once: the nodes of the trie.
    assert found.lengths.num_forest_tokens == len({body[:end] for body in bodies for end in range(1, len(body) + 1)})
    assert found.sample == f"{pairs[0][0]}«{pairs[0][1]}<eos>»"


def test_duplicates_and_broken_rows_are_counted(place: Path, tmp_path: Path) -> None:
    good = {"instruction": "비가", "output": "옵니다"}
    lines = [json.dumps(good), json.dumps(good), json.dumps({**good, "output": "집니다"}), '{"instruction": "x"}', "{"]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = inspect(place, tmp_path / "rows.jsonl")
    assert len(found.file.records) == 3
    assert len(found.file.bad_rows) == 2
    assert ":4" in found.file.bad_rows[0]
    assert (found.lengths.num_duplicates, found.lengths.num_conflicts) == (1, 3)


def test_the_command_prints_it(place: Path) -> None:
    status, out, error = call_koat(
        "data", "inspect", place / "rows.jsonl", "--base", place / "base", "--template", "koat"
    )
    assert status == 0, error
    assert "30 rows" in out
    assert "in steps of 16 sequences" in out and "one forest of all" in out
    assert "정답:«" in out


@pytest.mark.parametrize("prefix", ["", "data."])
def test_settings_of_data_go_by_both_their_names(prefix: str, place: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("question,reply\n비가 오나요?,네\n눈은요?,아니요\n", encoding="utf-8")
    columns = f"{prefix}columns={{instruction: question, output: reply}}"
    status, out, error = call_koat("data", "inspect", tmp_path / "rows.csv", "--base", place / "base", "--set", columns)
    assert status == 0, error
    assert "2 rows" in out


@pytest.mark.parametrize(
    ("file", "rows", "kind"),
    [
        ("instructions_ko/chatbot_songys.jsonl", 11_750, "alpaca"),
        ("instructions_en/seed_tasks_alpaca.json", 175, "alpaca"),
    ],
)
def test_real_files(file: str, rows: int, kind: str) -> None:
    path = need_shared("data", file)
    status, out, error = call_koat("data", "inspect", path)
    assert status == 0, error
    assert f"{rows:,} rows, format {kind}" in out


def write_questions(path: Path) -> Path:
    """Write 12 contexts with 4 questions each, in turns."""
    contexts = [" ".join(f"{number}{letter}" for letter in "가나다라마바사") for number in range(12)]
    rows = [
        {"context": context, "question": f"{turn}?", "answer": str(turn)} for turn in range(4) for context in contexts
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_factor_is_the_one_that_training_has(place: Path, tmp_path: Path) -> None:
    file = write_questions(tmp_path / "qa.jsonl")
    columns = {"instruction": "question", "output": "answer"}
    for sampler, low, high in (("grouped", 2.3, 2.6), ("shuffled", 1.0, 1.5)):
        training = {"sampler": sampler, "batch_size": 8}
        steps = resolve(TrainingSettings, [Layer("flag", training)]).settings
        values = {"columns": columns, "template": "koalpaca-context"}
        settings = resolve(DataSettings, [Layer("flag", {"train": [str(file)], **values})]).settings
        (found,) = inspect_files([str(file)], settings, ModelSettings(base=str(place / "base")), steps)
        assert low < found.lengths.step_saving < high
        run = koat.finetune(
            {"model": {"base": str(place / "base")}, "data": {"train": [str(file)], **values}, "training": training},
            out=tmp_path / sampler,
        )
        result = run.read_manifest()["result"]
        assert result["tokens"] == found.lengths.num_tokens
        # What is last in a sequence predicts nothing and is not computed: four answers' ends in each group.
        assert found.lengths.num_step_tokens - 48 <= result["unique_tokens"] <= found.lengths.num_step_tokens


@pytest.mark.parametrize(("num_contexts", "num_rows"), [(3, 900), (1, 40)])
def test_a_context_of_many_rows_is_no_article(tmp_path: Path, num_contexts: int, num_rows: int) -> None:
    """A category or an instruction in every row must neither be kept in order nor make a split impossible."""
    rows = [
        {"context": f"갈래 {number % num_contexts}", "question": f"{number}?", "answer": "x"}
        for number in range(num_rows)
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
    columns = {"instruction": "question", "output": "answer"}
    records = read_records(str(tmp_path / "rows.jsonl"), columns=columns).records
    assert {record.group for record in records} == {""}
    train, held_out = hold_out(records, 0.05, 0)
    assert (len(train), len(held_out)) == (num_rows * 95 // 100, num_rows * 5 // 100)


def test_no_context_stands_on_both_sides(tmp_path: Path) -> None:
    file = write_questions(tmp_path / "qa.jsonl")
    values = {"columns": {"instruction": "question", "output": "answer"}, "validation_fraction": 0.25}
    settings = resolve(DataSettings, [Layer("flag", {"train": [str(file)], **values})]).settings
    train, held_out = divide_records(settings, 0, [])
    assert (len(train), len(held_out)) == (36, 12)
    assert not {record.fields["context"] for record in train} & {record.fields["context"] for record in held_out}


def test_what_is_lost_is_said_by_training_and_inspect_alike(place: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "비가"}, {"role": "assistant", "content": "옵니다", "reasoning": "음"}]
    rows = [{"messages": turns, "system": "짧게"}, {"messages": turns}]
    table = "instruction\toutput\n비가\t옵니다\n\t집니다\n"
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "rows.tsv").write_text(table, encoding="utf-8")
    base = ("--base", place / "base")
    for name, words in (
        (
            "chat.jsonl",
            ["2 messages hold what no template renders, under the keys: reasoning", "1 rows have a system message"],
        ),
        ("rows.tsv", ["1 rows have nothing in their prompt"]),
    ):
        status, inspected, error = call_koat("data", "inspect", tmp_path / name, *base)
        assert status == 0, error
        given = ["--data", tmp_path / name, "training.max_steps=1", "--out", tmp_path / f"run-{name}"]
        status, trained, error = call_koat("finetune", *base, *given)
        assert status == 0, error
        for word in words:
            assert word in inspected
            assert word in trained


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, []),
        ({"max_length": 200}, ["all sequences fit into max_length=200."]),
        (
            {"max_length": 75},
            ["8 sequences are longer than max_length=75: with overflow=error training refuses them."],
        ),
        ({"max_length": 75, "overflow": "drop"}, ["with max_length=75 and overflow=drop:", "8 left out: longer than"]),
        (
            {"max_length": 75, "overflow": "truncate_context"},
            ["overflow=truncate_context:", "8 kept with a shortened"],
        ),
        ({"max_length": 5, "overflow": "drop"}, ["overflow=drop: no sequence is left"]),
    ],
)
def test_a_limit_is_tried(place: Path, tmp_path: Path, values: dict[str, Any], expected: list[str]) -> None:
    file = write_questions(tmp_path / "qa.jsonl")
    columns = {"instruction": "question", "output": "answer"}
    found = inspect(place, file, columns=columns, template="koalpaca-context", **values)
    assert found.report.num_sequences == 48
    assert len(found.limit) >= len(expected)
    for words in expected:
        assert any(words in line for line in found.limit), found.limit


def test_only_what_is_supervised_stands_between_brackets(place: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}" + (
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "base")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "base" / name).symlink_to(place / "base" / name)
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "가나다라", strict=True)]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    assert inspect(tmp_path, tmp_path / "chat.jsonl", template="chat").sample == "u:가;a:«나;»u:다;a:«라;<eos>»"
