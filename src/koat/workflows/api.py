"""koat from Python: the same workflows as on the command line, with the same names and defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as ListLike
from pathlib import Path
from typing import Any

from koat.core.config import Layer, resolve
from koat.core.run_folder import RunFolder
from koat.core.settings import ModelSettings
from koat.training.loop import StepRecord
from koat.workflows.config import PlanConfig, RunConfig, resolve_run
from koat.workflows.evaluate import Subject, evaluate_subject, open_subject
from koat.workflows.finetune import finetune_run
from koat.workflows.merge import Merge, merge_run
from koat.workflows.plan import Plan, plan_run


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


def evaluate(
    target: str | Path | Subject,
    *,
    tasks: ListLike[str],
    data: str | Path,
    shots: str | Path | None = None,
    num_shots: int | None = None,
    limit: int | str | None = None,
    seed: int | None = None,
    model: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluate on tasks and return scores with intervals, contracts and conditions; predictions are kept.

    `target` is as for `load`, or what `load` returned.
    """
    subject = target if isinstance(target, Subject) else load(target, model)
    shots = str(shots) if shots is not None else None
    return evaluate_subject(subject, tasks, str(data), shots, num_shots=num_shots, limit=limit, seed=seed)


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
