"""Evaluate: a base model, a run of koat's, or an adapter that PEFT saved, on one or more tasks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from collections.abc import Sequence as ListLike
from pathlib import Path
from typing import Any

from koat.core.atomic import check_writable, remove, write_json, write_text
from koat.core.errors import ModelError
from koat.evaluation.contract import hash_value
from koat.evaluation.result import TaskResult
from koat.workflows.evaluating.asking import ASK, Asking
from koat.workflows.evaluating.exam import Exam, Key, describe_groups, gather_exam, refuse_unused
from koat.workflows.evaluating.subject import Subject, load_subject, open_subject
from koat.workflows.measure import Cost
from koat.workflows.out_of_memory import TO_EVALUATE, explain_out_of_memory

__all__ = ["Subject", "evaluate_subject", "load_subject", "open_subject"]

OnProgress = Callable[[str, int, int], None]
UNFINISHED = "unfinished-{}.scores.json"
"""Holds what is there of an evaluation whose other tasks are still asked; in its name, the hash of what was asked."""
LONGEST_NAME = 100
"""Characters of a file's name; longer lists of tasks are told apart by a hash."""


def evaluate_subject(
    subject: Subject,
    tasks: ListLike[str],
    data: str | None = None,
    shots: str | None = None,
    *,
    data_dir: str | Path | None = None,
    include_path: str | Path | None = None,
    num_shots: int | None = None,
    limit: int | str | None = None,
    seed: int | None = None,
    chat_template: bool = False,
    token_budget: int = 8192,
    on_progress: OnProgress = lambda task, done, total: None,
) -> dict[str, Any]:
    """Evaluate one model on tasks, keep every prediction, and return all scores as a mapping.

    A task is one of koat's own (`data` holds its items, `shots` its examples), or any task or group of
    lm-evaluation-harness: its own, koat's over the files in `data_dir`, or one in the folder `include_path`.
    Raises KoatError for what the caller can mend.
    """
    asking = Asking(
        data, shots, Path(data_dir) if data_dir else None, Path(include_path) if include_path else None,
        num_shots, limit, seed, chat_template, token_budget,
    )  # fmt: skip
    return evaluate_exam(subject, refuse_unused(gather_exam(tasks, asking)), on_progress=on_progress)


@explain_out_of_memory(ModelError, "in evaluation", TO_EVALUATE)
def evaluate_exam(
    subject: Subject,
    exam: Exam,
    *,
    on_progress: OnProgress = lambda task, done, total: None,
    replaces: bool = False,
) -> dict[str, Any]:
    """Put every task of an exam to one model; as `evaluate_subject` does, which gathers the exam first.

    With `replaces` it takes the place of what was asked of these tasks before, whatever the question was.
    Scores are on disk after every task: one that fails later costs nothing of those before it.
    """
    found: dict[Key, TaskResult] = {}
    stems: list[str] = []
    report = begin_report(subject, exam)
    draft = subject.predictions / UNFINISHED.format(hash_value(report["asked"])[:8])
    check_writable(subject.predictions)  # found now, not after hours
    for key, task in exam.tasks.items():
        with Cost(next(subject.model.parameters()).device) as cost:
            found[key] = ASK[type(task)](subject, task, exam.asking, report_for(task.name, on_progress))
        report["results"].append({**found[key].to_mapping(), "peak_bytes": cost.peak_bytes})
        stems.append(keep_predictions(subject, found[key], replaces))
        if len(found) < len(exam.tasks):
            write_json(draft, report)
    path = subject.predictions / f"{name_report(exam.names, stems)}.scores.json"
    write_json(path, report)  # before the groups: a mistake in a group's file must not cost the scores
    remove(draft)
    if exam.groups or exam.tables:
        report["groups"] = describe_groups(exam, found)
        write_json(path, report)
    return report


def begin_report(subject: Subject, exam: Exam) -> dict[str, Any]:
    """Return what an evaluation's file of scores says before the first task."""
    asked = {"target": subject.target, "task": list(exam.names), **subject.loading, **exam.asking.to_mapping()}
    return {
        "subject": subject.name,
        "forest": subject.verification.to_mapping(),
        "results": [],
        "groups": [],
        "notes": exam.notes,
        "asked": asked,
        "quantisation": subject.quantised.to_mapping() if subject.quantised else None,
    }


def report_for(name: str, on_progress: OnProgress) -> Callable[[int, int], None]:
    """Return a progress callback that knows its task."""
    return lambda done, total: on_progress(name, done, total)


def pick_stem(folder: Path, stem: str, own: dict[str, Any]) -> str:
    """Return a file name that tells apart what `own` identifies; `stem` is its task's.

    Where that file holds answers to another question, or answers given under other conditions, a hash is added:
    no evaluation takes the place of one that is not its own repetition.
    """
    before = read_first(folder / f"{stem}.jsonl")
    if all(before.get(key, own[key]) == own[key] for key in own):
        return stem
    return f"{stem}-{hash_value(own)[:8]}"


def name_variant(found: TaskResult) -> str:
    """Return a name for a task with its shots and their seed."""
    seed = "" if found.shot_seed is None else f"-seed{found.shot_seed}"
    name = re.sub(r"[/\\]", "-", found.task)  # which would be folders
    return f"{name}-{found.num_shots}shot{seed}"


def read_first(path: Path) -> dict[str, Any]:
    """Return a file's first prediction, nothing where there is none or it is damaged."""
    try:
        with path.open(encoding="utf-8") as file:
            return dict(json.loads(file.readline()))
    except (OSError, ValueError, TypeError):
        return {}


def identify(found: TaskResult) -> dict[str, Any]:
    """Return the hashes of what was asked, by scoring, and of how."""
    contracts = {scoring: parts.hash for scoring, parts in found.contracts.items()}
    return {"contracts": contracts, "conditions": found.conditions.hash}


def name_report(names: ListLike[str], stems: ListLike[str]) -> str:
    """Return the name of the file of scores: all tasks, or what was asked for where those are too many."""
    stem = "-".join(stems)
    if len(stem) <= LONGEST_NAME:
        return stem
    asked = "-".join(Path(name).stem for name in names)
    return f"{asked[: LONGEST_NAME - 9]}-{hash_value(stem)[:8]}"


def keep_predictions(subject: Subject, found: TaskResult, replaces: bool) -> str:
    """Write every prediction as a JSON line, with the contracts they stand under; return the file's name."""
    stem, own = name_variant(found), identify(found)
    if not replaces:
        stem = pick_stem(subject.predictions, stem, own)
    lines = [json.dumps({**row, **own}, ensure_ascii=False) for row in found.predictions]
    write_text(subject.predictions / f"{stem}.jsonl", "\n".join(lines) + "\n")
    return stem
