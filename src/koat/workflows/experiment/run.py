"""Run an experiment: train and evaluate what is missing, cell by cell, then compare and report."""

from __future__ import annotations

import gc
import shlex
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from koat.core.atomic import remove, write_json, write_text, write_yaml
from koat.core.config import Resolved, to_mapping
from koat.core.errors import ConfigError, DataError, KoatError, RunFolderError, TrainingError, suggest
from koat.core.lock import hold
from koat.core.run_folder import RunFolder
from koat.report.comparison import to_csv, to_markdown
from koat.training.loop import StepRecord
from koat.workflows.comparing.compare import compare_targets
from koat.workflows.config import RunConfig
from koat.workflows.evaluating.evaluate import evaluate_exam
from koat.workflows.evaluating.exam import gather_exam
from koat.workflows.evaluating.subject import Subject, load_subject, open_subject
from koat.workflows.experiment.cells import FILE, RECORD, Cell, ExperimentPlan
from koat.workflows.experiment.checks import make_asking
from koat.workflows.experiment.file import Evaluation, is_filled_in, read_experiment, says_the_same
from koat.workflows.training.finetune import finetune_run
from koat.workflows.training.prepare import Say, settle_paths


@dataclass(frozen=True, slots=True)
class Watch:
    """Who is told of what happens: sentences, training steps by cell, evaluated items by cell and task."""

    say: Say = lambda text: None
    on_step: Callable[[str, StepRecord], None] = lambda cell, record: None
    on_item: Callable[[str, str, int, int], None] = lambda cell, task, done, total: None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an experiment ended in; `comparison` is empty where fewer than two subjects could be compared."""

    folder: Path
    comparison: dict[str, Any] = field(default_factory=dict)
    report: Path | None = None


RunCells = Callable[[ExperimentPlan, Sequence[Cell]], dict[str, str]]


def run_experiment(
    plan: ExperimentPlan,
    *,
    overwrite: Sequence[str] = (),
    language: Literal["en", "ko"] = "en",
    watch: Watch | None = None,
    run_cells: RunCells | None = None,
) -> Outcome:
    """Do what is missing of an experiment, then write comparison and report from what is there.

    `run_cells` does the cells and returns the failures by name; without it they are done here, one by one. A cell
    that fails does not stop the others; TrainingError names them at the end, after the report. Killed anywhere,
    the same call goes on.
    """
    watch = watch or Watch()
    claim_folder(plan)
    waiting = [cell for cell in plan.cells if cell.name in overwrite or not plan.is_done(cell)]
    watch.say(f"{plan.experiment.name}: {len(plan.cells)} cells, {len(plan.cells) - len(waiting)} of them done")
    failures = run_cells(plan, waiting) if run_cells else run_in_turn(plan, waiting, overwrite, watch)
    lines = [f"{name}: {text}" for name, text in failures.items()]
    ending = "\n  ".join([f"{len(failures)} of {len(plan.cells)} cells failed:", *lines])
    try:
        outcome = finish_experiment(plan, language, watch.say)
    except Exception:
        if failures:  # what went wrong with the report must not hide what went wrong before
            watch.say(f"! {ending}")
        raise
    if failures:
        raise TrainingError(f"{ending}\nThe same command goes on with them.")
    return outcome


def claim_folder(plan: ExperimentPlan) -> None:
    """Make the experiment's folder and put its filled-in file there, refusing a folder of something else.

    A file there that the user wrote is never replaced: it stays where it says the same, and is refused otherwise.
    """
    file = plan.out / FILE
    if file.exists():
        other = read_experiment(str(file)).get("name")
        if other != plan.experiment.name:
            raise RunFolderError(f"{plan.out} holds the experiment {other!r}. Choose another --out.")
        if not is_filled_in(file):
            check_own_file(plan, file)
            return
    elif plan.out.exists() and (not plan.out.is_dir() or any(plan.out.iterdir())):
        raise RunFolderError(f"{plan.out} is not empty and holds no experiment. Choose another --out.")
    write_yaml(file, to_mapping(plan.experiment))


def check_own_file(plan: ExperimentPlan, file: Path) -> None:
    """Raise ConfigError for a file of the user's own in the place of the filled-in one, unless both say the same."""
    if not says_the_same(file, plan.experiment):
        raise ConfigError(
            f"{file} is a file of your own, and the filled-in experiment would be written over it. Move it out of "
            f"{plan.out}, choose another --out, or write the inputs and settings that you give beside it into it."
        )


