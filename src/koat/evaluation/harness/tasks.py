"""lm-evaluation-harness' tasks by name: its own, koat's local ones, and a user's, loaded and ready to be asked.

Needs the extra `eval`, which is imported when a task is wanted.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from koat.core.errors import ConfigError, HubError, suggest

TASKS = Path(__file__).parent / "lm_tasks"
"""Tasks over local files, in lm-evaluation-harness' own format."""
LOCAL = "local_"
SEED = 1234
"""What the harness draws shots with when no seed is given."""


@dataclass(frozen=True, slots=True)
class HarnessTask:
    """One leaf task: the harness' object, with shots and seed set."""

    name: str
    task: Any
    num_shots: int
    seed: int


@dataclass(frozen=True, slots=True)
class Sources:
    """Where tasks and their data are found: a folder of data files, and a user's folder of tasks."""

    data_dir: Path | None = None
    include_path: Path | None = None


def import_lm_eval(module: str = "lm_eval") -> Any:
    """Import a module of the harness. Raises ConfigError when the extra is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"lm-evaluation-harness is not installed ({error}). Install it: pip install 'koat[eval]'"
        ) from error


def open_manager(names: Sequence[str], sources: Sources, own: Sequence[str]) -> Any:
    """Return the harness' index of tasks that knows all `names`; its own ten thousand are read only when needed.

    Raises ConfigError for a name that nobody knows, with the nearest; `own` are koat's own names.
    """
    try:
        make = import_lm_eval("lm_eval.tasks").TaskManager
    except ConfigError as error:
        near = ", ".join(f"{name!r}{suggest(name, own)}" for name in names)
        raise ConfigError(f"koat has no task {near}; its own are {', '.join(own)}. For lm-eval's: {error}") from error
    paths = [str(TASKS), *([str(sources.include_path)] if sources.include_path else [])]
    metadata = {"data_dir": str(sources.data_dir.expanduser().resolve())} if sources.data_dir else {}
    if sources.include_path and not sources.include_path.is_dir():
        raise ConfigError(f"--include-path {sources.include_path}: there is no such folder.")
    manager = make(include_path=paths, include_defaults=False, metadata=metadata)
    if sources.include_path is None and all(find_name(name, manager, sources) for name in names):
        return manager
    manager = make(include_path=paths, metadata=metadata)
    unknown = [name for name in names if not find_name(name, manager, sources)]
    if unknown:
        near = ", ".join(f"{name!r}{suggest(name, [*own, *manager.all_tasks])}" for name in unknown)
        raise ConfigError(
            f"neither koat nor lm-eval knows a task {near}. koat's own are {', '.join(own)}; `koat lm-eval ls tasks` "
            "lists the others. A task of your own is named by its file, ./task.yaml, or lies in --include-path."
        )
    return manager


def find_name(name: str, manager: Any, sources: Sources) -> str:
    """Return the name under which the harness knows a task, empty when it does not.

    With a folder of data, a task that has a variant over local files means that one.
    """
    forms = [f"{LOCAL}{name}", name] if sources.data_dir else [name]
    return next((form for form in forms if form in manager.task_index), "")


def load_leaves(name: str, manager: Any) -> tuple[list[Any], dict[str, list[str]]]:
    """Load what a name stands for: its leaf tasks, and the names of those by each group within it.

    Raises HubError for data that cannot be had, ConfigError for a task that koat does not run.
    """
    drop_advice()
    random.seed(0)  # as the harness does: some tasks shuffle choices while they load
    np.random.seed(SEED)
    try:
        loaded = manager.load([name])
    except ImportError as error:
        raise ConfigError(f"the task {name!r} needs a package that is not installed: {error}.") from error
    except OSError as error:
        raise HubError(
            f"the data of {name!r} cannot be had: {type(error).__name__}: {error}. Without the Hub, give --data-dir "
            f"FOLDER for the tasks that have a variant over local files ({LOCAL}...)."
        ) from error
    leaves = list(loaded["tasks"].values())
    for task in leaves:
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise ConfigError(
                f"{task.task_name} runs code that a model writes, or shows it images: koat eval does not. Use `koat "
                "lm-eval run` with the harness' own options."
            )
    groups = {group.name: [leaf.task_name for leaf in group.get_all_tasks()] for group in loaded["groups"].values()}
    if not groups and len(leaves) > 1:  # a tag
        groups = {name: [leaf.task_name for leaf in leaves]}
    return leaves, groups


def set_shots(task: Any, num_shots: int | None, seed: int | None) -> HarnessTask:
    """Set the shots of a loaded task: `num_shots`, or its own number; what it fixes at none stays none.

    Raises ConfigError when there are fewer to draw from.
    """
    own = task.get_config("num_fewshot")
    number = own or 0 if num_shots is None or own == 0 else num_shots
    pool = list_pool(task)
    if number > len(pool) and hasattr(task, "sampler"):
        raise ConfigError(
            f"{task.task_name} has {len(pool)} examples to draw shots from, not {number}. Give fewer --shots."
        )
    task.set_config(key="num_fewshot", value=number)
    seed = SEED if seed is None else seed
    task.set_fewshot_seed(seed=seed)
    return HarnessTask(task.task_name, task, number, seed)


def list_pool(task: Any) -> Sequence[Any]:
    """Return the rows that shots are drawn from; none for a task that draws in a way of its own."""
    return getattr(getattr(task, "sampler", None), "df", None) or []


def drop_advice() -> None:
    """Silence the remark that every task with data of its own makes, 57 times for MMLU."""
    logging.getLogger("lm_eval.api.task").addFilter(_is_no_advice)


def _is_no_advice(record: logging.LogRecord) -> bool:
    return "Custom kwargs can be passed" not in record.getMessage()
