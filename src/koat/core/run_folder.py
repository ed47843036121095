"""Run folders, the only contract between commands: the files of one run, where they lie, and their state."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koat.core.atomic import cannot_write, clean_leftovers, remove, write_json, write_yaml
from koat.core.config_files import read_config_file
from koat.core.errors import ConfigError, RunFolderError, suggest
from koat.core.lock import hold


def name_folder(path: Path) -> str:
    """Return a folder's name, also of `.`; a link keeps its own."""
    return Path(os.path.abspath(path)).name


@dataclass(frozen=True)
class RunFolder:
    """The files of one run and where they lie."""

    path: Path

    @classmethod
    def create(cls, path: str | Path, *, overwrite: bool = False) -> RunFolder:
        """Make a folder for a new run; `overwrite` removes the run it holds, and nothing else in it.

        Raises RunFolderError for a folder that is not empty, or that cannot be made.
        """
        run = cls(Path(path))
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            clean_leftovers(run.path)
            held = run._list_held()
        except FileExistsError:
            raise RunFolderError(f"{path} is a file; a run needs a folder. Choose another --out.") from None
        except OSError as error:
            raise cannot_write(run.path, error.errno, error) from error
        if overwrite:
            cls.check_overwrite(path)
        elif held:
            known = run.config.name in held
            instead = (
                "Use `--resume` to go on with the run in it, `--overwrite` to replace it, or choose"
                if known
                else "Choose"
            )
            raise RunFolderError(f"{path} is not empty: it holds {_some(held)}. {instead} another --out.")
        for entry in (run.manifest, run.adapter, run.metrics, run.checkpoints, run.predictions, run.config):
            remove(entry)
        return run

    @classmethod
    def check_overwrite(cls, path: str | Path) -> RunFolder:
        """Return a folder whose run, if it holds anything, may be replaced. Raises RunFolderError for another's."""
        run = cls(Path(path))
        held = run._list_held() if run.path.is_dir() else []
        if held and run.config.name not in held:
            raise RunFolderError(f"{path} holds {_some(held)} and no run to overwrite. Choose another --out.")
        return run

    @classmethod
    def open(cls, path: str | Path, *, require: tuple[str, ...] = ("config.yaml", "manifest.json")) -> RunFolder:
        """Open the folder of a run, after recovering from a killed writer.

        Raises RunFolderError that names what is missing of `require` (file and folder names).
        """
        run = cls(Path(path))
        if not run.path.is_dir():
            parent = run.path.parent
            names = [entry.name for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
            raise RunFolderError(f"{path}: there is no such run folder{suggest(run.path.name, names)}")
        clean_leftovers(run.path)
        clean_leftovers(run.checkpoints)
        missing = [name for name in require if not (run.path / name).exists()]
        if missing:
            raise RunFolderError(
                f"{path} is not a complete run folder: {', '.join(missing)} missing. Name the folder "
                "that was the `out` of a training run, or train again."
            )
        return run

    def _list_held(self) -> list[str]:
        return sorted(entry.name for entry in self.path.iterdir() if entry != self.lock)

    @property
    def lock(self) -> Path:
        """Held by whoever trains the run; a killed one leaves the file, which holds nobody up."""
        return self.path / ".lock"

    def hold(self) -> AbstractContextManager[None]:
        """Keep other processes from training in this folder. Raises RunFolderError when one does already."""
        return hold(self.lock, self.path)

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def manifest(self) -> Path:
        """Versions, seed, fingerprints, hardware, and whether the run finished."""
        return self.path / "manifest.json"

    @property
    def adapter(self) -> Path:
        """The adapter in PEFT's format, tokenizer and template beside it."""
        return self.path / "adapter"

    @property
    def metrics(self) -> Path:
        """One JSON line per recorded step."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folders `step-000123` to resume from."""
        return self.path / "checkpoints"

    @property
    def predictions(self) -> Path:
        """One file of JSON lines per evaluation."""
        return self.path / "predictions"

    def read_config(self) -> dict[str, Any]:
        """Read the configuration; raises RunFolderError."""
        return _read(self.config)

    def write_config(self, value: Mapping[str, Any]) -> None:
        """Write the configuration; raises RunFolderError."""
        write_yaml(self.config, dict(value))

    def read_manifest(self) -> dict[str, Any]:
        """Read the manifest; raises RunFolderError."""
        return _read(self.manifest)

    def write_manifest(self, value: Mapping[str, Any]) -> None:
        """Write the manifest; raises RunFolderError."""
        write_json(self.manifest, dict(value))

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.checkpoints / f"step-{step:06d}"

    def latest_checkpoint(self) -> Path | None:
        """Return the complete checkpoint (with `done.json`) of the highest step, if there is one."""
        clean_leftovers(self.checkpoints)
        steps = [
            int(entry.parent.name.removeprefix("step-"))
            for entry in self.checkpoints.glob("step-*/done.json")
            if entry.parent.name.removeprefix("step-").isdecimal()
        ]
        return self.checkpoint(max(steps)) if steps else None

    def is_complete(self) -> bool:
        """Whether the manifest says that the run finished."""
        return self.manifest.exists() and self.read_manifest().get("finished") is True


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_config_file(path)
    except ConfigError as error:
        raise RunFolderError(str(error)) from error


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
