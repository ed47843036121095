"""The real data beside the repository: every file read and encoded as users would; skipped where it is absent."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from koat.core.errors import DataError
from koat.core.settings import TemplateSettings
from koat.data.encode import encode_records
from koat.data.prompts import resolve_template
from koat.data.readers import read_records
from koat.data.splits import split_by_title


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("instructions_ko/chatbot_songys.jsonl", 11_750),
        ("instructions_ko/kobest_train_instructions.jsonl", 15_590),
        ("instructions_en/seed_tasks_alpaca.json", 175),
        ("instructions_en/user_oriented_252_alpaca.json", 252),
    ],
)
def test_real_instructions(shared: Path, name: str, count: int) -> None:
    found = read_records(str(shared / name))
    assert (found.format, len(found.records), found.bad_rows) == ("alpaca", count, [])
    assert all(record.fields["instruction"].strip() and record.fields["output"].strip() for record in found.records)


def test_real_seed_tasks_are_refused_with_their_keys(shared: Path) -> None:
    with pytest.raises(DataError, match="keys: id, name, instruction, instances, is_classification"):
        read_records(str(shared / "instructions_en/seed_tasks.jsonl"))


def test_real_korquad_and_its_split(shared: Path) -> None:
    found = read_records(str(shared / "qa/KorQuAD_v1.0_dev.json"))
    assert (found.format, len(found.records), found.warnings) == ("squad", 5_774, [])
    assert len({record.fields["title"] for record in found.records}) == 140
    assert len({record.group for record in found.records}) == len({r.fields["context"] for r in found.records})
    sizes = {
        part: len(split_by_title(found.records, shared / "qa/korquad_article_split.tsv", part))
        for part in ("train", "validation", "test")
    }
    assert sizes == {"train": 3_984, "validation": 587, "test": 1_203}


def test_real_nsmc(shared: Path) -> None:
    path = shared / "nsmc/train.tsv"
    found = read_records(str(path), values={"label": {"0": "부정", "1": "긍정"}})
    assert Counter(record.fields["label"] for record in found.records) == {"부정": 30_000, "긍정": 30_000}
    # Read again by hand: nothing between the tabs may be touched.
    lines = path.read_text(encoding="utf-8").split("\n")[1:60_001]
    assert [record.fields["document"] for record in found.records] == [line.split("\t")[1] for line in lines]


def test_real_csv(shared: Path) -> None:
    found = read_records(str(shared / "benchmarks/truthfulqa/TruthfulQA.csv"))
    assert (found.format, len(found.records)) == ("table", 817)
    assert found.records[0].fields["Question"] == "What happens to you if you eat watermelon seeds?"


def test_real_nsmc_in_time(shared: Path, plain: Any) -> None:
    file = read_records(str(shared / "nsmc/train.tsv"), values={"label": {"0": "부정", "1": "긍정"}})
    template = TemplateSettings(prompt="{document}\n\n정답:", response=" {label}")
    found = encode_records(file.records, resolve_template(template), plain)
    assert len(found.sequences) == 60_000
    words = {(*plain.encode(f" {word}"), plain.eos_token_id) for word in ("부정", "긍정")}
    assert {sequence.token_ids[sequence.supervised.index(True) :] for sequence in found.sequences} == words
    for record, sequence in list(zip(file.records, found.sequences, strict=True))[::3_000]:
        expected = f"{record.fields['document']}\n\n정답: {record.fields['label']}<|endoftext|>"
        assert plain.decode(sequence.token_ids, clean_up_tokenization_spaces=False) == expected


def test_real_korquad_shortened(shared: Path, plain: Any) -> None:
    records = read_records(str(shared / "qa/KorQuAD_v1.0_dev.json")).records[:600]
    templates = resolve_template("koalpaca-context")
    found = encode_records(records, templates, plain, max_length=900, overflow="truncate_context")
    whole = encode_records(records, templates, plain).sequences
    assert found.report.num_truncated == sum(len(sequence) > 900 for sequence in whole) > 100
    assert max(map(len, found.sequences)) <= 900
    lost = 0
    for record, sequence in zip(records, found.sequences, strict=True):
        start = sequence.supervised.index(True)
        context = plain.decode(sequence.token_ids[:start]).split("\n\n### 질문: ")[0]
        lost += record.fields["output"] not in context
    assert found.report.num_cut_away_answers == lost > 0
