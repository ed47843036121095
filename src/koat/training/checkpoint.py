"""Checkpoints from which training goes on exactly: tensors (safetensors) and JSON, never pickles."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from koat.adapters.attach import Attached, read_adapter_state, write_adapter_state
from koat.core.atomic import atomic_folder
from koat.core.errors import RunFolderError
from koat.training.optimizer import flatten_optimizer, restore_optimizer


@dataclass
class TrainingState:
    """Where a run stands, apart from its tensors."""

    step: int = 0
    tokens: int = 0
    unique_tokens: int = 0
    seconds: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None
    best: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """The adapter with the lowest validation loss so far."""

    def count_step(self, tokens: int, unique_tokens: int, seconds: float) -> None:
        """Count one more step, and what it took."""
        self.step += 1
        self.tokens += tokens
        self.unique_tokens += unique_tokens
        self.seconds += seconds


def save_checkpoint(
    folder: Path, model: Attached, optimizer: torch.optim.Optimizer, state: TrainingState, keep: int
) -> Path:
    """Write a checkpoint whole or not at all, then remove all but the newest `keep`."""
    path = folder / f"step-{state.step:06d}"
    facts = {each.name: getattr(state, each.name) for each in fields(state) if each.name != "best"}
    with atomic_folder(path) as draft:
        save_file(read_adapter_state(model), draft / "adapter.safetensors")
        save_file(flatten_optimizer(optimizer), draft / "optimizer.safetensors")
        if state.best:
            save_file(state.best, draft / "best.safetensors")
        (draft / "done.json").write_text(json.dumps(facts), encoding="utf-8")
    for old in sorted(folder.glob("step-*"), key=lambda path: (len(path.name), path.name))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def load_checkpoint(path: Path, model: Attached, optimizer: torch.optim.Optimizer) -> TrainingState:
    """Put model and optimizer back and return where the run stood; a step's random numbers come from its number."""
    try:
        facts = json.loads((path / "done.json").read_text(encoding="utf-8"))
        write_adapter_state(model, load_file(path / "adapter.safetensors"))
        restore_optimizer(optimizer, load_file(path / "optimizer.safetensors"))
        best = load_file(path / "best.safetensors") if (path / "best.safetensors").is_file() else {}
        return TrainingState(**facts, best=best)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise RunFolderError(
            f"The checkpoint {path} cannot be read ({error}). Remove it to use the one before."
        ) from error
