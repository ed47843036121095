"""The cells of an experiment: one model each, and what of it is on disk already."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koat.core.config import Resolved, to_mapping
from koat.core.errors import RunFolderError
from koat.core.run_folder import RunFolder
from koat.core.settings import ModelSettings
from koat.workflows.config import PlanConfig, RunConfig
from koat.workflows.experiment.file import Evaluation, Experiment
from koat.workflows.training.finetune import list_differences
from koat.workflows.training.manifest import fingerprint_data
from koat.workflows.training.prepare import fingerprint_start, settle_paths

FILE = "experiment.yaml"
RECORD = "evaluated.json"
"""Beside a cell's predictions: what it was asked, and of which model."""
DATA = frozenset({".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".gz"})
"""Endings of files that hold items."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One model of an experiment: a run with one seed, or a base as it is."""

    name: str
    subject: str
    folder: Path
    resolved: Resolved[RunConfig] | Resolved[PlanConfig]
    seed: int | None
    """None for a base as it is."""
    fingerprint: str | None = None
    """Of the base as it was when this was planned; None for one on the Hub, which stands for itself."""

    @property
    def model(self) -> ModelSettings:
        """How the base is loaded."""
        return self.resolved.settings.model

    def is_begun(self) -> bool:
        """Whether training was begun."""
        return self.seed is not None and RunFolder(self.folder).config.exists()

    def is_trained(self) -> bool:
        """Whether there is nothing left to train."""
        return self.seed is None or (self.is_begun() and RunFolder(self.folder).is_complete())

    def read_record(self) -> dict[str, Any]:
        """Return what was asked already: `model` and `evaluations`."""
        path = RunFolder(self.folder).predictions / RECORD
        try:
            return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {"evaluations": []}
        except ValueError as error:
            raise RunFolderError(
                f"{path} is damaged ({error}). Remove it; the cell is then evaluated again."
            ) from error

    def list_differences(self) -> list[str]:
        """Return the settings and data in which what is on disk differs from what the experiment says now."""
        wanted = settle_paths(self.resolved.settings)
        if isinstance(self.resolved.settings, PlanConfig):
            model = {"model": wanted["model"]}
            return list_differences({"model": self.read_record().get("model", wanted["model"])}, model)
        if not self.is_begun():
            return []
        run, data = RunFolder(self.folder), self.resolved.settings.data
        differing = list_differences(run.read_config(), wanted)
        if not differing and run.is_complete():
            manifest, now = run.read_manifest(), fingerprint_files(tuple(data.list_files()))
            differing += [] if manifest.get("data") == now else ["what the data files hold"]
            differing += ["what the base holds"] if self.has_other_base(manifest) else []
            differing += ["the adapter it starts from"] if self.has_other_start(manifest) else []
        return differing

    def has_other_base(self, manifest: dict[str, Any]) -> bool:
        """Whether a run was trained on another base than lies there now, as far as both are known."""
        trained_on = manifest.get("base", {}).get("fingerprint")
        return None not in (trained_on, self.fingerprint) and trained_on != self.fingerprint

    def has_other_start(self, manifest: dict[str, Any]) -> bool:
        """Whether a run began from another adapter than lies there now, as far as both are known."""
        begun, start = manifest.get("start"), getattr(self.resolved.settings.adapter, "start", None)
        return bool(begun and start and Path(start).is_dir()) and begun != fingerprint_start(
            self.resolved.settings.adapter
        )


@dataclass(frozen=True, slots=True)
class ExperimentPlan:
    """All that an experiment takes."""

    experiment: Experiment
    out: Path
    cells: list[Cell]

    @property
    def evaluations(self) -> list[Evaluation]:
        """What every cell is asked, one task each."""
        return self.experiment.list_evaluations()

    def list_missing(self, cell: Cell) -> list[Evaluation]:
        """Return what a cell was not asked yet."""
        recorded = cell.read_record()["evaluations"] if cell.is_trained() else []
        # Records did not always name the base; one that does not is taken to be of the base that is there.
        done = [{"base": cell.fingerprint, **each} for each in recorded]
        return [each for each in self.evaluations if self.describe_asked(cell, each) not in done]

    def describe_asked(self, cell: Cell, evaluation: Evaluation) -> dict[str, Any]:
        """Return what a cell is asked as plain values, with the fingerprint of its base."""
        return {**describe_evaluation(evaluation, self.out), "base": cell.fingerprint}

    def is_done(self, cell: Cell) -> bool:
        """Whether a cell is trained and was asked everything."""
        return cell.is_trained() and not self.list_missing(cell)


def describe_evaluation(evaluation: Evaluation, out: Path) -> dict[str, Any]:
    """Return what is asked as plain values, with fingerprints of its files, a task's own among them, and of all data
    beneath `data_dir`.

    What the experiment itself writes into `out` is not among them, wherever that lies.
    """
    tasks = [task for task in evaluation.tasks if Path(task).is_file()]
    files = tuple(path for path in (evaluation.data, evaluation.shots_from, *tasks) if path)
    if evaluation.data_dir is not None:
        own = out.resolve()
        beneath = (path for path in Path(evaluation.data_dir).rglob("*") if path.suffix in DATA and path.is_file())
        files += tuple(sorted(str(path) for path in beneath if not path.resolve().is_relative_to(own)))
    return {**to_mapping(evaluation), "files": fingerprint_files(files)}


def fingerprint_files(paths: tuple[str, ...]) -> dict[str, Any]:
    """Return a fingerprint for each file; files that have not changed since are read once."""
    stamps = tuple(Path(path).stat().st_mtime_ns if Path(path).is_file() else 0 for path in paths)
    return _fingerprint_files(paths, stamps)


@functools.lru_cache(maxsize=64)
def _fingerprint_files(paths: tuple[str, ...], stamps: tuple[int, ...]) -> dict[str, Any]:
    return fingerprint_data(list(paths))
