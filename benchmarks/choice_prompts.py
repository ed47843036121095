"""HellaSwag and MMLU as lm-evaluation-harness asks them: contexts and continuations, from the raw files."""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from typing import Any

from benchmarks.workload import Absent, Options, find_file
from koat.evaluation.harness.local_tasks import tidy_wikihow

LETTERS = ("A", "B", "C", "D")
SUBJECTS = ("anatomy", "philosophy")


@dataclass(frozen=True)
class Question:
    """One item: its context with all shots, and the continuations to score behind it."""

    context: str
    continuations: tuple[str, ...]
    gold: int


def join_context(context: str) -> str:
    """Capitalise the unfinished sentence at a context's end, as the harness does with the field `ctx_b`."""
    head, mark, tail = context.rpartition(". ")
    return f"{head}{mark}{tail[:1].upper()}{tail[1:]}" if tail and not tail.endswith(".") else context


def read_hellaswag(options: Options, num_items: int, num_shots: int) -> list[Question]:
    """Return items with `num_shots` other items, drawn anew for each, before them."""
    path = find_file(options, "benchmarks", "hellaswag", "hellaswag_val.jsonl.gz")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    rng = random.Random(options.seed)
    chosen = rng.sample(range(len(rows)), num_items)
    return [_ask_hellaswag(rows, at, rng, num_shots) for at in chosen]


def _ask_hellaswag(rows: ListLike[dict[str, Any]], at: int, rng: random.Random, num_shots: int) -> Question:
    def query(row: dict[str, Any]) -> str:
        return tidy_wikihow(f"{row['activity_label']}: {join_context(row['ctx'])}")

    others = [index for index in rng.sample(range(len(rows)), num_shots + 1) if index != at][:num_shots]
    solved = [f"{query(rows[i])} {tidy_wikihow(rows[i]['endings'][int(rows[i]['label'])])}\n\n" for i in others]
    endings = tuple(f" {tidy_wikihow(ending)}" for ending in rows[at]["endings"])
    return Question("".join(solved) + query(rows[at]), endings, int(rows[at]["label"]))


def read_mmlu(options: Options, num_items: int, num_shots: int) -> list[Question]:
    """Return items of `SUBJECTS`, equally many, each behind its subject's first `num_shots` development items."""
    questions: list[Question] = []
    for subject in SUBJECTS:
        shots = _read_csv(_find_subject(options, "dev", subject))[:num_shots]
        items = _read_csv(_find_subject(options, "test", subject))
        title = subject.replace("_", " ")
        opening = f"The following are multiple choice questions (with answers) about {title}.\n\n"
        opening += "".join(f"{_ask_mmlu(row)} {row[5]}\n\n" for row in shots)
        chosen = random.Random(options.seed).sample(items, num_items // len(SUBJECTS))
        answers = tuple(f" {letter}" for letter in LETTERS)
        questions += [Question(opening + _ask_mmlu(row), answers, LETTERS.index(row[5])) for row in chosen]
    return questions


def _find_subject(options: Options, part: str, subject: str) -> str:
    folder = options.data / "benchmarks" / "mmlu" / part
    found = sorted(folder.glob(f"{subject}*.csv"))
    if not found:
        raise Absent(f"MMLU's subject {subject} is not in {folder}")
    return str(found[0])


def _read_csv(path: str) -> list[list[str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return [row for row in csv.reader(file) if len(row) == 6]


def _ask_mmlu(row: ListLike[str]) -> str:
    choices = "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, row[1:5], strict=True))
    return f"{row[0].strip()}{choices}\nAnswer:"
