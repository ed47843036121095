"""Train the shipped model on the longest KorQuAD contexts, in a process of its own, and see how far the process grows.

The C library keeps much of what is freed, in blocks too small to give back: a process that has computed before
grows by what it did not use, or seems not to grow at all. So each training gets a fresh process, in which memory
goes back at once and growth is what was alive.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.compare_training import make_accelerator
from benchmarks.workload import ROOT, Options, open_tokenizer, read_context_qa
from koat.adapters.attach import attach_adapter
from koat.adapters.methods import METHODS
from koat.core.sequence import Sequence
from koat.core.settings import ModelSettings, TrainingSettings
from koat.forest.verify import verify_layout
from koat.model import load_model, pick_device
from koat.training.loop import train
from koat.workflows.measure import Cost
from koat.workflows.planning.memory import measure_base, measure_footprint
from koat.workflows.planning.simulate import set_checkpointing

NUM_CONTEXTS = 48
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""For glibc: blocks from 64 KiB on come from the system and go back to it."""


@dataclass(frozen=True)
class Growth:
    """What was planned, and by how much the process grew, in bytes."""

    longest: int
    num_steps: int
    loss: float
    planned: float
    grown: float


def read_longest(options: Options) -> list[Sequence]:
    """Return the longest contexts with their questions. Raises Absent when the data is not there."""
    sequences = read_context_qa(options, open_tokenizer(options), "train", 10**6)
    return sorted(sequences, key=len)[-options.scale(NUM_CONTEXTS, 4) :]


def train_contexts(options: Options, method: str, checkpointing: bool) -> Growth:
    """Plan a training on the longest contexts, run it in this process, and return both."""
    settings = ModelSettings(base=options.base, dtype="float32", device=str(options.device))
    sequences = read_longest(options)
    training = TrainingSettings(
        batch_size=4, max_steps=max(1, len(sequences) // 4), activation_checkpointing=checkpointing,
        tokens_per_microbatch=max(map(len, sequences)),
    )  # fmt: skip
    footprint = measure_footprint(measure_base(settings, training), METHODS[method].settings(), training)
    before = psutil.Process().memory_info().rss if options.device.type == "cpu" else 0
    with Cost(options.device) as cost:
        model = attach_adapter(load_model(settings), METHODS[method].settings())
        layout, _ = verify_layout(model)
        set_checkpointing(model, checkpointing)
        result = train(model, sequences, layout, training, accelerator=make_accelerator(options))
    planned = footprint.train_peak(1, training.tokens_per_microbatch)
    return Growth(
        training.tokens_per_microbatch, result.state.step, result.last_loss, planned, cost.peak_bytes - before
    )


def train_alone(options: Options, method: str, checkpointing: bool) -> Growth:
    """Do the same in a fresh process. Raises Absent when the data is not there."""
    read_longest(options)
    given = [method, str(int(checkpointing)), str(options.amount), str(int(options.quick)), options.base]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.long_contexts", *given, str(options.data), str(options.device)],
        env={**os.environ, **GIVES_BACK}, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    values = done.stdout.split()[-5:]
    return Growth(int(values[0]), int(values[1]), *map(float, values[2:]))


def main() -> None:
    """Train as the command line says and print the figures."""
    method, checkpointing, amount, quick, base, data, device = sys.argv[1:]
    options = Options(float(amount), bool(int(quick)), base=base, data=Path(data), device=pick_device(device))
    growth = train_contexts(options, method, bool(int(checkpointing)))
    print(growth.longest, growth.num_steps, growth.loss, growth.planned, growth.grown)


if __name__ == "__main__":
    main()
