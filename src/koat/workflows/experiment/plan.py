"""From an experiment's file to its cells: one for each base, variant and seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from koat.adapters.attach import attach_adapter, count_trainable
from koat.adapters.methods import check_combination
from koat.core.config import Layer
from koat.core.errors import ConfigError, KoatError
from koat.model import build_empty, fingerprint_base, load_config, locate_base
from koat.workflows.config import PlanConfig, RunConfig, read_recipe, resolve_layers
from koat.workflows.experiment.cells import Cell, ExperimentPlan
from koat.workflows.experiment.checks import check_plan, explain_changes
from koat.workflows.experiment.file import Experiment, Variant


def plan_experiment(experiment: Experiment, out: Path, *, overwrite: Sequence[str] = ()) -> ExperimentPlan:
    """Lay out an experiment's cells and check all that can be checked before any weight is read.

    Raises ConfigError with all problems of all cells, and for a cell on disk that was made otherwise, unless it is
    to be replaced (`overwrite`, by name).
    """
    problems: dict[str, list[str]] = {}
    cells: list[Cell] = []
    for name, subject, layers, variant in list_models(experiment):
        try:
            cells += make_cells(experiment, out, name, subject, layers, variant)
        except KoatError as error:
            problems.setdefault(str(error), []).append(subject)
    listed = [f"{', '.join(names)}: {text}" for text, names in problems.items()]
    plan = ExperimentPlan(experiment, out, cells)
    listed += check_plan(plan, overwrite)
    if listed:
        lines = [text.replace("\n", "\n  ") for text in listed]
        raise ConfigError("\n  ".join([f"experiment {experiment.name}:", *lines]))
    plan = replace(plan, cells=fingerprint_bases(cells))
    if changed := [cell for cell in plan.cells if cell.name not in overwrite and cell.list_differences()]:
        raise ConfigError(explain_changes(out, changed))
    return plan


def list_models(experiment: Experiment) -> Iterator[tuple[str, str, list[Layer], Variant]]:
    """Yield (name, subject, layers of settings, variant) for each variant on each base."""
    for base, model in experiment.bases.items() or [("", {})]:
        for variant in experiment.variants:
            several = len(experiment.bases) > 1
            layers = [
                Layer("settings", experiment.settings),
                Layer(f"base {base}", {"model": model}),
                Layer("variant", variant.settings),
            ]
            yield (
                f"{base}-{variant.name}" if several else variant.name,
                f"{variant.name} on {base}" if several else variant.name,
                layers,
                variant,
            )


def make_cells(
    experiment: Experiment, out: Path, name: str, subject: str, layers: list[Layer], variant: Variant
) -> Iterator[Cell]:
    """Yield the cells of one variant on one base."""
    given = [Layer("recipe", read_recipe(experiment.recipe))] if experiment.recipe else []
    given += layers
    if any("seed" in (layer.values.get("training") or {}) for layer in given):
        raise ConfigError("training.seed: an experiment's seeds are given by `seeds`, for example seeds=[0,1,2]")
    if not variant.train:
        yield Cell(name, subject, out / "runs" / name, resolve_layers(PlanConfig, given), None)
        return
    for seed in dict.fromkeys(variant.seeds or experiment.seeds):
        resolved = resolve_layers(RunConfig, [*given, Layer("seeds", {"training": {"seed": seed}})])
        config = resolved.settings
        check_combination(config.adapter, config.model, config.training)
        yield Cell(f"{name}-seed{seed}", subject, out / "runs" / f"{name}-seed{seed}", resolved, seed)


def fingerprint_bases(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells with the fingerprints of their bases, each base read once; one on the Hub has none."""
    models = {(cell.model.base, cell.model.revision): cell.model for cell in cells}
    found = {
        key: fingerprint_base(model, load_config(model)) if Path(locate_base(model.base)).is_dir() else None
        for key, model in models.items()
    }
    return [replace(cell, fingerprint=found[cell.model.base, cell.model.revision]) for cell in cells]


def describe_cells(plan: ExperimentPlan) -> list[dict[str, Any]]:
    """Return each cell's name, base, method, trained parameters and state, as plain values."""
    counts: dict[str, int] = {}
    rows = []
    for cell in plan.cells:
        config = cell.resolved.settings
        if cell.subject not in counts:
            counts[cell.subject] = count_planned(config) if cell.seed is not None else 0
        num_missing = len(plan.list_missing(cell))
        rows.append(
            {
                "cell": cell.name, "subject": cell.subject, "base": cell.model.base, "seed": cell.seed,
                "method": config.adapter.method if cell.seed is not None else None,
                "trainable_parameters": counts[cell.subject],
                "training": "" if cell.seed is None else "done" if cell.is_trained()
                else "begun" if cell.is_begun() else "missing",
                "num_evaluated": len(plan.evaluations) - num_missing, "num_evaluations": len(plan.evaluations),
            }
        )  # fmt: skip
    return rows


def count_planned(config: RunConfig | PlanConfig) -> int:
    """Return how many parameters a run will train, from configurations alone."""
    return count_trainable(attach_adapter(build_empty(load_config(config.model)).requires_grad_(False), config.adapter))
