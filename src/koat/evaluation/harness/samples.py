"""The samples of an lm-evaluation-harness task: which metrics have a value per item, and what was answered."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isclose, isfinite
from numbers import Real
from typing import Any

from lm_eval.utils import handle_non_serializable

Sample = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Samples:
    """A task of the harness and what it logged, by filter: one row per item, items in order."""

    task: Any
    by_filter: dict[str, list[Sample]]

    @property
    def items(self) -> list[Sample]:
        """One row per item."""
        return next(iter(self.by_filter.values()))

    @property
    def is_choice(self) -> bool:
        """Whether an answer is the likeliest of an item's choices, one of which is right."""
        return self.task.OUTPUT_TYPE == "multiple_choice" and not self.task.get_config("process_results")

    def list_scorings(self) -> dict[str, tuple[str, str]]:
        """Return (metric, filter) by the name of each way of scoring: `acc`, or `exact_match,strict-match`."""
        pairs = [(metric, name) for name, rows in self.by_filter.items() for row in rows for metric in row["metrics"]]
        return {metric if name == "none" else f"{metric},{name}": (metric, name) for metric, name in pairs}


def sort_samples(task: Any, rows: Sequence[Sample]) -> Samples:
    """Sort what the harness logged by filter."""
    by_filter: dict[str, list[Sample]] = {}
    for row in rows:
        by_filter.setdefault(row["filter"], []).append(row)
    return Samples(task, by_filter)


@dataclass(frozen=True, slots=True)
class Metrics:
    """Metrics whose score is the mean of a value per item, those over all items together, and why."""

    by_item: dict[str, list[float]]
    overall: dict[str, float]
    notes: list[str]


def sort_metrics(samples: Samples, results: Mapping[str, Any]) -> Metrics:
    """Tell metrics that are a mean over items from others; `results` are the harness' own figures of the task."""
    found = Metrics({}, {}, [])
    better = samples.task.higher_is_better()
    for scoring, (metric, name) in samples.list_scorings().items():
        score = results.get(f"{metric},{name}")
        if not isinstance(score, Real) or not isfinite(score):
            found.notes.append(f"{scoring} is no number and was left out.")
            continue
        values = _list_values([row.get(metric) for row in samples.by_filter[name]])
        if values and isclose(sum(values) / len(values), score, abs_tol=1e-9) and better.get(metric, True):
            found.by_item[scoring] = values
        else:
            found.overall[scoring] = float(score)
            why = "is lower for better answers" if values else "is over all items together"
            found.notes.append(f"{scoring} {why}: it stands without interval, and `koat compare` leaves it out.")
    return found


def _list_values(found: Sequence[Any]) -> list[float]:
    """Return values as numbers, nothing when one is missing or none."""
    return [float(value) for value in found] if all(isinstance(value, Real) for value in found) else []


def predict_samples(samples: Samples, by_item: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Return the record of each item's prediction: its row of the data set, gold, what was answered, scores."""
    scorings = {name: pair for name, pair in samples.list_scorings().items() if name in by_item}
    rows = []
    for place, sample in enumerate(samples.items):
        answered = {name: samples.by_filter[filtered][place] for name, (_, filtered) in scorings.items()}
        rows.append(
            {
                "id": str(sample["doc_id"]),
                "text": json.loads(json.dumps(sample["doc"], default=handle_non_serializable, ensure_ascii=False)),
                **_describe_gold(samples, sample),
                "predicted": {name: _read_answer(samples, row, scorings[name][0]) for name, row in answered.items()},
                "correct": {name: by_item[name][place] for name in scorings},
                **_describe_answer(samples, sample),
            }
        )
    return rows


def _list_choices(samples: Samples, sample: Sample) -> list[str]:
    if samples.task.OUTPUT_TYPE != "multiple_choice":
        return []
    return [str(choice) for choice in samples.task.doc_to_choice(sample["doc"])]


def _describe_gold(samples: Samples, sample: Sample) -> dict[str, Any]:
    """Return the right answer as text; where there are several, the first, and all of them."""
    # Where choices are beginnings of one ending, the target is that ending and the text is the right number.
    multiple = getattr(samples.task, "multiple_input", 0)
    target = samples.task.doc_to_text(sample["doc"]) if multiple else sample["target"]
    choices = _list_choices(samples, sample)
    several = target if isinstance(target, list) else [target]
    golds = [choices[each] if isinstance(each, int) and each < len(choices) else str(each) for each in several]
    return {"gold": golds[0] if golds else "", **({"golds": golds} if len(golds) > 1 else {})}


def _describe_answer(samples: Samples, sample: Sample) -> dict[str, Any]:
    """Return what was written, or each choice's log-probability where choices can be told apart by their text."""
    if samples.task.OUTPUT_TYPE == "generate_until":
        return {"generated": str(sample["resps"][0][0])}
    choices = _list_choices(samples, sample)
    if not samples.is_choice or len(set(choices)) < len(choices) or isinstance(sample["target"], list):
        return {}
    return {"logprobs": dict(zip(choices, _list_logprobs(sample), strict=False))}


def _list_logprobs(sample: Sample) -> list[float]:
    return [float(logprob) for logprob, _ in sample["filtered_resps"]]


def _read_answer(samples: Samples, sample: Sample, metric: str) -> str | None:
    """Return what counted as the answer under a metric: a choice, or a text; None for a mere probability."""
    if metric == "acc_mutual_info":
        return None
    if samples.is_choice:
        choices = _list_choices(samples, sample)
        logprobs = _list_logprobs(sample)[: len(choices)]
        lengths = {"acc_norm": list(map(len, choices)), "acc_bytes": [len(choice.encode()) for choice in choices]}
        divisors = lengths.get(metric, [1] * len(choices))
        ranked = [value / max(1, by) for value, by in zip(logprobs, divisors, strict=True)]
        return choices[ranked.index(max(ranked))]
    answer = sample["filtered_resps"][0]
    return answer if isinstance(answer, str) else None
