"""Folders of scores and predictions as `koat eval` leaves them, written without a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from koat.core.config_files import dump_yaml
from koat.evaluation.contract import Parts
from koat.evaluation.metrics import score_accuracy

CONDITIONS = {"tokenizer": "0123456789abcdef", "template": "none", "truncation": "none", "precision": "float32"}


def make_contract(ids: Sequence[str], scoring: str, **parts: Any) -> Parts:
    """Return a contract; `parts` override."""
    whole = {
        "items": {"num": len(ids), "fingerprint": Parts({"ids": list(ids)}).hash},
        "shots": {"num": 0}, "prompt": {"source": "Q: {text}\nA:", "clean": {}}, "labels": {"0": " no", "1": " yes"},
        "normalisation": "none", "scoring": scoring, "metric": "accuracy",
    }  # fmt: skip
    return Parts({**whole, **parts})


def write_scores(
    folder: Path,
    answers: Mapping[str, bool | float],
    *,
    subject: str = "",
    task: str = "reviews",
    scoring: str = "likelihood",
    contract: Mapping[str, Any] | None = None,
    conditions: Mapping[str, Any] | None = None,
) -> Path:
    """Write scores and predictions of one task into a folder, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    pinned = make_contract(list(answers), scoring, **(contract or {}))
    right = list(answers.values())
    score = score_accuracy([bool(value) for value in right]).to_mapping()
    score |= {"name": pinned.parts["metric"], "value": sum(right) / len(right)}
    result = {
        "task": task, "num_shots": 0, "shot_seed": 1, "scores": {scoring: score}, "num_items": len(right),
        "contracts": {scoring: pinned.to_mapping()}, "notes": [], "seconds": 1.0,
        "conditions": Parts({**CONDITIONS, **(conditions or {})}).to_mapping(),
    }  # fmt: skip
    report = {"subject": subject or folder.name, "results": [result]}
    (folder / f"{task}.scores.json").write_text(json.dumps(report), encoding="utf-8")
    rows = [make_row(name, value, scoring, pinned.hash) for name, value in answers.items()]
    (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def make_row(name: str, value: bool | float, scoring: str, contract: str) -> dict[str, Any]:
    """Return one prediction; the gold label is always `yes`, given with a probability of 0.8 when right."""
    sure, other = (-0.2231435513, -1.6094379124)
    return {
        "id": name, "gold": "yes", "predicted": {scoring: "yes" if value else "no"}, "correct": {scoring: value},
        "logprobs": {"no": other if value else sure, "yes": sure if value else other},
        "num_tokens": {"no": 1, "yes": 1}, "contracts": {scoring: contract},
    }  # fmt: skip


def write_run(
    folder: Path, answers: Mapping[str, bool | float], *, seed: int = 0, rate: float = 0.01, **more: Any
) -> Path:
    """Write a run folder with its settings and predictions."""
    write_scores(folder / "predictions", answers, subject=folder.name, **more)
    config = {"model": {"base": "nano"}, "training": {"learning_rate": rate, "seed": seed}}
    (folder / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
    return folder


def make_answers(num_items: int, wrong: Sequence[int]) -> dict[str, bool]:
    """Return answers to items `0`, `1`, ... of which those in `wrong` are wrong."""
    return {str(number): number not in set(wrong) for number in range(num_items)}
