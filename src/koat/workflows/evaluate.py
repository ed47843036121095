"""Evaluate: a base model, a run of koat's, or an adapter that PEFT saved, on one or more tasks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from collections.abc import Sequence as ListLike
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from koat.adapters.attach import restore_adapter
from koat.core.atomic import write_json, write_text
from koat.core.settings import ModelSettings
from koat.evaluation.evaluate import TaskResult, evaluate_task
from koat.evaluation.task import Task, adjust_task, load_task
from koat.forest.score import Layout
from koat.forest.verify import Verification, verify_layout
from koat.model import load_model, load_tokenizer
from koat.quantise.check import QuantisedCheck, check_quantised_layers
from koat.workflows.measure import Cost
from koat.workflows.trained import find_trained, is_trained

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Subject:
    """What is evaluated: a model ready to run, and where its predictions belong."""

    name: str
    model: nn.Module
    tokenizer: Any
    layout: Layout
    verification: Verification
    predictions: Path
    quantised: QuantisedCheck | None = None


def open_subject(target: str, settings: ModelSettings | None = None, out: Path | None = None) -> Subject:
    """Load what `target` names: a run folder, a PEFT adapter folder, or a base model.

    `settings` says how the base is loaded; for an adapter its `base` overrides the one on record. Raises
    KoatError when something is missing or does not fit.
    """
    if is_trained(Path(target)):
        trained = find_trained(target, settings)
        return load_subject(trained.name, trained.model, trained.folder, out or trained.predictions)
    settings = with_base(settings, target)
    name = re.sub(r"[^\w.-]+", "-", target).strip("-.") or "base"
    return load_subject(name, settings, None, out or Path("evaluations") / name)


def with_base(settings: ModelSettings | None, base: str) -> ModelSettings:
    """Return the settings with `base` filled in."""
    if settings is None:
        return ModelSettings(base=base)
    return settings.model_copy(update={"base": base})


def load_subject(name: str, settings: ModelSettings, adapter: Path | None, predictions: Path) -> Subject:
    """Load a base model with or without an adapter and verify how sequences go through it."""
    tokenizer = load_tokenizer(settings)
    model: nn.Module = load_model(settings)
    quantised = check_quantised_layers(model)
    if adapter is not None:
        model = restore_adapter(model, adapter).eval()
    layout, verification = verify_layout(model, settings.attention)
    return Subject(name, model, tokenizer, layout, verification, predictions, quantised)


def evaluate_subject(
    subject: Subject,
    tasks: ListLike[str],
    data: str,
    shots: str | None,
    *,
    num_shots: int | None = None,
    limit: int | str | None = None,
    seed: int | None = None,
    token_budget: int = 8192,
    precision: str = "auto",
    on_progress: OnProgress = lambda task, done, total: None,
) -> dict[str, Any]:
    """Evaluate one model on several tasks, keep every prediction, and return all scores as a mapping."""
    adjusted = [adjust_task(load_task(name), num_shots=num_shots, limit=limit, seed=seed) for name in tasks]
    results = []
    for task in adjusted:
        with Cost(next(subject.model.parameters()).device) as cost, compute_in(precision, subject.model):
            found = evaluate_task(
                subject.model,
                subject.layout,
                subject.tokenizer,
                task,
                data,
                shots,
                token_budget=token_budget,
                on_progress=report_for(task, on_progress),
            )
        summary = {key: value for key, value in found.to_mapping().items() if key != "predictions"}
        summary |= {"task": task.name, "num_shots": task.num_shots, "shot_seed": task.shot_seed}
        results.append({**summary, "peak_bytes": cost.peak_bytes})
        keep_predictions(subject, task, found)
    report: dict[str, Any] = {"subject": subject.name, "forest": subject.verification.to_mapping(), "results": results}
    report["quantisation"] = subject.quantised.to_mapping() if subject.quantised else None
    stem = "-".join(dict.fromkeys(task_stem(task) for task in adjusted))
    write_json(subject.predictions / f"{stem[:100]}.scores.json", report)
    return report


def report_for(task: Task, on_progress: OnProgress) -> Callable[[int, int], None]:
    """Return a progress callback that knows its task."""
    return lambda done, total: on_progress(task.name, done, total)


def compute_in(precision: str, model: nn.Module) -> AbstractContextManager[Any]:
    """Return a context that computes in bfloat16 when that is asked for, else nothing."""
    device = next(model.parameters()).device.type
    return torch.autocast(device, torch.bfloat16) if precision == "bfloat16" else nullcontext()


def task_stem(task: Task) -> str:
    """Return a file name that tells a task's variants apart."""
    return f"{task.name}-{task.num_shots}shot-seed{task.shot_seed}"


def keep_predictions(subject: Subject, task: Task, found: TaskResult) -> None:
    """Write every prediction as a JSON line, with the contracts they stand under."""
    contracts = {scoring: parts.hash for scoring, parts in found.contracts.items()}
    lines = [json.dumps({**row, "contracts": contracts}, ensure_ascii=False) for row in found.predictions]
    write_text(subject.predictions / f"{task_stem(task)}.jsonl", "\n".join(lines) + "\n")
