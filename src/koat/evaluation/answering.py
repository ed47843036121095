"""Put an answer task to a model: it writes an answer to each question on a text, and the answers are compared."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from koat.core.errors import DataError
from koat.data.prompts import BUILTIN_TEMPLATES, PromptTemplate, resolve_template
from koat.data.readers import read_records
from koat.data.records import Record
from koat.data.row_values import join_names
from koat.data.tokens import encode_prompts
from koat.evaluation.answer_task import AnswerTask
from koat.evaluation.answers import METRICS, score_answer
from koat.evaluation.continuations import Continuations, Ending, continue_prompts, read_text
from koat.evaluation.contract import Parts, describe_conditions, hash_value
from koat.evaluation.harvest import sample_items
from koat.evaluation.metrics import Score, score_values
from koat.evaluation.protocol import KeptOut
from koat.evaluation.result import TaskResult, note_kept_out
from koat.evaluation.room import find_room
from koat.evaluation.scorer import Progress
from koat.forest.score import Layout

FIELDS = ("context", "instruction", "output")
"""What a record of a question on a text has; the context may lack where a task names its columns without it."""
TABLE_FIELDS = {"question": "instruction", "answer": "output"}
"""What the columns of a table of questions are often called, and the fields that they stand for."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Question:
    """A question on a text and its right answers."""

    id: str
    record: Record
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Asked:
    """The questions that fit the model's context with the prompts of each, and those that do not."""

    questions: list[Question]
    prompts: list[tuple[int, ...]]
    kept_out: list[KeptOut]


def evaluate_answers(
    model: nn.Module,
    layout: Layout,
    tokenizer: Any,
    task: AnswerTask,
    data_path: str,
    *,
    template: PromptTemplate | None = None,
    token_budget: int = 8192,
    on_progress: Progress | None = None,
) -> TaskResult:
    """Let a model answer the questions of a file, greedily, and compare its answers with the right ones.

    `template` is the one the model was trained with; None takes the task's own. Questions that do not fit the
    model's context with the longest answer are kept out and listed. Raises DataError for what cannot be asked.
    """
    template = (template or resolve_template(task.template)[0]).bind(tokenizer)
    found = read_questions(task, data_path)
    questions = sample_items(found, task)
    started = time.perf_counter()
    asked = build_prompts(task, questions, template, tokenizer, find_room(model))
    written = _write_answers(model, layout, tokenizer, task, asked, token_budget, on_progress)
    seconds = time.perf_counter() - started
    notes = note_kept_out(asked.kept_out, len(asked.questions))
    if task.items != "all" and task.items > len(found):
        notes.append(f"{task.items} items were asked for; {data_path} has {len(found)}, and all of them were taken.")
    for note in notes:
        log.warning("%s: %s", task.name, note)
    notes += note_shared_texts(asked.questions)
    cut = f"{len(asked.kept_out)} items kept out" if asked.kept_out else "none"
    conditions = describe_conditions(model, layout, tokenizer, truncation=cut, template=name_template(template))
    return _summarise(task, asked, written, tokenizer, conditions, notes, seconds)


def note_shared_texts(questions: Sequence[Question]) -> list[str]:
    """Say what counts as a draw where several questions are on one text."""
    texts = {each.record.fields["context"] for each in questions}
    num_texts = len(texts)
    if num_texts == len(questions) or "" in texts:
        return []
    if num_texts == 1:
        return ["All questions are on one text: intervals hold for other questions on it, and not for other texts."]
    return [f"{len(questions):,} questions on {num_texts:,} texts: intervals and tests take each text as one draw."]


def _summarise(
    task: AnswerTask,
    asked: Asked,
    written: Continuations,
    tokenizer: Any,
    conditions: Parts,
    notes: list[str],
    seconds: float,
) -> TaskResult:
    texts = [read_text(ids, task.until, tokenizer) for ids in written.token_ids]
    predictions = [predict_answer(*pair) for pair in zip(asked.questions, texts, strict=True)]
    return TaskResult(
        task=task.name,
        num_shots=0,
        shot_seed=None,
        scores=score_answers(predictions),
        predictions=predictions,
        contracts={name: make_answer_contract(task, asked.questions, name) for name in METRICS},
        conditions=conditions,
        notes=notes,
        kept_out=asked.kept_out,
        seconds=seconds,
        num_tokens=sum(map(len, asked.prompts)) + sum(map(len, written.token_ids)),
        num_unique_tokens=written.num_tokens,
    )


def score_answers(predictions: Sequence[dict[str, Any]]) -> dict[str, Score]:
    """Return each metric's mean over all questions; its interval takes the texts that they are on as what is drawn."""
    texts = [row["context"] for row in predictions]
    known = None if None in texts else texts
    return {name: score_values(name, [row["correct"][name] for row in predictions], known) for name in METRICS}


