"""Adapters on disk: list them, show one, average several."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from koat.adapters.average import StoredAdapter, average_adapters
from koat.adapters.files import (
    CONFIG,
    EXTRA,
    MODEL_CONFIG,
    WEIGHTS,
    is_whole_model,
    list_weight_files,
    read_adapter_config,
    read_adapter_file,
    read_extra,
)
from koat.core.atomic import atomic_folder, write_json
from koat.core.config_files import read_config_file
from koat.core.errors import AdapterError, ConfigError, KoatError, RunFolderError
from koat.core.settings import ModelSettings
from koat.model import load_tokenizer
from koat.workflows.comparing.scored import SCORES, read_report
from koat.workflows.sharing.merge import save_company
from koat.workflows.trained import Trained, find_trained, read_base_fingerprint, read_stored_template

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True, slots=True)
class AdapterEntry:
    """What is known of an adapter without its base model."""

    path: str
    method: str
    base: str
    fingerprint: str
    """Of the base, as the run recorded it; empty for an adapter that is no run's."""
    targets: list[str]
    num_parameters: int
    num_bytes: int
    template: str
    finished: bool
    scores: list[dict[str, Any]]

    def to_mapping(self) -> dict[str, Any]:
        """Return a JSON-safe mapping."""
        return asdict(self)


def show_adapter(target: str | Path) -> AdapterEntry:
    """Describe a run's adapter or one that PEFT saved. Raises KoatError when it cannot be read."""
    path = Path(target)
    run = path if (path / "config.yaml").is_file() else None
    folder = path / "adapter" if run else path
    if run and not folder.is_dir():
        raise RunFolderError(
            f"{path} holds no adapter: the run did not finish. Go on with `koat finetune --resume {path}`."
        )
    if not run and (path.parent / "config.yaml").is_file() and path.name == "adapter":
        run = path.parent
    stored = read_adapter_config(folder)
    num_stored = 0 if is_whole_model(folder) else sum(t.numel() for t in read_adapter_file(folder / WEIGHTS).values())
    manifest = read_manifest(run) if run else {}
    base = manifest.get("base", {})
    targets = stored.get("target_modules") or []
    return AdapterEntry(
        path=str(path),
        method=str(manifest.get("method") or str(stored["peft_type"]).lower()),
        base=str(base.get("name") or stored.get("base_model_name_or_path") or "not recorded"),
        fingerprint=str(base.get("fingerprint", "")),
        targets=sorted(targets) if isinstance(targets, list) else [str(targets)],
        num_parameters=int(manifest.get("trainable_parameters") or num_stored),
        num_bytes=sum(path.stat().st_size for path in list_weight_files(folder)),
        template=read_template_name(folder),
        finished=bool(manifest.get("finished", True)),
        scores=collect_scores((run or folder) / "predictions"),
    )


def list_adapters(folder: Path) -> tuple[list[AdapterEntry], list[str]]:
    """Describe all adapters beneath a folder, checkpoints left out; also return why others cannot be read."""
    if not folder.is_dir():
        raise RunFolderError(f"{folder}: there is no such folder.")
    entries, problems = [], []
    wholes = (path for path in folder.rglob(f"adapter/{MODEL_CONFIG}") if (path.parents[1] / "config.yaml").is_file())
    for place in sorted({path.parent for path in (*folder.rglob(CONFIG), *wholes)}):
        hidden = any(part == CHECKPOINTS or part.startswith(".") for part in place.relative_to(folder).parts)
        if hidden:
            continue
        is_run = place.name == "adapter" and (place.parent / "config.yaml").is_file()
        try:
            entries.append(show_adapter(place.parent if is_run else place))
        except KoatError as error:
            problems.append(str(error))
    return entries, problems


def read_manifest(run: Path) -> dict[str, Any]:
    """Return a run's manifest, empty where it has none."""
    path = run / "manifest.json"
    try:
        return read_config_file(path) if path.is_file() else {}
    except ConfigError as error:
        raise RunFolderError(str(error)) from error


def read_template_name(folder: Path) -> str:
    """Return the name of the prompt template beside an adapter, empty where there is none."""
    return str((read_stored_template(folder) or {}).get("name", ""))


def collect_scores(predictions: Path) -> list[dict[str, Any]]:
    """Return every score on record with its interval, contract and conditions, latest evaluation of each last."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for path in sorted(predictions.glob(f"*{SCORES}"), key=lambda path: path.stat().st_mtime_ns):
        for result in read_report(path)["results"]:
            for scoring, score in result["scores"].items():
                contract = result["contracts"][scoring]["hash"]
                rows[result["task"], scoring, contract] = {
                    "task": result["task"], "scoring": scoring, "shots": result["num_shots"],
                    **score, "contract": contract, "conditions": result["conditions"]["hash"],
                }  # fmt: skip
    return list(rows.values())


def average_runs(targets: Sequence[str | Path], out: Path, settings: ModelSettings | None = None) -> AdapterEntry:
    """Average adapters of one base into a new PEFT adapter folder, tokenizer and template of the first beside it.

    Raises AdapterError for adapters of different bases, methods, targets or templates.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunFolderError(f"{out} is not empty. Choose another `--out`.")
    found = [find_trained(target, settings) for target in targets]
    check_same_base(found)
    check_same_template(found)
    config, state = average_adapters([read_stored(trained) for trained in found])
    first = found[0]
    with atomic_folder(out) as draft:
        write_state(draft, {**config, "base_model_name_or_path": first.model.base}, state)
        if (first.folder / EXTRA).is_file():
            shutil.copyfile(first.folder / EXTRA, draft / EXTRA)
        save_company(first, load_tokenizer(first.model), draft)
    return show_adapter(out)


def check_same_base(found: Sequence[Trained]) -> None:
    """Raise AdapterError unless all adapters were trained on one base model."""
    prints = [read_base_fingerprint(trained) for trained in found]
    for trained, fingerprint in zip(found, prints, strict=True):
        if fingerprint != prints[0]:
            raise AdapterError(
                f"{found[0].name} and {trained.name} were trained on different base models "
                f"(fingerprints {prints[0]} and {fingerprint}): their mean would fit neither."
            )


def check_same_template(found: Sequence[Trained]) -> None:
    """Raise AdapterError unless all adapters that carry a prompt template carry the same."""
    templates = [(trained.name, trained.read_template()) for trained in found]
    known = [(name, template) for name, template in templates if template is not None]
    for name, template in known[1:]:
        if template != known[0][1]:
            raise AdapterError(
                f"{known[0][0]} and {name} were trained with different prompt templates ({known[0][1].name} and "
                f"{template.name}), so one prompt would suit half of their mean. Train them alike."
            )


def read_stored(trained: Trained) -> StoredAdapter:
    """Read an adapter's files."""
    state = {} if is_whole_model(trained.folder) else read_adapter_file(trained.folder / WEIGHTS)
    return StoredAdapter(trained.name, trained.read_adapter_config(), read_extra(trained.folder), state)


def write_state(folder: Path, config: dict[str, Any], state: dict[str, Any]) -> None:
    """Write PEFT's two files into an existing folder."""
    save_file(state, str(folder / WEIGHTS), metadata={"format": "pt"})
    write_json(folder / CONFIG, config)
