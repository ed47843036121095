"""Fine-tune: examples, base model, adapter, verification, training, run folder."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from pydantic import ValidationError
from torch import nn

from koat.adapters.attach import Attached, save_adapter
from koat.adapters.methods import check_combination
from koat.core.atomic import atomic_folder, write_json
from koat.core.config import Resolved
from koat.core.errors import ConfigError, RunFolderError, TrainingError
from koat.core.json_lines import append_line, truncate_lines
from koat.core.run_folder import RunFolder
from koat.core.settings import ModelSettings, TrainingSettings
from koat.data.prompts import PromptTemplate
from koat.model import pick_device, pick_precision, settle_dtype
from koat.training.loop import StepRecord, TrainingResult, measure_loss, train
from koat.training.optimizer import check_optimizer
from koat.workflows.config import RunConfig
from koat.workflows.measure import Cost
from koat.workflows.out_of_memory import TO_TRAIN, explain_out_of_memory
from koat.workflows.trained import TEMPLATE, pin_commit
from koat.workflows.training.prepare import Prepared, Say, check_offload, prepare_run, settle_paths


def finetune_run(
    resolved: Resolved[RunConfig],
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Say = lambda text: None,
    on_step: Callable[[StepRecord], None] = lambda record: None,
) -> RunFolder:
    """Fine-tune as `resolved` says and leave everything in the run folder `out`.

    Files and settings are checked before any weight is read. With `resume` the run in `out` goes on from its
    latest checkpoint, bit for bit as if it had not stopped. Raises KoatError for what a user can mend,
    another process that trains there included.
    """
    config: RunConfig = resolved.settings
    check_combination(config.adapter, config.model, config.training)
    model_settings = settle_dtype(config.model, config.training)
    accelerator = make_accelerator(model_settings, config.training)
    check_optimizer(config.training, accelerator.device)
    check_offload(config.training, accelerator.device)
    main = accelerator.is_main_process
    say = say if main else lambda text: None
    with hold_run(RunFolder(out), resume) if main else nullcontext():
        run = claim_run(config, out, resume, overwrite) if main else RunFolder(out)
        pinned = settle_resumed(config, run) if resume else config
        prepared = prepare_run(pinned, settle_dtype(pinned.model, pinned.training), say)
        began = time.time()
        if main:
            begin_run(run, config, prepared.manifest, resume, overwrite)
        accelerator.wait_for_everyone()

        with Cost(accelerator.device) as cost:
            result = train_in_folder(run, prepared, config.training, accelerator, resume, on_step)
        if main:
            save_result(run, prepared.model, prepared.tokenizer, prepared.examples.templates[0])
            ending = {**describe_result(result, cost), "started": began, "finished": True}
            run.write_manifest({**prepared.manifest, **ending})
        accelerator.wait_for_everyone()
    return run


def hold_run(run: RunFolder, resume: bool) -> AbstractContextManager[None]:
    """Keep other processes from training in a run's folder; what is no folder is left to `claim_run` to refuse."""
    nothing_to_hold = not run.path.is_dir() and (resume or run.path.exists())
    return nullcontext() if nothing_to_hold else run.hold()


def claim_run(config: RunConfig, out: Path, resume: bool, overwrite: bool) -> RunFolder:
    """Make an empty run folder, or open it to go on, refusing to go on under other settings.

    A run that is to be replaced stays until `begin_run`, when nothing can be wrong with the new one any more.
    """
    if not resume:
        return RunFolder.check_overwrite(out) if overwrite else RunFolder.create(out)
    run = RunFolder.open(out, require=("config.yaml",))
    if run.is_complete():
        raise RunFolderError(f"The run in {out} is finished; there is nothing to resume.")
    differing = list_differences(run.read_config(), settle_paths(config))
    if differing:
        raise ConfigError(
            f"The run in {out} was started with other settings: {', '.join(differing)}. "
            f"To go on with it, give `--resume {out}` alone; for new settings choose another --out."
        )
    return run