def read_questions(task: AnswerTask, path: str) -> list[Question]:
    """Read questions from a file in the format of SQuAD and KorQuAD, or rows with a context, a question, an answer.

    Raises DataError for rows that lack one of these.
    """
    found = read_records(path, format=task.format, columns=task.columns)
    records, has_several = found.records, found.format == "squad"
    if not task.columns and found.format == "table" and TABLE_FIELDS.keys() <= records[0].fields.keys():
        records = [rename_fields(record) for record in records]
    needed = ("instruction", "output") if task.columns and "context" not in task.columns else FIELDS
    for record in records:
        check_question(record, needed)
    records = [replace(record, fields={"context": "", **record.fields}) for record in records]
    ids = [record.fields.get("id", "") for record in records]
    if "" in ids or len(set(ids)) < len(ids):
        ids = [str(number) for number in range(1, len(records) + 1)]
    answers = [
        tuple(json.loads(record.fields["answers"])) if has_several else (record.fields["output"],) for record in records
    ]
    return [Question(*parts) for parts in zip(ids, records, answers, strict=True)]


def rename_fields(record: Record) -> Record:
    """Return a row of a table of questions under the names that prompt templates know, and under its own."""
    known = {new: record.fields[old] for old, new in TABLE_FIELDS.items()}
    return replace(record, fields={**record.fields, **known})


def check_question(record: Record, needed: Sequence[str]) -> None:
    """Raise DataError for a record that lacks a field of a question with an answer, or the text that it is on."""
    lacking = [name for name in needed if not record.fields.get(name, "").strip()]
    if lacking:
        raise DataError(
            f"{record.source}: {', '.join(lacking)} missing or empty; a question on a text has context, instruction "
            f"and output, and this row has {join_names(record.fields)}. Name the file's columns in a task of your own, "
            "in YAML: kind: answer, columns: {instruction: question, output: answer}."
        )


def build_prompts(
    task: AnswerTask, questions: Sequence[Question], template: PromptTemplate, tokenizer: Any, room: int | None
) -> Asked:
    """Turn questions into prompts of at most `room` tokens with the longest answer; longer ones are kept out.

    Raises DataError when none fits.
    """
    encoded = encode_prompts([template.render_prompt(each.record) for each in questions], tokenizer)
    asked = Asked([], [], [])
    for question, ids in zip(questions, encoded, strict=True):
        if room is not None and len(ids) + task.max_new_tokens > room:
            asked.kept_out.append(KeptOut(question.id, len(ids) + task.max_new_tokens, room))
        else:
            asked.questions.append(question)
            asked.prompts.append(tuple(ids))
    if not asked.questions:
        shortest = min(entry.num_tokens for entry in asked.kept_out)
        raise DataError(
            f"none of the {len(questions)} questions of {task.name!r} fits the model's context of {room} tokens; the "
            f"shortest has {shortest}, with {task.max_new_tokens} for the answer. Take a model with a longer context."
        )
    return asked


def _write_answers(
    model: nn.Module,
    layout: Layout,
    tokenizer: Any,
    task: AnswerTask,
    asked: Asked,
    token_budget: int,
    on_progress: Progress | None,
) -> Continuations:
    num_done = 0

    def show(num_new: int) -> None:
        nonlocal num_done
        num_done += num_new
        if on_progress is not None:
            on_progress(num_done, len(asked.prompts))

    ending = Ending(task.until, task.max_new_tokens, {"do_sample": False})
    return continue_prompts(
        model, layout, tokenizer, asked.prompts, ending, token_budget=token_budget, on_progress=show
    )


def predict_answer(question: Question, text: str) -> dict[str, Any]:
    """Return the record of one prediction: article, question, right answers, what was written, scores.

    `context` is the article's hash, None where there is none: questions on one are no draws of their own.
    """
    fields = question.record.fields
    return {
        "id": question.id,
        "text": {"title": fields.get("title", ""), "question": fields["instruction"]},
        "context": hash_value(fields["context"]) if fields["context"] else None,
        "gold": question.answers[0],
        "golds": list(question.answers),
        "predicted": dict.fromkeys(METRICS, text),
        "correct": score_answer(text, question.answers),
    }


def make_answer_contract(task: AnswerTask, questions: Sequence[Question], metric: str) -> Parts:
    """Pin what a score means; the words around article and question are a condition, as every model has its own."""
    asked = [
        [each.id, each.record.fields["context"], each.record.fields["instruction"], each.answers] for each in questions
    ]
    return Parts(
        {
            "items": {"num": len(questions), "fingerprint": hash_value(asked)},
            "shots": {"num": 0},
            "prompt": {"source": "article and question"},
            "normalisation": "KorQuAD 1.0",
            "scoring": {"by": "greedy text", "until": task.until, "max_new_tokens": task.max_new_tokens},
            "metric": metric,
        }
    )


def name_template(template: PromptTemplate) -> str:
    """Return a template's name; one that does not ship is told apart by a hash."""
    known = BUILTIN_TEMPLATES.get(template.name)
    if known is not None and known.to_mapping() == template.to_mapping():
        return template.name
    return f"{template.name} ({hash_value(template.to_mapping())[:8]})"
