"""What runs say of themselves, for a report: cost, loss curves, settings, and what pins them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from koat.core.json_lines import read_lines
from koat.core.run_folder import RunFolder
from koat.workflows.comparing.scored import Source, Subject

RESULTS = (
    "steps", "kept_step", "best_validation_loss", "tokens", "unique_tokens", "training_seconds", "peak_bytes",
)  # fmt: skip
LONGEST = 120
"""Settings are cut to so many characters."""


def describe_runs(subject: Subject) -> list[dict[str, Any]]:
    """Return the facts of each of a subject's runs, none for what was not trained by koat."""
    return [describe_run(source) for source in subject.sources if source.settings is not None]


def describe_run(source: Source) -> dict[str, Any]:
    """Return a run's cost, loss curve and fingerprints; what its manifest does not say is left out.

    Folders and file names stay, the paths to them do not: a report is passed on.
    """
    run = RunFolder(Path(source.place))
    manifest = run.read_manifest() if run.manifest.exists() else {}
    base = manifest.get("base") or {}
    base_name = str(base.get("name", ""))
    return {
        "place": source.place,
        "seed": source.seed,
        **{name: manifest[name] for name in ("method", "trainable_parameters") if name in manifest},
        **{name: value for name, value in (manifest.get("result") or {}).items() if name in RESULTS},
        "base": {**base, "name": Path(base_name).name if Path(base_name).is_absolute() else base_name} if base else {},
        "data": {Path(name).name: pinned for name, pinned in (manifest.get("data") or {}).items()},
        "versions": manifest.get("versions") or {},
        "hardware": manifest.get("hardware") or {},
        "curve": read_curve(run.metrics),
    }


def read_curve(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Return `training` and `validation` losses as (step, loss), without those that are no numbers."""
    lines = read_lines(path)
    return {
        kind: [(int(line["step"]), float(line[key])) for line in lines if isfinite(line.get(key, float("nan")))]
        for kind, key in (("training", "loss"), ("validation", "validation_loss"))
    }


def set_side_by_side(subjects: Sequence[Subject]) -> dict[str, Any]:
    """Return the settings of all subjects that have them, and whether they differ; seeds are left out.

    A row has `name`, `values` (a text for each subject, None where the setting does not exist) and `differs`.
    """
    held = {
        subject.name: dict(_flatten(subject.sources[0].settings))
        for subject in subjects
        if subject.sources[0].settings is not None
    }
    names = dict.fromkeys(name for settings in held.values() for name in settings)
    rows = [{"name": name, "values": [settings.get(name) for settings in held.values()]} for name in names]
    return {
        "subjects": list(held),
        "rows": [{**row, "differs": any(value != row["values"][0] for value in row["values"])} for row in rows],
    }


def _flatten(settings: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(settings, Mapping) and settings:
        for name, value in settings.items():
            yield from _flatten(value, f"{prefix}.{name}" if prefix else str(name))
    else:
        text = "none" if settings is None else str(settings)
        yield prefix, text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
