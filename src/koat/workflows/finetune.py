"""Fine-tune: examples, base model, adapter, verification, training, run folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import PeftModel
from torch import nn

from koat.adapters.attach import attach_adapter, count_trainable, save_adapter
from koat.adapters.methods import check_combination
from koat.adapters.remarks import describe_remarks
from koat.adapters.start import start_from
from koat.core.atomic import atomic_folder, write_json
from koat.core.config import Resolved, to_mapping
from koat.core.errors import ConfigError, RunFolderError
from koat.core.json_lines import append_line, truncate_lines
from koat.core.run_folder import RunFolder
from koat.core.settings import ModelSettings, TrainingSettings
from koat.data.prompts import PromptTemplate
from koat.forest.score import Layout
from koat.forest.verify import Verification, make_padded, verify_layout
from koat.model import (
    count_parameters,
    find_context_length,
    fingerprint_base,
    load_config,
    load_model,
    load_tokenizer,
    pick_device,
    settle_dtype,
)
from koat.quantise.check import check_quantised_layers
from koat.training.loop import StepRecord, TrainingResult, measure_loss, train
from koat.training.optimizer import check_optimizer
from koat.workflows.config import RunConfig
from koat.workflows.examples import Examples, load_examples
from koat.workflows.manifest import describe_hardware, describe_versions, fingerprint_data
from koat.workflows.measure import Cost

Say = Callable[[str], None]


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
    latest checkpoint, bit for bit as if it had not stopped. Raises KoatError for what a user can mend.
    """
    config: RunConfig = resolved.settings
    check_combination(config.adapter, config.model, config.training)
    model_settings = settle_dtype(config.model, config.training)
    accelerator = make_accelerator(model_settings, config.training)
    check_optimizer(config.training, accelerator.device)
    main = accelerator.is_main_process
    say = say if main else lambda text: None
    run = claim_run(config, out, resume, overwrite) if main else RunFolder(out)
    tokenizer, base_config = load_tokenizer(config.model), load_config(config.model)
    examples = load_examples(config.data, tokenizer, find_context_length(base_config), config.training.seed)
    for remark in [*describe_remarks(config.adapter, base_config), *examples.remarks]:
        say(f"! {remark}")
    for part, report in examples.reports.items():
        for line in report.lines():
            say(f"{part}: {line}")

    base = load_model(model_settings)
    num_base, quantised = count_parameters(base), check_quantised_layers(base)
    model = attach_method(base, config)
    layout, verification = choose_layout(model, config.model)
    say(describe_layout(verification))
    say(
        f"{config.adapter.method}: {count_trainable(model):,} of {num_base:,} parameters are trained "
        f"({count_trainable(model) / num_base:.3%})"
    )
    if config.training.activation_checkpointing:
        enable_checkpointing(model)
    began = time.time()
    manifest = describe_run(config, model, base_config, verification, examples)
    manifest["quantisation"] = quantised.to_mapping() if quantised else None
    if main:
        begin_run(run, config, manifest, resume, overwrite)
    accelerator.wait_for_everyone()

    with Cost(accelerator.device) as cost:
        result = train_in_folder(run, model, examples, layout, config.training, accelerator, resume, on_step)
    if main:
        save_result(run, model, tokenizer, examples.templates[0])
        run.write_manifest({**manifest, **describe_result(result, cost), "started": began, "finished": True})
    accelerator.wait_for_everyone()
    return run


def claim_run(config: RunConfig, out: Path, resume: bool, overwrite: bool) -> RunFolder:
    """Make an empty run folder, or open it to go on, refusing to go on under other settings.

    A run that is to be replaced stays until `begin_run`, when nothing can be wrong with the new one any more.
    """
    if not resume:
        return RunFolder(out) if overwrite else RunFolder.create(out)
    run = RunFolder.open(out, require=("config.yaml",))
    if run.is_complete():
        raise RunFolderError(f"The run in {out} is finished; there is nothing to resume.")
    stored, wanted = run.read_config(), settle_paths(config)
    differing = sorted(
        f"{section}.{key}"
        for section in wanted
        for key in {*stored.get(section, {}), *wanted[section]}
        if stored.get(section, {}).get(key) != wanted[section].get(key)
    )
    if differing:
        raise ConfigError(
            f"The run in {out} was started with other settings: {', '.join(differing)}. "
            f"To go on with it, give `--resume {out}` alone; for new settings choose another `out`."
        )
    return run


def begin_run(run: RunFolder, config: RunConfig, manifest: dict[str, Any], resume: bool, overwrite: bool) -> None:
    """Write configuration and manifest. Raises RunFolderError when a resumed run's data or base has changed."""
    if overwrite and not resume:
        RunFolder.create(run.path, overwrite=True)
    if resume and run.manifest.exists():
        stored = run.read_manifest()
        changed = [part for part in ("data", "base", "templates") if stored.get(part) != manifest[part]]
        if changed:
            raise RunFolderError(
                f"The run in {run.path} cannot go on: its {' and '.join(changed)} changed since it began. "
                "Put back what it was trained on, or begin another run with another `out`."
            )
    run.write_config(settle_paths(config))
    run.write_manifest(manifest)


