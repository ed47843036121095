"""What training left on disk, found by the name a user gives: a run folder, or an adapter that PEFT saved."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koat.adapters.files import CONFIG, list_weight_files, read_adapter_config
from koat.core.config import Layer, resolve
from koat.core.errors import AdapterError, ModelError, RunFolderError
from koat.core.fingerprint import fingerprint_file
from koat.core.run_folder import RunFolder, name_folder
from koat.core.settings import ModelSettings, TrainingSettings
from koat.data.prompts import PromptTemplate, from_mapping
from koat.model import NANO, find_commit, fingerprint_base, list_weights, load_config, settle_dtype

TEMPLATE = "prompt_template.json"
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "*.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "*.tiktoken", "chat_template.jinja", "chat_template.json",
    "tokenization_*.py",
)  # fmt: skip
"""Patterns of the files that a tokenizer may consist of, code of its own included."""


@dataclass(frozen=True, slots=True)
class Trained:
    """An adapter or a whole model on disk, how its base model is loaded, and the run it came from, if there is one."""

    name: str
    folder: Path
    model: ModelSettings
    run: RunFolder | None

    @property
    def predictions(self) -> Path:
        """Where predictions and scores of this adapter belong."""
        return self.run.predictions if self.run else self.folder / "predictions"

    def read_adapter_config(self) -> dict[str, Any]:
        """Return PEFT's configuration of the adapter, or what stands for it."""
        return read_adapter_config(self.folder)

    def read_method(self) -> str:
        """Return koat's name of the method, empty for an adapter that is no run's."""
        return str(self.run.read_manifest().get("method", "")) if self.run else ""

    def read_template(self) -> PromptTemplate | None:
        """Return the prompt template that lies beside the adapter, None where there is none."""
        stored = read_stored_template(self.folder)
        return None if stored is None else from_mapping(stored)


def read_stored_template(folder: Path) -> dict[str, Any] | None:
    """Return the prompt template beside an adapter as it is stored, None where there is none.

    Raises AdapterError for a damaged file.
    """
    path = folder / TEMPLATE
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise AdapterError(f"{path} is not valid JSON ({error}).") from error


def is_trained(path: Path) -> bool:
    """Whether a folder is a run's or an adapter's."""
    return path.is_dir() and ((path / "config.yaml").is_file() or (path / CONFIG).is_file())


def find_trained(target: str | Path, settings: ModelSettings | None = None) -> Trained:
    """Find a run folder or an adapter folder, without reading any weight.

    `settings` says how the base is loaded; its `base` overrides the one on record. Raises KoatError when
    something is missing, or when the base is not the one that a run was trained on.
    """
    path = Path(target)
    if (path / "config.yaml").is_file():
        return find_run(path, settings)
    if not path.is_dir() or not (path / CONFIG).is_file():
        RunFolder.open(path, require=("config.yaml",))  # says what is missing, with the nearest name
    stored = read_adapter_config(path)
    base = settings.base if settings and settings.base else str(stored.get("base_model_name_or_path") or "")
    if not base:
        raise AdapterError(f"{path} does not say which base model it was trained on. Give `--base`.")
    model = settings.model_copy(update={"base": base}) if settings else ModelSettings(base=base)
    return Trained(name_folder(path), path, model, None)


def settle_base(base: str) -> str:
    """Return what a base's name stands for wherever one stands: a folder's whole path; `nano` and Hub ids stay."""
    return str(Path(base).resolve()) if base != NANO and Path(base).is_dir() else base


def find_run(path: Path, settings: ModelSettings | None = None) -> Trained:
    """Find a run of koat's, checking that its base is the one it was trained on."""
    run = RunFolder.open(path)
    kept = run.read_config().get("model")
    stored = resolve(ModelSettings, [Layer(str(run.config), kept if isinstance(kept, dict) else {})]).settings
    if settings is not None:
        given = settings.model_dump(exclude_unset=True)
        stored = stored.model_copy(update={key: value for key, value in given.items() if value != ""})
    if not run.adapter.is_dir():
        if run.is_complete():
            raise RunFolderError(f"{path} holds no adapter: the run has lost it. Train again with --overwrite.")
        raise RunFolderError(
            f"{path} holds no adapter: the run did not finish. Go on with `koat finetune --resume {path}`."
        )
    recorded = run.read_manifest()["base"]
    stored = settle_codes(pin_commit(stored, recorded), run.read_config())
    config = load_config(stored)
    found = fingerprint_base(stored, config)
    if found != recorded["fingerprint"] and not is_awaited(stored, config, recorded):
        raise AdapterError(
            f"The run in {path} was trained on another base model: fingerprint {recorded['fingerprint']}, but "
            f"{stored.base!r} has {found}. Give the right one with `--base`."
        )
    return Trained(name_folder(path), run.adapter, stored, run)


def settle_codes(model: ModelSettings, config: dict[str, Any]) -> ModelSettings:
    """Quantise a run's base from the type that it was quantised from in training: from another, codes differ."""
    precision = config.get("training", {}).get("precision", "auto")
    if model.quantisation == "none":
        return model
    return settle_dtype(model, TrainingSettings(precision=precision))


def is_awaited(model: ModelSettings, config: Any, recorded: dict[str, Any]) -> bool:
    """Whether a base is the Hub's at the commit on record, its weights, by which it would be told, not here yet."""
    commit = recorded.get("commit")
    return bool(commit) and commit == find_commit(model, config) and not list_weights(model, config)


def pin_commit(model: ModelSettings, recorded: dict[str, Any]) -> ModelSettings:
    """Load a base from the Hub as it was when the run was trained, unless another one or revision was asked for."""
    if model.revision is None and model.base == recorded.get("name") and recorded.get("commit"):
        return model.model_copy(update={"revision": recorded["commit"]})
    return model


def read_base_fingerprint(trained: Trained) -> str:
    """Return what tells this adapter's base model apart; raises AdapterError when its base cannot be found."""
    if trained.run is not None:
        return str(trained.run.read_manifest()["base"]["fingerprint"])
    try:
        return fingerprint_base(trained.model, load_config(trained.model))
    except ModelError as error:
        raise AdapterError(
            f"{trained.folder} names the base model {trained.model.base!r}, which is not at hand, so it cannot be "
            f"told whether it fits: {error} Give it with `--base`."
        ) from error


def public_name(base: str) -> str:
    """Return a base model's name without the folders that it lies in."""
    path = Path(base).expanduser()
    return path.resolve().name if path.is_dir() else base


def fingerprint_adapter(folder: Path) -> str:
    """Return the SHA-256 of an adapter's weights; of a whole model in several files, that of their hashes."""
    hashes = [fingerprint_file(path)["sha256"] for path in list_weight_files(folder)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
