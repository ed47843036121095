"""How each kind of task is put to a subject: the one table of kinds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koat.core.errors import ConfigError
from koat.evaluation.answer_task import AnswerTask
from koat.evaluation.answering import evaluate_answers
from koat.evaluation.evaluate import evaluate_task
from koat.evaluation.harness.tasks import HarnessTask, import_lm_eval
from koat.evaluation.result import TaskResult
from koat.evaluation.task import Task
from koat.workflows.evaluating.subject import Subject

Leaf = Task | AnswerTask | HarnessTask
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Asking:
    """What the caller says beside the tasks' names; None leaves a thing to the task.

    `data` and `shots` are files for koat's own tasks, `data_dir` the folder of the harness' `local_` tasks.
    """

    data: str | None = None
    shots: str | None = None
    data_dir: Path | None = None
    include_path: Path | None = None
    num_shots: int | None = None
    limit: int | str | None = None
    seed: int | None = None
    chat_template: bool = False
    token_budget: int = 8192

    def __post_init__(self) -> None:
        """Raise ConfigError for a limit that leaves nothing to ask."""
        if isinstance(self.limit, int) and self.limit < 1:
            raise ConfigError(f"a limit of {self.limit} items leaves nothing to ask. Give --limit 1 or more, or `all`.")

    def to_mapping(self) -> dict[str, Any]:
        """Return what was said, under the names of the command line's options; what was left open is left out."""
        said = {
            "data": self.data, "shots-from": self.shots, "data-dir": self.data_dir, "include-path": self.include_path,
            "shots": self.num_shots, "limit": self.limit, "seed": self.seed,
            "apply-chat-template": self.chat_template or None,
        }  # fmt: skip
        return {
            name: str(value) if isinstance(value, Path) else value for name, value in said.items() if value is not None
        }

    def need_data(self, task: Task | AnswerTask) -> str:
        """Return the file with the items of koat's own tasks. Raises ConfigError when none was given."""
        if self.data is None:
            raise ConfigError(f"the task {task.name!r} reads its items from a file: give --data FILE.")
        if self.chat_template:
            raise ConfigError(f"--apply-chat-template is for lm-eval's tasks; {task.name!r} is koat's own.")
        return self.data


def ask_choices(subject: Subject, task: Task, asking: Asking, on_progress: OnProgress) -> TaskResult:
    """Put a choice task to a subject."""
    return evaluate_task(
        subject.model, subject.layout, subject.tokenizer, task, asking.need_data(task), asking.shots,
        token_budget=asking.token_budget, on_progress=on_progress,
    )  # fmt: skip


def ask_answers(subject: Subject, task: AnswerTask, asking: Asking, on_progress: OnProgress) -> TaskResult:
    """Put an answer task to a subject, in the words it was trained with."""
    return evaluate_answers(
        subject.model, subject.layout, subject.tokenizer, task, asking.need_data(task),
        template=subject.template, token_budget=asking.token_budget, on_progress=on_progress,
    )  # fmt: skip


def ask_harness(subject: Subject, task: HarnessTask, asking: Asking, on_progress: OnProgress) -> TaskResult:
    """Put a task of lm-evaluation-harness to a subject; the harness shows its own progress."""
    harness = import_lm_eval("koat.evaluation.harness.lm")
    options = harness.HarnessOptions(tokens=asking.token_budget)
    lm = harness.KoatLM(subject.model, subject.layout, subject.tokenizer, options)
    run = import_lm_eval("koat.evaluation.harness.run")
    limit = None if asking.limit == "all" else asking.limit
    result: TaskResult = run.evaluate_harness(lm, task, limit, chat_template=asking.chat_template)
    return result


ASK: dict[type[Leaf], Callable[[Subject, Any, Asking, OnProgress], TaskResult]] = {
    Task: ask_choices,
    AnswerTask: ask_answers,
    HarnessTask: ask_harness,
}
