"""koat's own tasks by name: those that ship, and one's own from a file."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from koat.core.config import Layer, Section, resolve
from koat.core.config_files import read_config_file
from koat.core.errors import ConfigError, suggest
from koat.evaluation.answer_task import AnswerTask
from koat.evaluation.task import Task
from koat.evaluation.task_group import TaskGroup

OwnTask = Task | AnswerTask | TaskGroup
KINDS: dict[str, type[Task] | type[AnswerTask] | type[TaskGroup]] = {
    "choice": Task,
    "answer": AnswerTask,
    "group": TaskGroup,
}
"""What a file's `kind` says; without one it is a choice task."""


def list_tasks() -> list[str]:
    """Return the names of the tasks that ship."""
    files = resources.files("koat.evaluation").joinpath("tasks").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def is_own(name_or_path: str) -> bool:
    """Whether a name is a task's that ships, or a file's."""
    path = Path(name_or_path)
    return name_or_path in list_tasks() or path.suffix in (".yaml", ".yml", ".json") or len(path.parts) > 1


def load_task(name_or_path: str) -> OwnTask:
    """Load a task that ships, or one's own from a YAML file.

    Raises ConfigError for an unknown name (with the nearest), an unknown key, or a value that cannot be.
    """
    if not is_own(name_or_path):
        raise ConfigError(
            f"there is no task {name_or_path!r}{suggest(name_or_path, list_tasks())}; there are: "
            f"{', '.join(list_tasks())}. A task of your own is named by its file, for example ./task.yaml"
        )
    if name_or_path not in list_tasks():
        return _read_task(Path(name_or_path), name_or_path)
    file = resources.files("koat.evaluation").joinpath("tasks", f"{name_or_path}.yaml")
    with resources.as_file(file) as path:
        return _read_task(path, name_or_path)


def _read_task(path: Path, name: str) -> OwnTask:
    values = read_config_file(path)
    kind = str(values.get("kind", "choice"))
    try:
        if kind not in KINDS:
            raise ConfigError(f"kind is {kind!r}{suggest(kind, KINDS)}; it may be: {', '.join(KINDS)}")
        schema: type[Section] = KINDS[kind]
        task = resolve(schema, [Layer("task", values)]).settings
    except ConfigError as error:
        raise ConfigError(f"task {name}: {error}") from None
    assert isinstance(task, OwnTask)
    return task