def run_in_turn(plan: ExperimentPlan, cells: Sequence[Cell], overwrite: Sequence[str], watch: Watch) -> dict[str, str]:
    """Run cells one after the other in this process; return the failures by name."""
    failures: dict[str, str] = {}
    for number, cell in enumerate(cells, 1):
        watch.say(f"[{number}/{len(cells)}] {cell.name}")
        try:
            run_cell(plan, cell, watch, overwrite=cell.name in overwrite)
        except Exception as error:  # a bug in one cell is no reason to lose the night for the others
            failures[cell.name] = str(error) if isinstance(error, KoatError) else traceback.format_exc()
            watch.say(f"! {cell.name} failed: {error}")
        gc.collect()
    return failures


def run_cell(plan: ExperimentPlan, cell: Cell, watch: Watch, *, overwrite: bool = False) -> None:
    """Train a cell where that is missing, going on from its latest checkpoint, and ask it what it was not asked."""
    with hold_cell(cell):
        if overwrite and cell.seed is None:
            remove(RunFolder(cell.folder).predictions)
        missing = plan.evaluations if overwrite else plan.list_missing(cell)
        # Before training: a task whose data cannot be had would be found out about a night later.
        exams = [(each, gather_exam(each.tasks, make_asking(each))) for each in missing]
        if overwrite or not cell.is_trained():
            train_cell(cell, watch, overwrite)
        if not exams:
            return
        subject = open_cell(cell)
        for evaluation, exam in exams:
            evaluate_exam(subject, exam, on_progress=partial(watch.on_item, cell.name), replaces=True)
            record_evaluation(plan, cell, evaluation)


def train_cell(cell: Cell, watch: Watch, overwrite: bool) -> None:
    """Train a cell's run, or go on with it."""
    settings = cell.resolved.settings
    if isinstance(settings, RunConfig):
        finetune_run(
            Resolved(settings, cell.resolved.origins),
            cell.folder,
            resume=cell.is_begun() and not overwrite,
            overwrite=overwrite,
            say=watch.say,
            on_step=lambda record: watch.on_step(cell.name, record),
        )


def open_cell(cell: Cell) -> Subject:
    """Load a cell's model, ready to be asked."""
    if cell.seed is not None:
        return open_subject(str(cell.folder))
    subject = load_subject(cell.name, cell.model, None, RunFolder(cell.folder).predictions)
    return replace(subject, target=cell.model.base)


def record_evaluation(plan: ExperimentPlan, cell: Cell, evaluation: Evaluation) -> None:
    """Note that a cell was asked something; an earlier answer to the same task with the same shots is replaced."""
    asked = plan.describe_asked(cell, evaluation)
    same = ("tasks", "shots", "seed")
    others = [
        each
        for each in cell.read_record()["evaluations"]
        if [each[key] for key in same] != [asked[key] for key in same]
    ]
    model = settle_paths(cell.resolved.settings)["model"]
    write_json(RunFolder(cell.folder).predictions / RECORD, {"model": model, "evaluations": [*others, asked]})


def hold_cell(cell: Cell) -> AbstractContextManager[None]:
    """Keep other processes from working on a cell. Raises RunFolderError when one does already."""
    return hold(cell.folder.with_name(f".{cell.name}.lock"), cell.folder)


def find_cell(plan: ExperimentPlan, name: str) -> Cell:
    """Return a cell by name. Raises RunFolderError with the nearest."""
    cells = {cell.name: cell for cell in plan.cells}
    if name not in cells:
        raise RunFolderError(f"there is no cell {name!r}{suggest(name, cells)}; there are: {', '.join(cells)}")
    return cells[name]


def finish_experiment(plan: ExperimentPlan, language: Literal["en", "ko"], say: Say) -> Outcome:
    """Compare the cells that are done, and write comparison.csv, comparison.md and report.html."""
    names = {str(cell.folder): cell.subject for cell in plan.cells if plan.is_done(cell)}
    if not names:
        return Outcome(plan.out)
    title = plan.experiment.title
    found: dict[str, Any] = {}
    try:
        found = compare_targets(list(names), names=names)
    except DataError as error:
        say(f"! nothing to compare: {error}")
    if found:
        write_text(plan.out / "comparison.csv", to_csv(found))
        write_text(plan.out / "comparison.md", to_markdown(found, language))
    report = None
    try:
        report = write_experiment_report(plan, names, language, getattr(title, language) or plan.experiment.name)
    except DataError as error:
        say(f"! no report: {error}")
    return Outcome(plan.out, found, report)


def write_experiment_report(
    plan: ExperimentPlan, names: dict[str, str], language: Literal["en", "ko"], title: str
) -> Path:
    """Write the experiment's page, with the command that does it again."""
    from koat.workflows.comparing.report import write_report

    command = shlex.join(["koat", "experiment", str(plan.out / FILE), "--out", str(plan.out)])
    return write_report(
        list(names), plan.out / "report.html", language=language, title=title, names=names, reproduce=[command]
    )