def settle_paths(config: RunConfig) -> dict[str, Any]:
    """Return the settings with a local base by its whole path, so that the run is found from anywhere."""
    values = to_mapping(config)
    if Path(config.model.base).is_dir():
        values["model"]["base"] = str(Path(config.model.base).resolve())
    return values


def make_accelerator(model: ModelSettings, training: TrainingSettings) -> Accelerator:
    """Return the Accelerator; autocast only where float32 weights are trained in bfloat16."""
    if not torch.distributed.is_initialized():
        # Accelerate keeps the first run's device and precision for the whole process, and refuses others.
        AcceleratorState._reset_state(reset_partial_state=True)
    mixed = "bf16" if model.dtype == "float32" and training.precision == "bfloat16" else "no"
    return Accelerator(cpu=pick_device(model.device).type == "cpu", mixed_precision=mixed)


def attach_method(base: nn.Module, config: RunConfig) -> PeftModel:
    """Attach a fresh adapter, or the one that the run goes on from."""
    model = attach_adapter(base, config.adapter, config.training.seed)
    start: str | None = getattr(config.adapter, "start", None)
    if start:
        start_from(model, Path(start))
    return model


def choose_layout(model: nn.Module, settings: ModelSettings) -> tuple[Layout, Verification]:
    """Verify the model and return the layout to use; `padded` is taken at its word."""
    layout, verification = verify_layout(model, settings.attention)
    if settings.layout == "padded" and layout.shares:
        from dataclasses import replace

        padded = make_padded(model.config, verification.split_head)
        return padded, replace(verification, shares=False, reason="model.layout=padded")
    if settings.layout == "forest" and not layout.shares:
        raise ConfigError(
            f"model.layout=forest was asked for, but prefixes cannot be shared exactly here: {verification.reason}. "
            "Use model.layout=auto."
        )
    return layout, verification


def describe_layout(verification: Verification) -> str:
    """Say in a sentence how sequences go through the model."""
    if verification.shares:
        return (
            f"forest verified: log-probabilities differ from single sequences by {verification.difference:.1g} "
            f"(padding alone: {verification.noise:.1g}); every shared prefix is computed once"
        )
    return f"prefixes are not shared ({verification.reason}); running padded batches of similar length"


def enable_checkpointing(model: PeftModel) -> None:
    """Recompute each layer in the backward pass."""
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]


def describe_run(
    config: RunConfig, model: PeftModel, base_config: Any, verification: Verification, examples: Examples
) -> dict[str, Any]:
    """Return the manifest of a run that begins."""
    return {
        "finished": False,
        "method": config.adapter.method,
        "trainable_parameters": count_trainable(model),
        "total_parameters": count_parameters(model.get_base_model()) - sum(
            p.numel() for p in model.get_base_model().parameters() if p.requires_grad
        ),
        "base": {
            "name": settle_paths(config)["model"]["base"],
            "fingerprint": fingerprint_base(config.model, base_config),
        },
        "seed": config.training.seed,
        "templates": [template.to_mapping() for template in examples.templates],
        "examples": {"train": len(examples.train), "validation": len(examples.validation)},
        "data": fingerprint_data([*config.data.train, *config.data.validation]),
        "forest": verification.to_mapping(),
        "versions": describe_versions(),
        "hardware": describe_hardware(next(model.parameters()).device),
    }  # fmt: skip


def train_in_folder(
    run: RunFolder,
    model: PeftModel,
    examples: Examples,
    layout: Layout,
    settings: TrainingSettings,
    accelerator: Accelerator,
    resume: bool,
    on_step: Callable[[StepRecord], None],
) -> TrainingResult:
    """Train with metrics and checkpoints in the run folder."""
    latest = run.latest_checkpoint() if resume else None
    kept = int(latest.name.removeprefix("step-")) if latest else 0
    if resume and accelerator.is_main_process:
        truncate_lines(run.metrics, lambda line: int(line["step"]) <= kept)

    def record_step(record: StepRecord) -> None:
        if accelerator.is_main_process:
            append_line(run.metrics, {key: value for key, value in asdict(record).items() if value is not None})
            on_step(record)

    def validate(model: nn.Module) -> float:
        return measure_loss(model, examples.validation, layout, settings.tokens_per_microbatch, accelerator)

    return train(
        model,
        examples.train,
        layout,
        settings,
        accelerator=accelerator,
        checkpoints=run.checkpoints,
        resume_from=latest,
        validate=validate if examples.validation else None,
        on_step=record_step,
    )


def save_result(run: RunFolder, model: PeftModel, tokenizer: Any, template: PromptTemplate) -> None:
    """Write the adapter with its tokenizer and prompt template beside it, whole or not at all."""
    with atomic_folder(run.adapter) as draft:
        save_adapter(model, draft)
        tokenizer.save_pretrained(str(draft))
        write_json(draft / "prompt_template.json", template.to_mapping())


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
