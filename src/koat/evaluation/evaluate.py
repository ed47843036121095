"""Put a choice task to a model: items and shots in, scores with intervals and every prediction out."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from koat.core.errors import ConfigError
from koat.evaluation.contract import Parts, describe_conditions, fingerprint_source, make_contract
from koat.evaluation.harvest import Harvest, Item, draw_shots, pick_pool, read_items, sample_items
from koat.evaluation.metrics import Score, score_accuracy
from koat.evaluation.protocol import (
    ChoiceRequest,
    LabelCheck,
    RequestSet,
    build_requests,
    check_labels,
)
from koat.evaluation.result import TaskResult, note_kept_out
from koat.evaluation.room import find_room
from koat.evaluation.scorer import ItemScore, Progress, ScoredRequests, score_requests
from koat.evaluation.task import Scoring, Task, adjust_task
from koat.forest.score import Layout

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Questions:
    """The items that are asked, the shots of each, the fingerprint of the shots' file, and what to know."""

    items: list[Item]
    shots: list[list[Item]]
    shots_source: str | None
    notes: list[str]


def evaluate_task(
    model: nn.Module,
    layout: Layout,
    tokenizer: Any,
    task: Task,
    data_path: str,
    shots_path: str | None = None,
    *,
    num_shots: int | None = None,
    limit: int | str | None = None,
    seed: int | None = None,
    token_budget: int = 4096,
    on_progress: Progress | None = None,
) -> TaskResult:
    """Ask a model the items of a file and score its answers.

    `num_shots`, `limit` (a number or "all") and `seed` (of the shots) override the task. The precision is the
    caller's: wrap the call in autocast for bfloat16. Raises ConfigError and DataError for what cannot be asked.
    """
    task = adjust_task(task, num_shots=num_shots, limit=limit, seed=seed)
    questions = gather_questions(task, tokenizer, data_path, shots_path)
    started = time.perf_counter()
    asked = build_requests(task, questions.items, questions.shots, tokenizer, find_room(model))
    scored = score_requests(model, layout, asked.requests, token_budget=token_budget, on_progress=on_progress)
    seconds = time.perf_counter() - started
    conditions = describe_conditions(model, layout, tokenizer, truncation=asked.truncation, template="none")
    return _summarise(task, questions, asked, scored, tokenizer, conditions, seconds)


def _summarise(
    task: Task,
    questions: Questions,
    asked: RequestSet,
    scored: ScoredRequests,
    tokenizer: Any,
    conditions: Parts,
    seconds: float,
) -> TaskResult:
    answered = _take_answers(task, questions.items, asked, scored.scores, tokenizer)
    items = [item for item, _ in answered]
    predictions = [prediction for _, prediction in answered]
    labels = check_labels(task, asked.requests, tokenizer)
    notes = questions.notes + _note_overflow(asked) + (labels.notes if "first-token" in task.scorings else [])
    for note in notes:
        log.warning("%s: %s", task.name, note)
    source = questions.shots_source
    return TaskResult(
        task=task.name,
        num_shots=task.num_shots,
        shot_seed=task.shot_seed,
        scores={scoring: _score(predictions, scoring, labels) for scoring in task.scorings},
        predictions=predictions,
        contracts={scoring: make_contract(task, items, source, scoring) for scoring in task.scorings},
        conditions=conditions,
        notes=notes,
        kept_out=asked.kept_out,
        seconds=seconds,
        num_tokens=scored.num_tokens,
        num_unique_tokens=scored.num_unique_tokens,
    )


def _take_answers(
    task: Task, items: Sequence[Item], asked: RequestSet, scores: Sequence[ItemScore], tokenizer: Any
) -> list[tuple[Item, dict[str, Any]]]:
    """Pair each item that was asked with its prediction."""
    by_id = {item.id: item for item in items}
    return [
        (by_id[request.item_id], predict_item(task, by_id[request.item_id], request, score, tokenizer))
        for request, score in zip(asked.requests, scores, strict=True)
    ]


def _score(predictions: Sequence[Mapping[str, Any]], scoring: Scoring, labels: LabelCheck) -> Score:
    right = [bool(prediction["correct"][scoring]) for prediction in predictions]
    return score_accuracy(right, meaningful=labels.meaningful or scoring != "first-token")


def gather_questions(task: Task, tokenizer: Any, data_path: str, shots_path: str | None) -> Questions:
    """Read, sample and draw what a task asks. Raises ConfigError for shots without a file."""
    if task.num_shots and shots_path is None:
        raise ConfigError(
            f"the task {task.name!r} shows {task.num_shots} solved examples, but no file to draw them from "
            "was given: give --shots-from FILE or --shots 0"
        )
    found = read_items(data_path, task)
    items = sample_items(found.items, task)
    notes = _note_items(found, items, task, data_path)
    if not task.num_shots or shots_path is None:
        return Questions(items, [[] for _ in items], None, notes)
    source = read_items(shots_path, task).items
    shots = draw_shots(pick_pool(source, task, tokenizer), task, len(items))
    num_own = sum(item in drawn for item, drawn in zip(items, shots, strict=True))
    if num_own:
        notes.append(f"{num_own} items stand among their own shots, answer included. Draw the shots from other data.")
    return Questions(items, shots, fingerprint_source(source), notes)


def _note_items(found: Harvest, items: Sequence[Item], task: Task, path: str) -> list[str]:
    notes = []
    if found.num_empty:
        notes.append(f"{found.num_empty} rows of {path} have an empty field and were left out.")
    if task.items != "all" and task.items > len(items):
        notes.append(f"{task.items} items were asked for; {path} has {len(items)}, and all of them were taken.")
    return notes


def _note_overflow(asked: RequestSet) -> list[str]:
    notes = note_kept_out(asked.kept_out, len(asked.requests))
    if asked.dropped_shots:
        notes.append(
            f"{len(asked.dropped_shots)} items were asked with fewer shots, to fit the model's context "
            f"({sum(asked.dropped_shots.values())} shots dropped)."
        )
    return notes


def predict_item(task: Task, item: Item, request: ChoiceRequest, score: ItemScore, tokenizer: Any) -> dict[str, Any]:
    """Return the record of one prediction: texts, gold, what each scoring takes for the answer, numbers.

    A first token that is no label word is an answer that is wrong, and stands there as nothing.
    """
    generated = tokenizer.decode([score.greedy_token_id])
    normalised = normalise_logprobs(task, score)
    answers: Mapping[Scoring, str | None] = {
        "first-token": generated.strip() if generated.strip() in task.words else None,
        "likelihood": task.words[max(range(len(normalised)), key=normalised.__getitem__)],
    }
    gold = task.words[item.gold]
    return {
        "id": item.id,
        "text": dict(item.raw),
        "gold": gold,
        "predicted": {scoring: answers[scoring] for scoring in task.scorings},
        "correct": {scoring: answers[scoring] == gold for scoring in task.scorings},
        "logprobs": dict(zip(task.words, score.choice_logprobs, strict=True)),
        "num_tokens": dict(zip(task.words, score.choice_num_tokens, strict=True)),
        "generated": generated,
        "shots": list(request.shot_ids),
    }


def normalise_logprobs(task: Task, score: ItemScore) -> list[float]:
    """Return what choices are ranked by: log-probabilities, divided as the task has it."""
    divisors: dict[str | None, Sequence[int]] = {
        None: [1] * len(task.words),
        "per-token": score.choice_num_tokens,
        "per-character": [len(word) for word in task.words],
    }
    return [value / by for value, by in zip(score.choice_logprobs, divisors[task.normalisation], strict=True)]
