"""What the local tasks of `lm_tasks` need beyond their files: texts put right, answers taken apart, metrics."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from koat.evaluation.calibration import to_probabilities
from koat.evaluation.harness.local_data import Row, load_local

_MARKS = re.compile(r"\[[^\]]*\]")


def load_hellaswag(data_dir: str | None = None, **options: Any) -> dict[str, Any]:
    """Load HellaSwag. Its file holds the context whole, so the second half does not begin with a capital."""
    return load_local(data_dir, make=make_hellaswag, **options)


def make_hellaswag(row: Row) -> Row:
    """Return a row with its query and choices as texts without WikiHow's marks."""
    query = tidy_wikihow(f"{row['activity']}: {row['context']}")
    return {"query": query, "choices": [tidy_wikihow(ending) for ending in row["endings"]], "gold": int(row["gold"])}


def tidy_wikihow(text: str) -> str:
    """Turn a title mark into a full stop and take every other mark in brackets away."""
    return _MARKS.sub("", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def load_mmlu(data_dir: str | None = None, *, subject: str, **options: Any) -> dict[str, Any]:
    """Load one subject of MMLU, `dev` and `test`."""
    names = ["question", "A", "B", "C", "D", "answer"]
    files = {split: f"mmlu/{split}/{subject}_{split}.csv" for split in ("dev", "test")}
    columns = {name: name for name in names}
    return load_local(data_dir, files=files, columns=columns, header=names, **options)


def load_truthfulqa(data_dir: str | None = None, **options: Any) -> dict[str, Any]:
    """Load TruthfulQA's questions; its file has lists of answers, not the choices of the multiple-choice sets."""
    return load_local(data_dir, make=make_truthfulqa, **options)


def make_truthfulqa(row: Row) -> Row:
    """Return a row with the choices of mc1 (the best answer first) and mc2 (true ones first, `num_true` of them)."""
    best, right, wrong = split_answers(row["best"]), split_answers(row["right"]), split_answers(row["wrong"])
    true = list(dict.fromkeys(best + right))
    return {"question": row["question"], "mc1": best + wrong, "mc2": true + wrong, "num_true": len(true)}


def split_answers(text: str) -> list[str]:
    """Return the answers of a list with semicolons, each closed by a full stop."""
    answers = [answer.strip() for answer in text.split(";") if answer.strip()]
    return [answer if answer.endswith(".") else f"{answer}." for answer in answers]


def score_truth(doc: Row, results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Return mc2: the share of probability that falls on true answers."""
    shares = to_probabilities([logprob for logprob, _ in results])
    return {"acc": sum(shares[: int(doc["num_true"])])}


def average_f1(items: Sequence[tuple[Any, Any]]) -> float:
    """Return macro F1 over the classes that (gold, predicted) pairs hold, which KoBEST reports."""
    classes = {label for pair in items for label in pair}
    scores: list[float] = []
    for label in classes:
        hits = sum(gold == guess == label for gold, guess in items)
        named = sum((gold, guess).count(label) for gold, guess in items)
        scores.append(2 * hits / named)
    return sum(scores) / len(scores)
