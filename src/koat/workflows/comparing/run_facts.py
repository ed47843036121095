"""What runs say of themselves, for a report: cost, loss curves, settings, and what pins them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
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
"""Settings are cut to so many characters where they are shown."""
BEFORE = 20
"""Characters shown before the first that differs, where that lies further on."""


def describe_runs(subject: Subject) -> list[dict[str, Any]]:
    """Return the facts of each of a subject's runs, none for what was not trained by koat."""
    return [describe_run(source) for source in subject.sources if source.settings is not None]


def describe_run(source: Source) -> dict[str, Any]:
    """Return a run's cost, loss curve and fingerprints; what its manifest does not say is left out.

    Names of folders and files stay, the paths to them do not: a report is passed on.
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
        "data": name_data(manifest.get("data") or {}),
        "versions": manifest.get("versions") or {},
        "hardware": manifest.get("hardware") or {},
        "curve": read_curve(run.metrics),
    }


def name_data(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return what pins data files by their names, with as many folders before them as tell one from the others.

    The roots of paths never come along: reports and model cards are passed on.
    """
    parts = {path: tuple(part for part in Path(path).parts if part != Path(path).anchor) for path in data}
    named: dict[str, Any] = {}
    for path, pinned in data.items():
        own, others = parts[path], [held for other, held in parts.items() if other != path]
        depths = (depth for depth in range(1, len(own)) if all(held[-depth:] != own[-depth:] for held in others))
        name = "/".join(own[-next(depths, len(own)) :])
        # `/a/rows.tsv` and `a/rows.tsv` differ in nothing that may be shown.
        number = 1 + list(parts.values())[: list(parts).index(path)].count(own)
        named[name if number == 1 else f"{name} ({number})"] = pinned
    return named


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
    rows = {
        name: [settings.get(name) for settings in held.values()]
        for name in dict.fromkeys(name for settings in held.values() for name in settings)
    }
    return {
        "subjects": list(held),
        "rows": [
            {"name": name, "values": cut_alike(values), "differs": len(set(values)) > 1}
            for name, values in rows.items()
        ],
    }


def cut_alike(values: Sequence[str | None]) -> list[str | None]:
    """Cut texts to what is shown; where all begin alike for longer than that, from just before they differ."""
    texts = {value for value in values if value is not None}
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False))
    common = sum(1 for _ in alike) if len(texts) > 1 else 0
    start = common - BEFORE if common >= LONGEST - 1 else 0
    return [None if value is None else _cut(f"…{value[start:]}" if start else value) for value in values]


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _flatten(settings: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(settings, Mapping) and settings:
        for name, value in settings.items():
            yield from _flatten(value, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, "none" if settings is None else str(settings)
