"""From settings to what training starts with: examples, base model with its adapter, layout, manifest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from koat.adapters.attach import Attached, attach_adapter, count_trainable
from koat.adapters.remarks import describe_remarks
from koat.adapters.soft_prompts import count_virtual_tokens
from koat.adapters.start import find_adapter, start_from
from koat.core.config import Section, to_mapping
from koat.core.errors import AdapterError, TrainingError
from koat.core.settings import ModelSettings, TrainingSettings
from koat.forest.choose import choose_layout
from koat.forest.score import Layout, unwrap
from koat.forest.verify import Verification
from koat.model import (
    count_parameters,
    find_commit,
    find_context_length,
    fingerprint_base,
    load_config,
    load_model,
    load_tokenizer,
    pick_precision,
)
from koat.quantise.check import check_quantised_layers
from koat.workflows.config import PlanConfig, RunConfig
from koat.workflows.out_of_memory import TO_TRAIN, explain_out_of_memory
from koat.workflows.trained import fingerprint_adapter, settle_base
from koat.workflows.training.examples import Examples, check_vocabulary, load_examples
from koat.workflows.training.manifest import describe_hardware, describe_versions, fingerprint_data

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Prepared:
    """What training starts with, and what the run's manifest says of it."""

    tokenizer: Any
    examples: Examples
    model: Attached
    layout: Layout
    manifest: dict[str, Any]


@explain_out_of_memory(TrainingError, "before training began", TO_TRAIN)
def prepare_run(config: RunConfig, model_settings: ModelSettings, say: Say) -> Prepared:
    """Read the data, load the base, attach the adapter and verify the layout, saying what was found."""
    tokenizer, base_config = load_tokenizer(config.model), load_config(config.model)
    context, training = find_context_length(base_config), config.training
    room = find_text_room(config.adapter, context, say)
    examples = load_examples(config.data, tokenizer, room, training.seed, with_choices=training.wants_choices)
    check_vocabulary(examples, tokenizer, base_config)
    for remark in [*describe_remarks(config.adapter, base_config), *examples.remarks]:
        say(f"! {remark}")
    for part, report in examples.reports.items():
        for line in report.lines():
            say(f"{part}: {line}")
    base = load_model(model_settings)
    num_base, quantised = count_parameters(base), check_quantised_layers(base)
    model = attach_method(base, config)
    layout, verification = choose_layout(model, config.model, pick_precision(training, unwrap(model).device))
    say(describe_layout(layout, verification))
    method, trained = config.adapter.method, count_trainable(model)
    say(f"{method}: {trained:,} of {num_base:,} parameters are trained ({trained / num_base:.3%})")
    if config.training.activation_checkpointing:
        enable_checkpointing(model, config.training.activation_offload)
    manifest = describe_run(config, model, num_base, base_config, verification, examples)
    manifest["quantisation"] = quantised.to_mapping() if quantised else None
    return Prepared(tokenizer, examples, model, layout, manifest)


def find_text_room(adapter: Section, context: int | None, say: Say) -> int | None:
    """Return how many tokens of a context are left for text beside a soft prompt, saying so where there is one.

    Raises AdapterError where none are.
    """
    taken = count_virtual_tokens(adapter)
    if not taken or context is None:
        return context
    if taken >= context:
        raise AdapterError(
            f"adapter.num_virtual_tokens={taken} leaves no room for text: the base model sees {context} tokens at "
            "once. Take fewer."
        )
    say(f"{taken} of the base model's {context:,} tokens are the soft prompt's; {context - taken:,} are left for text")
    return context - taken


def attach_method(base: nn.Module, config: RunConfig) -> Attached:
    """Attach a fresh adapter, or the one that the run goes on from."""
    model = attach_adapter(base, config.adapter, config.training.seed)
    start: str | None = getattr(config.adapter, "start", None)
    if start:
        start_from(model, Path(start))  # type: ignore[arg-type]  # methods with a start are all PEFT's
    return model


def fingerprint_start(adapter: Section) -> str | None:
    """Return the SHA-256 of the adapter that a run begins from, None where it begins afresh."""
    start: str | None = getattr(adapter, "start", None)
    return fingerprint_adapter(find_adapter(Path(start))) if start else None


def describe_layout(layout: Layout, verification: Verification) -> str:
    """Say in a sentence how sequences go through the model."""
    if verification.shares:
        return (
            f"forest verified: log-probabilities differ from single sequences by {verification.difference:.1g} "
            f"(padding alone: {verification.noise:.1g}); every shared prefix is computed once"
        )
    instead = "one sequence at a time" if layout.alone else "padded batches of similar length"
    return f"prefixes are not shared ({verification.reason}); running {instead}"


def enable_checkpointing(model: nn.Module, offload: bool = False) -> None:
    """Recompute each layer in the backward pass; with `offload` its input waits for that in the CPU's memory."""
    unwrap(model).gradient_checkpointing_enable({"use_reentrant": False}, offload=offload)


def check_offload(training: TrainingSettings, device: torch.device) -> None:
    """Raise TrainingError where activations lie in the CPU's memory already: moving them would only take time."""
    if training.activation_offload and device.type == "cpu":
        raise TrainingError(
            "training.activation_offload moves activations from a GPU to the CPU's memory, and this run is on the CPU. "
            "Set training.activation_offload=false."
        )


def settle_paths(config: RunConfig | PlanConfig) -> dict[str, Any]:
    """Return the settings with local folders by their whole paths, so that the run goes on from anywhere."""
    values = to_mapping(config)
    values["model"]["base"] = settle_base(values["model"]["base"])
    start = values["adapter"].get("start")
    if start and Path(start).is_dir():
        values["adapter"]["start"] = str(Path(start).resolve())
    return values


def describe_run(
    config: RunConfig,
    model: Attached,
    num_base: int,
    base_config: Any,
    verification: Verification,
    examples: Examples,
) -> dict[str, Any]:
    """Return the manifest of a run that begins."""
    return {
        "finished": False,
        "method": config.adapter.method,
        "trainable_parameters": count_trainable(model),
        "total_parameters": num_base,
        "base": {
            "name": settle_paths(config)["model"]["base"],
            "fingerprint": fingerprint_base(config.model, base_config),
            "commit": find_commit(config.model, base_config),
        },
        "start": fingerprint_start(config.adapter),
        "seed": config.training.seed,
        "templates": [template.to_mapping() for template in examples.templates],
        "examples": {
            "train": len(examples.train),
            "validation": len(examples.validation),
            "groups": len({sequence.group for sequence in examples.train if sequence.group}),
        },
        "data": fingerprint_data(config.data.list_files()),
        "forest": verification.to_mapping(),
        "versions": describe_versions(),
        "hardware": describe_hardware(next(model.parameters()).device),
    }
