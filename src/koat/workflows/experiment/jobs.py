"""Run the cells of an experiment in several processes, each on its share of the machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from koat.core.atomic import cannot_write
from koat.core.errors import ConfigError
from koat.report.progress import ProgressLine
from koat.workflows.experiment.cells import FILE, Cell, ExperimentPlan
from koat.workflows.training.prepare import Say

RUN = "from koat.cli import main; main()"
PAUSE = 0.2


def run_in_processes(
    plan: ExperimentPlan, cells: Sequence[Cell], jobs: int, overwrite: Sequence[str] = (), say: Say = lambda text: None
) -> dict[str, str]:
    """Run cells in `jobs` processes at a time, each with its log in `logs`; return the failures by name.

    Processes take turns on the GPUs that there are and divide the cores. When this one is interrupted, they
    are stopped too. Raises ConfigError for a cell that names a GPU by a number that its process will not see.
    """
    check_devices(cells)
    waiting, total = list(cells), len(cells)
    running: dict[int, tuple[Cell, subprocess.Popen[bytes]]] = {}
    failures: dict[str, str] = {}
    line = ProgressLine("cells")
    try:
        while waiting or running:
            for slot in range(jobs):
                if slot not in running and waiting:
                    cell = waiting.pop(0)
                    running[slot] = cell, start_cell(plan, cell, make_environment(slot, jobs), overwrite)
                    say(f"{cell.name}: begun, {find_log(plan, cell)}")
            for slot, (cell, child) in list(running.items()):
                if (status := child.poll()) is None:
                    continue
                del running[slot]
                if status:
                    failures[cell.name] = describe_failure(find_log(plan, cell), status)
                say(f"! {cell.name} failed: {failures[cell.name]}" if status else f"{cell.name}: done")
            done = total - len(waiting) - len(running)
            line.update(done, total, ", ".join(cell.name for cell, _ in running.values()))
            time.sleep(PAUSE if running else 0)
    finally:
        for _, child in running.values():
            child.terminate()
        for _, child in running.values():
            child.wait()
    return failures


def check_devices(cells: Sequence[Cell]) -> None:
    """Raise ConfigError for cells on another GPU than the one that each process sees, as its first."""
    named = [cell for cell in cells if cell.model.device.startswith("cuda:") and cell.model.device != "cuda:0"]
    if named:
        raise ConfigError(
            f"{named[0].name}: model.device={named[0].model.device}, but with --jobs each process is given one GPU and "
            "sees no second. Set model.device=cuda, and say in CUDA_VISIBLE_DEVICES which GPUs to take turns on."
        )


def start_cell(
    plan: ExperimentPlan, cell: Cell, environment: dict[str, str], overwrite: Sequence[str]
) -> subprocess.Popen[bytes]:
    """Start a process that does one cell, its output in a log."""
    flags = [part for name in overwrite for part in ("--overwrite", name)]
    command = ["experiment", str(plan.out / FILE), "--out", str(plan.out), "--cell", cell.name, *flags]
    log = find_log(plan, cell)
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            return subprocess.Popen(
                [sys.executable, "-c", RUN, *command], env=environment, stdout=file, stderr=subprocess.STDOUT
            )
    except OSError as error:
        raise cannot_write(log, error.errno, error) from error


def make_environment(slot: int, jobs: int) -> dict[str, str]:
    """Return the environment of the process in a slot: one GPU, and its share of the cores."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    if gpus := list_gpus():
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return environment


def list_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip()]
    return [str(number) for number in range(torch.cuda.device_count())]


def find_log(plan: ExperimentPlan, cell: Cell) -> Path:
    """Return where a cell's process writes."""
    return plan.out / "logs" / f"{cell.name}.log"


def describe_failure(log: Path, status: int) -> str:
    """Return the message that a process ended with, or how it was ended."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = next((line.removeprefix("koat: ") for line in reversed(lines) if line.strip()), "")
    number = -status if status < 0 else status - 128
    ended = f"ended by signal {number}" if number > 0 else f"status {status}"
    return f"{said} ({ended}; all of it in {log})" if said else f"{ended}; see {log}"
