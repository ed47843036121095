"""koat from Python: the same workflows as on the command line, with the same names and defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as ListLike
from functools import partial
from pathlib import Path
from typing import Any, Literal

from koat.core.config import Layer, resolve
from koat.core.run_folder import RunFolder
from koat.core.settings import ModelSettings
from koat.training.loop import StepRecord
from koat.workflows.ask import Writing, ask_model, choose_form
from koat.workflows.comparing.compare import compare_targets
from koat.workflows.comparing.report import write_report as write_page
from koat.workflows.config import PlanConfig, RunConfig, resolve_run
from koat.workflows.evaluating.evaluate import Subject, evaluate_subject, open_subject
from koat.workflows.experiment.file import load_experiment
from koat.workflows.experiment.jobs import run_in_processes
from koat.workflows.experiment.plan import plan_experiment
from koat.workflows.experiment.run import Outcome, Watch, run_experiment
from koat.workflows.planning.plan import Plan, plan_run
from koat.workflows.sharing.merge import Merge, merge_run
from koat.workflows.training.finetune import finetune_run


def finetune(
    settings: Mapping[str, Any] | None = None,
    *,
    out: str | Path,
    recipe: str | None = None,
    config: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_step: Callable[[StepRecord], None] = lambda record: None,
) -> RunFolder:
    """Fine-tune a base model; `settings` is nested as in a YAML file (`koat settings` lists them).

    Returns the run folder. Raises KoatError for what the caller can mend.
    """
    file = Path(config) if config else Path(out) / "config.yaml" if resume and settings is None else None
    resolved = resolve_run(RunConfig, recipe=recipe, file=file, flags=settings)
    return finetune_run(resolved, Path(out), resume=resume, overwrite=overwrite, on_step=on_step)


def load(target: str | Path, model: Mapping[str, Any] | None = None) -> Subject:
    """Load a run folder, a PEFT adapter folder or a base model, ready for `evaluate`.

    `model` overrides how the base is loaded, for example {"device": "cpu"}.
    """
    settings = resolve(ModelSettings, [Layer("flag", {"base": "", **model})]).settings if model else None
    return open_subject(str(target), settings)


def ask(
    target: str | Path | Subject,
    *questions: str,
    template: str | None = None,
    fields: Mapping[str, str] | None = None,
    model: Mapping[str, Any] | None = None,
    **writing: Any,
) -> list[str]:
    """Return what a model answers to each question, in the words it was trained with.

    `target` is as for `load`, or what `load` returned. `fields` are the template's other fields (a `context`), and
    `writing` those of `koat.workflows.ask.Writing`: max_new_tokens, temperature, top_p, seed, until.
    """
    subject = target if isinstance(target, Subject) else load(target, model)
    answers = ask_model(subject, questions, choose_form(subject, template, fields or {}), Writing(**writing))
    return [answer.text for answer in answers]


def evaluate(
    target: str | Path | Subject,
    *,
    tasks: ListLike[str],
    data: str | Path | None = None,
    shots: str | Path | None = None,
    data_dir: str | Path | None = None,
    include_path: str | Path | None = None,
    num_shots: int | None = None,
    limit: int | str | None = None,
    seed: int | None = None,
    chat_template: bool = False,
    model: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluate on tasks and return scores with intervals, contracts and conditions; predictions are kept.

    `target` is as for `load`, or what `load` returned. A task is one of koat's own (`data` holds its items), or any
    of lm-evaluation-harness (`data_dir` holds the files of its `local_` variants).
    """
    subject = target if isinstance(target, Subject) else load(target, model)
    data, shots = (None if path is None else str(path) for path in (data, shots))
    return evaluate_subject(
        subject, tasks, data, shots, data_dir=data_dir, include_path=include_path, num_shots=num_shots, limit=limit,
        seed=seed, chat_template=chat_template,
    )  # fmt: skip


def merge(
    target: str | Path,
    *,
    out: str | Path,
    dtype: str = "auto",
    base: str | None = None,
    device: str = "cpu",
    overwrite: bool = False,
) -> Merge:
    """Merge a run's or PEFT's adapter into its base model and return the folder with the record of its check.

    Raises KoatError, and leaves nothing, when logits differ by more than rounding explains.
    """
    settings = ModelSettings(base=base) if base else None
    return merge_run(target, Path(out), dtype=dtype, settings=settings, device=device, overwrite=overwrite)


def plan(settings: Mapping[str, Any], *, recipe: str | None = None) -> Plan:
    """Plan a run from configurations alone: parameters, adapter size, memory."""
    return plan_run(resolve_run(PlanConfig, recipe=recipe, flags=settings).settings)


def compare(
    targets: ListLike[str | Path], *, only: ListLike[str] = (), names: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Compare runs, folders of scores and published tables, as `koat compare` does; the result is JSON-safe.

    `names` gives targets other names than their folders'. Raises KoatError when nothing may be compared.
    """
    return compare_targets([str(target) for target in targets], only, names)


def write_report(
    targets: ListLike[str | Path],
    *,
    out: str | Path = "report.html",
    language: Literal["en", "ko"] = "en",
    title: str = "",
    names: Mapping[str, str] | None = None,
    only: ListLike[str] = (),
) -> Path:
    """Write a self-contained HTML page about runs, folders of scores and published tables, as `koat report` does.

    Returns `out`. Raises KoatError when a target cannot be read.
    """
    places = [str(target) for target in targets]
    return write_page(places, Path(out), language=language, title=title, names=names, only=only)


def experiment(
    file: str | Path,
    *,
    out: str | Path,
    inputs: Mapping[str, str | Path] | None = None,
    settings: Mapping[str, Any] | None = None,
    jobs: int = 1,
    overwrite: ListLike[str] = (),
    language: Literal["en", "ko"] = "en",
    watch: Watch | None = None,
) -> Outcome:
    """Run an experiment as far as it is missing and return where it is, its comparison and its report.

    `file` is a name that ships or a YAML file; `inputs` are what it asks for; `settings` is nested, `{"model":
    {"base": ...}, "ia3": {"training": ...}, "seeds": [0, 1]}`. Raises TrainingError at the end when cells failed.
    """
    given = {name: str(value) for name, value in (inputs or {}).items()}
    plan = plan_experiment(load_experiment(str(file), given, settings), Path(out), overwrite=overwrite)
    several = partial(run_in_processes, jobs=jobs, overwrite=overwrite) if jobs > 1 else None
    return run_experiment(plan, overwrite=overwrite, language=language, watch=watch, run_cells=several)