def list_differences(stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Return the dotted keys in which stored settings differ from those wanted; one not on record had its default."""
    stored = fill_defaults(stored)
    return sorted(
        f"{section}.{key}"
        for section in wanted
        for key in {*stored.get(section, {}), *wanted[section]}
        if stored.get(section, {}).get(key) != wanted[section].get(key)
    )


def fill_defaults(stored: dict[str, Any]) -> dict[str, Any]:
    """Return a stored configuration with the settings that came after it; one that is not whole stays as it is."""
    try:
        return settle_paths(RunConfig.model_validate(stored))
    except ValidationError:
        return stored


def settle_resumed(config: RunConfig, run: RunFolder) -> RunConfig:
    """Return the settings that a run goes on with.

    A base from the Hub is as it was when the run began; an adapter to start from is not asked for again where a
    checkpoint holds what became of it.
    """
    recorded = run.read_manifest().get("base") if run.manifest.exists() else None
    if recorded:
        config = config.model_copy(update={"model": pin_commit(config.model, recorded)})
    if run.latest_checkpoint() is not None and getattr(config.adapter, "start", None):
        config = config.model_copy(update={"adapter": config.adapter.model_copy(update={"start": None})})
    return config


def begin_run(run: RunFolder, config: RunConfig, manifest: dict[str, Any], resume: bool, overwrite: bool) -> None:
    """Write configuration and manifest. Raises RunFolderError when a resumed run's data or base has changed."""
    if overwrite and not resume:
        RunFolder.create(run.path, overwrite=True)
    if resume and run.manifest.exists():
        stored = run.read_manifest()
        manifest["start"] = manifest["start"] or stored.get("start")
        parts = [part for part in ("data", "base", "templates", "start") if part != "start" or part in stored]
        changed = [part for part in parts if has_changed(part, stored, manifest)]
        if changed:
            raise RunFolderError(
                f"The run in {run.path} cannot go on: its {' and '.join(changed)} changed since it began. "
                "Put back what it was trained on, or begin another run with another --out."
            )
    run.write_config(settle_paths(config))
    run.write_manifest(manifest)


def has_changed(part: str, stored: dict[str, Any], manifest: dict[str, Any]) -> bool:
    """Whether a part of a run's manifest is not what it was; another commit with the same weights is no other base."""
    before, now = stored.get(part), manifest[part]
    if part == "base" and isinstance(before, dict):
        return any(before.get(key) != now[key] for key in ("name", "fingerprint"))
    return bool(before != now)


def make_accelerator(model: ModelSettings, training: TrainingSettings) -> Accelerator:
    """Return the Accelerator; autocast only where a model held in float32 computes in bfloat16."""
    if not torch.distributed.is_initialized():
        # Accelerate keeps the first run's device and precision for the whole process, and refuses others.
        AcceleratorState._reset_state(reset_partial_state=True)
    device = pick_device(model.device)
    check_launch(device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # one process' Accelerator computes on the current one
    mixed = "bf16" if model.dtype == "float32" and pick_precision(training, device) == torch.bfloat16 else "no"
    return Accelerator(cpu=device.type == "cpu", mixed_precision=mixed)


def check_launch(device: torch.device) -> None:
    """Raise ConfigError where several processes were launched to train on one GPU by its number."""
    count = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
    if count > 1 and device.type == "cuda" and device.index is not None:
        raise ConfigError(
            f"model.device={device} puts all {count} processes that were launched on one GPU. Set model.device=cuda, "
            "and each takes its own."
        )


@explain_out_of_memory(TrainingError, "in training", TO_TRAIN)
def train_in_folder(
    run: RunFolder,
    prepared: Prepared,
    settings: TrainingSettings,
    accelerator: Accelerator,
    resume: bool,
    on_step: Callable[[StepRecord], None],
) -> TrainingResult:
    """Train with metrics and checkpoints in the run folder."""
    examples, layout = prepared.examples, prepared.layout
    latest = run.latest_checkpoint() if resume else None
    kept = int(latest.name.removeprefix("step-")) if latest else 0
    if resume and accelerator.is_main_process:
        truncate_lines(run.metrics, lambda line: int(line["step"]) <= kept)

    def record_step(record: StepRecord) -> None:
        if accelerator.is_main_process:
            append_line(run.metrics, {key: value for key, value in asdict(record).items() if value is not None})
            on_step(record)

    def validate(model: nn.Module) -> float:
        return measure_loss(model, examples.validation, layout, settings, accelerator)

    return train(
        prepared.model,
        examples.train,
        layout,
        settings,
        accelerator=accelerator,
        checkpoints=run.checkpoints,
        resume_from=latest,
        validate=validate if examples.validation else None,
        on_step=record_step,
    )


def save_result(run: RunFolder, model: Attached, tokenizer: Any, template: PromptTemplate) -> None:
    """Write the adapter with its tokenizer and prompt template beside it, whole or not at all."""
    with atomic_folder(run.adapter) as draft:
        save_adapter(model, draft)
        tokenizer.save_pretrained(str(draft))
        write_json(draft / TEMPLATE, template.to_mapping())


def describe_result(result: TrainingResult, cost: Cost) -> dict[str, Any]:
    """Return what a finished run adds to its manifest."""
    state = result.state
    return {
        "result": {
            "steps": state.step,
            "kept_step": result.kept_step,
            "last_training_loss": result.last_loss,
            "best_validation_loss": state.best_loss,
            "tokens": state.tokens,
            "unique_tokens": state.unique_tokens,
            "training_seconds": round(state.seconds, 3),
            "wall_seconds": round(cost.seconds, 3),
            "peak_bytes": cost.peak_bytes,
        }
    }
