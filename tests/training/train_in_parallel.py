"""One process of a data-parallel run on the CPU: trains tiny adapters and writes what it reached.

Run by `test_parallel.py`, once per process, with the variables that a launcher sets.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import save_file

from koat.adapters.attach import attach_adapter, read_adapter_state
from koat.adapters.methods import Ia3Settings, LoraSettings
from koat.core.settings import TrainingSettings
from koat.forest.verify import verify_layout
from koat.training.loop import train
from tests.conftest import build_model, draw_sequences

CASES = {"even": 4, "uneven": 5, "one has nothing": 1}
"""Batch sizes, by what two processes make of them."""
METHODS = {"ia3": Ia3Settings(), "lora": LoraSettings(r=4)}


def train_all(folder: Path) -> None:
    """Train every method with every batch size and write adapters and losses into a folder."""
    accelerator = Accelerator(cpu=True)
    sequences = draw_sequences("shared") + draw_sequences("unrelated")
    layout, _ = verify_layout(build_model("llama"))
    losses: dict[str, list[float]] = {}
    for case, batch_size in CASES.items():
        for method, adapter in METHODS.items():
            model = attach_adapter(build_model("llama"), adapter)
            settings = TrainingSettings(batch_size=batch_size, max_steps=6, learning_rate=3e-3, sampler="shuffled")
            records: list[Any] = []
            train(model, sequences, layout, settings, accelerator=accelerator, on_step=records.append)
            losses[f"{method}, {case}"] = [record.loss for record in records]
            name = f"{method}, {case}, {accelerator.process_index}.safetensors"
            save_file(read_adapter_state(model), folder / name)
    (folder / f"losses {accelerator.process_index}.json").write_text(json.dumps(losses))
    accelerator.end_training()


def train_with_noise(folder: Path) -> None:
    """Train with dropout and noise in one go, then again from the middle, and write both adapters into a folder."""
    accelerator = Accelerator(cpu=True)
    sequences = draw_sequences("shared") + draw_sequences("unrelated")
    layout, _ = verify_layout(build_model("llama"))
    settings = TrainingSettings(
        batch_size=5, max_steps=6, learning_rate=3e-3, noise=2.0, save_every=1, keep_checkpoints=9
    )
    for name, start in {"whole": None, "resumed": folder / "steps" / "step-000003"}.items():
        model = attach_adapter(build_model("llama"), LoraSettings(r=4, dropout=0.3), seed=3)
        steps = folder / "steps" if start is None else None
        train(model, sequences, layout, settings, accelerator=accelerator, checkpoints=steps, resume_from=start)
        save_file(read_adapter_state(model), folder / f"{name}, {accelerator.process_index}.safetensors")
        accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    {"all": train_all, "noise": train_with_noise}[sys.argv[1]](Path(sys.argv[2]))
