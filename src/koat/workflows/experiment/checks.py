"""What can be known to go wrong with an experiment before any weight is read, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from koat.core.errors import KoatError
from koat.data.hub import looks_like_hub_id, split_part
from koat.data.opening import describe_missing
from koat.evaluation.catalogue import is_own, list_tasks, load_task
from koat.evaluation.harness.tasks import Sources, open_manager
from koat.evaluation.task_group import TaskGroup
from koat.model import load_config
from koat.workflows.config import RunConfig
from koat.workflows.evaluating.asking import Asking
from koat.workflows.evaluating.exam import gather_exam
from koat.workflows.experiment.cells import Cell, ExperimentPlan
from koat.workflows.experiment.file import Evaluation


def check_plan(plan: ExperimentPlan, overwrite: Sequence[str]) -> Iterator[str]:
    """Yield everything that is wrong with names, files, base models and tasks."""
    yield from check_names(plan.cells, overwrite)
    yield from check_files(plan)
    yield from check_bases(plan.cells)
    for evaluation in plan.experiment.evaluate:
        try:
            check_tasks(evaluation)
        except KoatError as error:
            yield str(error)


def check_names(cells: Sequence[Cell], overwrite: Sequence[str]) -> Iterator[str]:
    """Yield names that two cells would have, and names to overwrite that none has."""
    names = [cell.name for cell in cells]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"two cells would be called {name}; name a base or a variant otherwise"
    for name in sorted({*overwrite} - {*names}):
        yield f"--overwrite {name}: there is no such cell; there are: {', '.join(names)}"


def check_files(plan: ExperimentPlan) -> Iterator[str]:
    """Yield what is missing of the files that training and evaluation will want."""
    evaluate = plan.experiment.evaluate
    wanted = [(path, False) for each in evaluate for path in (each.data, each.shots_from) if path]
    for cell in plan.cells:
        if isinstance(cell.resolved.settings, RunConfig):
            data = cell.resolved.settings.data
            wanted += [(path, data.format == "datasets") for path in (*data.train, *data.validation)]
            wanted += [(str(data.splits), False)] if data.splits else []
    for path, named in dict.fromkeys(wanted):
        found = Path(path).exists() or Path(split_part(path)[0]).exists()
        if not found and not looks_like_hub_id(path, named=named):
            yield describe_missing(Path(path))
    for folder in dict.fromkeys(each.data_dir for each in evaluate if each.data_dir):
        if not Path(folder).is_dir():
            yield f"evaluate.data_dir: there is no folder {folder}"


def check_bases(cells: Sequence[Cell]) -> Iterator[str]:
    """Yield what is wrong with base models, as far as their configurations tell."""
    for model in {(cell.model.base, cell.model.revision): cell.model for cell in cells}.values():
        try:
            load_config(model)
        except KoatError as error:
            yield str(error)


def check_tasks(evaluation: Evaluation) -> None:
    """Raise ConfigError for tasks that nobody knows or that lack a file; loads no data of the harness' tasks."""
    names = [name for name in evaluation.tasks if not is_own(name)]
    if names:
        folder = Path(evaluation.data_dir) if evaluation.data_dir else None
        open_manager(names, Sources(folder), list_tasks())
    own = [name for name in evaluation.tasks if is_own(name) and not isinstance(load_task(name), TaskGroup)]
    if own:
        gather_exam(own, make_asking(evaluation))


def make_asking(evaluation: Evaluation) -> Asking:
    """Return an evaluation as `gather_exam` takes it."""
    return Asking(
        data=evaluation.data,
        shots=evaluation.shots_from,
        data_dir=Path(evaluation.data_dir) if evaluation.data_dir else None,
        num_shots=evaluation.shots,
        limit=evaluation.limit,
        seed=evaluation.seed,
    )


def explain_changes(out: Path, changed: Sequence[Cell]) -> str:
    """Say which cells on disk were made otherwise than the experiment says now, and what to do."""
    lines = [f"{cell.name}: {', '.join(cell.list_differences())}" for cell in changed]
    flags = " ".join(f"--overwrite {cell.name}" for cell in changed)
    return "\n  ".join(
        [
            f"{out} holds cells that were made with other settings than the experiment has now:",
            *lines,
            f"Choose another --out, put the settings back, or make them again with {flags}.",
        ]
    )
