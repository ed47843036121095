"""From the names a user gives to what is asked: single tasks, and the groups and tables they belong to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from koat.core.errors import ConfigError
from koat.evaluation.answer_task import AnswerTask, adjust_answers
from koat.evaluation.catalogue import is_own, list_tasks, load_task
from koat.evaluation.group_means import average_group
from koat.evaluation.harness.tasks import HarnessTask, Sources, find_name, load_leaves, open_manager, set_shots
from koat.evaluation.result import TaskResult
from koat.evaluation.task import Task, adjust_task
from koat.evaluation.task_group import TaskGroup, make_views
from koat.workflows.evaluating.asking import Asking, Leaf

Key = tuple[str, int]
"""A task's name and its number of shots: what tells results of one evaluation apart."""


@dataclass(slots=True)
class Exam:
    """Everything that is asked: tasks by key in order, groups of keys by name, and koat's own groups by part.

    `names` are what the user called it all.
    """

    names: Sequence[str]
    asking: Asking
    tasks: dict[Key, Leaf] = field(default_factory=dict)
    groups: dict[str, list[Key]] = field(default_factory=dict)
    tables: list[tuple[TaskGroup, list[list[Key]]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    manager: Any = None

    def add(self, task: Leaf) -> Key:
        """Add one task and return its key. Raises ConfigError for another of koat's own tasks of that name."""
        key = (task.name, getattr(task, "num_shots", 0))
        if isinstance(task, Task | AnswerTask) and self.tasks.get(key, task) != task:
            raise ConfigError(
                f"two different tasks are called {task.name!r}, and their scores could not be told apart. Give one of "
                "them another `name:`."
            )
        self.tasks.setdefault(key, task)
        return key

    def add_choices(self, task: Task) -> None:
        """Add one of koat's choice tasks, adjusted as asked."""
        asking = self.asking
        asking.need_data(task)
        self.add(adjust_task(task, num_shots=asking.num_shots, limit=asking.limit, seed=asking.seed))

    def add_answers(self, task: AnswerTask) -> None:
        """Add one of koat's answer tasks. Raises ConfigError for shots, which it has none of."""
        self.asking.need_data(task)
        if self.asking.num_shots:
            raise ConfigError(f"the task {task.name!r} shows no solved examples: leave --shots away.")
        self.add(adjust_answers(task, self.asking.limit))

    def add_group(self, group: TaskGroup) -> None:
        """Add the tasks of one of koat's groups, with the group's shots unless others were asked for."""
        asked = self.asking.num_shots
        parts = [self.add_harness(part.task, part.num_shots if asked is None else asked) for part in group.parts]
        self.tables.append((group, parts))
        if asked is not None:
            own = ", ".join(f"{part.label} {part.num_shots}" for part in group.parts)
            self.notes.append(f"{group.name} has shots of its own ({own}); --shots {asked} was asked for instead.")
        if self.asking.data_dir:
            self.notes.append(
                f"{group.name} was asked of local files: items and shots are theirs, so that scores lie near published "
                "ones but are not comparable with them."
            )

    def add_harness(self, name: str, num_shots: int | None) -> list[Key]:
        """Add the tasks that a name stands for in the harness, and the groups within it; return their keys."""
        leaves, groups = load_leaves(find_name(name, self.manager, _find_sources(self.asking)), self.manager)
        ready = [set_shots(leaf, num_shots, self.asking.seed) for leaf in leaves]
        fixed = [task.name for task in ready if num_shots and task.num_shots != num_shots]
        if fixed:
            self.notes.append(f"{', '.join(fixed)}: asked without the {num_shots} shots; the task fixes them at none.")
        keys = {task.name: self.add(task) for task in ready}
        self.groups |= {group: [keys[leaf] for leaf in members] for group, members in groups.items()}
        return list(keys.values())


USED_BY: dict[str, tuple[str, tuple[type[Any], ...], str]] = {
    "data": ("--data", (Task, AnswerTask), "lm-eval's tasks have their own items, local ones in --data-dir"),
    "shots": ("--shots-from", (Task,), "only koat's choice tasks draw their examples from it"),
    "seed": ("--seed", (Task, HarnessTask), "they show no solved examples that a seed would draw"),
    "data_dir": ("--data-dir", (HarnessTask,), "it is for lm-eval's tasks; koat's own read --data"),
    "include_path": ("--include-path", (HarnessTask,), "it is for lm-eval's tasks; koat's own are named by their file"),
}
"""What the caller may say beside the tasks, and the kinds of tasks that listen."""
ADD: dict[type[Any], Callable[[Exam, Any], Any]] = {
    Task: Exam.add_choices,
    AnswerTask: Exam.add_answers,
    TaskGroup: Exam.add_group,
    str: lambda exam, name: exam.add_harness(name, exam.asking.num_shots),
}
"""What is done with each kind of thing that a name stands for; a bare name is the harness'."""


def gather_exam(names: Sequence[str], asking: Asking) -> Exam:
    """Find every task that was named. Raises ConfigError for an unknown name, with the nearest."""
    exam = Exam(names, asking)
    found: list[Any] = [load_task(name) if is_own(name) else name for name in names]
    wanted = [name for each in found for name in _list_harness_names(each)]
    if wanted:
        exam.manager = open_manager(wanted, _find_sources(asking), list_tasks())
    for each in found:
        ADD[type(each)](exam, each)
    return exam


def refuse_unused(exam: Exam) -> Exam:
    """Return an exam. Raises ConfigError for a file, folder or seed that was given and that none of its tasks reads."""
    for name, (option, kinds, hint) in USED_BY.items():
        if getattr(exam.asking, name) is not None and not any(isinstance(task, kinds) for task in exam.tasks.values()):
            raise ConfigError(f"{option} says nothing to {', '.join(exam.names)}: {hint}. Leave it away.")
    return exam


def _list_harness_names(found: Any) -> list[str]:
    if isinstance(found, TaskGroup):
        return [part.task for part in found.parts]
    return [found] if isinstance(found, str) else []


def _find_sources(asking: Asking) -> Sources:
    return Sources(asking.data_dir, asking.include_path)


def describe_groups(exam: Exam, results: dict[Key, TaskResult]) -> list[dict[str, Any]]:
    """Return the means over each group's tasks, and the tables of koat's own groups, JSON-safe."""
    described: list[dict[str, Any]] = []
    for name, keys in exam.groups.items():
        means = average_group([results[key] for key in keys])
        described.append(
            {
                "group": name,
                "tasks": [task for task, _ in keys],
                "means": {scoring: mean.to_mapping() for scoring, mean in means.items()},
            }
        )
    for group, parts in exam.tables:
        views = make_views(group, [[results[key] for key in keys] for keys in parts])
        described.append({"group": group.name, "title": group.title.en, "views": views})
    return described
