"""Looking at data: counts, lengths, sharing and broken rows are those of the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from koat.core.config import Layer, resolve
from koat.core.settings import DataSettings, ModelSettings
from koat.workflows.inspect_data import Inspection, inspect_files
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
    assert found.lengths is not None
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
    assert found.lengths is not None
    assert (found.lengths.num_duplicates, found.lengths.num_conflicts) == (1, 3)


def test_the_command_prints_it(place: Path) -> None:
    status, out, error = call_koat(
        "data", "inspect", place / "rows.jsonl", "--base", place / "base", "--template", "koat"
    )
    assert status == 0, error
    assert "30 rows" in out
    assert "in steps of 16 sequences" in out and "one forest of all" in out
    assert "정답:«" in out


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
