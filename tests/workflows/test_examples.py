"""What is trained on and what is held out: by a file of parts, from a file of its own, and in whole contexts."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from koat.core.config import Layer, resolve
from koat.core.settings import DataSettings
from koat.data.records import Record
from koat.workflows.training.examples import divide_records


def write(path: Path, rows: list[dict[str, str]]) -> str:
    """Write rows as JSON lines and return where."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def divide(seed: int = 0, **values: Any) -> tuple[list[Record], list[Record]]:
    """Return (training, validation) records of data settings."""
    return divide_records(resolve(DataSettings, [Layer("flag", values)]).settings, seed, [])


def list_questions(records: list[Record]) -> list[str]:
    """Return what the records ask."""
    return [record.fields["instruction"] for record in records]


def write_contexts(path: Path, num_contexts: int) -> str:
    """Write contexts with 4 questions each, in turns."""
    contexts = [" ".join(f"{number}{letter}" for letter in "가나다라마바사") for number in range(num_contexts)]
    turns = [(turn, context) for turn in range(4) for context in contexts]
    return write(
        path, [{"context": context, "instruction": f"{turn}?", "output": str(turn)} for turn, context in turns]
    )


def count_contexts(records: list[Record]) -> list[int]:
    """Return how many records each context has, the fewest first."""
    return sorted(Counter(record.fields["context"] for record in records).values())


def test_a_file_of_parts_divides_the_rows_and_its_test_part_stands_nowhere(tmp_path: Path) -> None:
    titles = ["산", "강", "들", "강", "숲", "산", "숲", "숲", "강"]
    rows = [{"title": title, "instruction": f"q{n}", "output": "x"} for n, title in enumerate(titles)]
    parts = "title\tsplit\n산\ttrain\n들\ttrain\n강\tvalidation\n숲\ttest\n"
    (tmp_path / "parts.tsv").write_text(parts, encoding="utf-8")
    for more in ({}, {"validation_fraction": 0.5}, {"limit": 3}):
        train, validation = divide(
            train=[write(tmp_path / "rows.jsonl", rows)], splits=str(tmp_path / "parts.tsv"), **more
        )
        assert list_questions(train) == ["q0", "q2", "q5"]
        assert list_questions(validation) == ["q1", "q3", "q8"]
    # A limit makes training smaller, not what the file holds out.
    train, validation = divide(train=[str(tmp_path / "rows.jsonl")], splits=str(tmp_path / "parts.tsv"), limit=1)
    assert (len(train), list_questions(validation)) == (1, ["q1", "q3", "q8"])


def test_validation_rows_of_their_own_file_stay_whole(tmp_path: Path) -> None:
    rows = [{"instruction": f"q{n}", "output": "x"} for n in range(8)]
    own = [{"instruction": f"v{n}", "output": "x"} for n in range(5)]
    files = {"train": [write(tmp_path / "train.jsonl", rows)], "validation": [write(tmp_path / "own.jsonl", own)]}
    train, validation = divide(**files, validation_fraction=0.5)
    assert list_questions(train) == [f"q{n}" for n in range(8)]
    assert list_questions(validation) == ["v0", "v1", "v2", "v3", "v4"]
    train, validation = divide(**files, validation_fraction=0.5, limit=2)
    assert len(train) == 2 and set(list_questions(train)) < {f"q{n}" for n in range(8)}
    assert list_questions(validation) == ["v0", "v1", "v2", "v3", "v4"]
    assert len(divide(**files, limit=2, validation_limit=3)[1]) == 3


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_limit_draws_whole_contexts_and_what_is_held_out_shrinks_alike(tmp_path: Path, seed: int) -> None:
    """Of 16 contexts 4 are held out: 48 rows to train on and 16 to validate on, or half of each with a limit of 24."""
    file = write_contexts(tmp_path / "rows.jsonl", 16)
    train, validation = divide(seed, train=[file], validation_fraction=0.25)
    assert (count_contexts(train), count_contexts(validation)) == ([4] * 12, [4] * 4)
    few, held = divide(seed, train=[file], validation_fraction=0.25, limit=24)
    assert (count_contexts(few), count_contexts(held)) == ([4] * 6, [4] * 2)
    assert [each for each in train if each in few] == few and all(each in validation for each in held)
    # Ten rows are two contexts and half of a third; 16 * 10 / 48 rows are held out, in one context.
    few, held = divide(seed, train=[file], validation_fraction=0.25, limit=10)
    assert (count_contexts(few), count_contexts(held)) == ([2, 4, 4], [3])
    few, held = divide(seed, train=[file], validation_fraction=0.25, limit=10, validation_limit=16)
    assert (len(few), len(held)) == (10, 16)
    assert divide(seed, train=[file], validation_fraction=0.25, limit=10) == divide(
        seed, train=[file], validation_fraction=0.25, limit=10
    )


def test_the_seed_draws_what_a_limit_leaves(tmp_path: Path) -> None:
    file = write_contexts(tmp_path / "rows.jsonl", 16)
    drawn = {
        tuple(sorted({each.fields["context"] for each in divide(seed, train=[file], limit=8)[0]})) for seed in range(5)
    }
    assert len(drawn) > 1
