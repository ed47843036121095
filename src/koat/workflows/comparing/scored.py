"""What evaluation left on disk, and what papers published: scores by the name a user gives, ready to be compared."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from koat.core.errors import ConfigError, DataError, RunFolderError, suggest
from koat.core.json_lines import read_lines
from koat.core.run_folder import RunFolder, name_folder
from koat.evaluation.contract import Parts
from koat.evaluation.metrics import wilson_interval
from koat.evaluation.published import list_published, load_published

SCORES = ".scores.json"
NEEDED = {"task", "scores", "contracts", "conditions"}
"""What each result in a file of scores has."""
COSTS = ("seconds_per_item", "peak_bytes")
"""What a result may say of its cost."""
EVALUATE = "Evaluate it: `koat eval {} --task NAME --data FILE`."


@dataclass(frozen=True, slots=True)
class Scored:
    """One score of one subject: what it is, what was asked and how, and the prediction of every item.

    `predictions` maps an item's id to its row; it is empty for a published score, of which only `num_right` of
    `num_items` is known. `cost` holds `seconds_per_item` and `peak_bytes` where they were measured.
    """

    task: str
    scoring: str
    metric: str
    value: float
    low: float
    high: float
    num_items: int
    num_right: float
    contract: Parts
    conditions: Parts
    predictions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    meaningful: bool = True
    cost: Mapping[str, float] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, float]:
        """Each item's own score by its id."""
        return {name: float(row["correct"][self.scoring]) for name, row in self.predictions.items()}

    def list_texts(self, ids: Sequence[str]) -> list[str] | None:
        """Return the text that each of some items is on, by its hash; None where that was not kept."""
        texts = [self.predictions[name].get("context") for name in ids]
        return None if None in texts else list(map(str, texts))


@dataclass(frozen=True, slots=True)
class Source:
    """A subject and its scores; `settings` (without the seed) and `seed` are a run's.

    `asked` has for each evaluation the `target` and the options that `koat eval` was given, `groups` what it made of
    groups of tasks, with the `contracts` of all that was asked.
    """

    name: str
    place: str
    scores: list[Scored]
    notes: list[str]
    settings: Mapping[str, Any] | None = None
    seed: int | None = None
    asked: list[Mapping[str, Any]] = field(default_factory=list)
    groups: list[Mapping[str, Any]] = field(default_factory=list)


def find_texts(scores: Sequence[Scored], ids: Sequence[str]) -> list[str] | None:
    """Return the text that each of some items is on, as any of the scores under one contract has kept it."""
    return next((texts for score in scores if (texts := score.list_texts(ids)) is not None), None)


def collect_sources(targets: Sequence[str], names: Mapping[str, str] | None = None) -> list[Source]:
    """Find what all targets name; `names` gives those that hold one subject another name."""
    found: list[Source] = []
    for target in targets:
        sources = find_sources(target)
        name = (names or {}).get(target)
        found += [replace(sources[0], name=name)] if name and len(sources) == 1 else sources
    return found


def find_sources(target: str) -> list[Source]:
    """Find what `target` names: a run, a folder or file of scores, a table of published ones (own or shipped).

    Raises KoatError when there is no such thing, or nothing in it that can be compared.
    """
    path = Path(target)
    if path.is_dir():
        return [_read_run(path) if (path / "config.yaml").is_file() else _read_folder(path)]
    if path.name.endswith(SCORES) and path.is_file():
        return [_read_reports([path], target)]
    if path.suffix in (".yaml", ".yml", ".json") or target in list_published():
        return _read_published(target)
    beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    raise ConfigError(
        f"{target}: there is no such run, folder or file{suggest(path.name, [*beside, *list_published()])}. Give run "
        f"folders, folders with *{SCORES}, YAML files of published scores, or a table that ships: "
        f"{', '.join(list_published())}"
    )


def _read_run(path: Path) -> Source:
    run = RunFolder.open(path, require=("config.yaml",))
    found = _read_reports(_list_reports(run.predictions, str(path)), str(path))
    settings = run.read_config()
    training = dict(settings.get("training") or {})
    seed = training.pop("seed", None)
    own = {**settings, "training": training}
    return Source(name_folder(path), str(path), found.scores, found.notes, own, seed, found.asked, found.groups)


def _read_folder(path: Path) -> Source:
    folder = path if any(path.glob(f"*{SCORES}")) else path / "predictions"
    return _read_reports(_list_reports(folder, str(path)), str(path))


def _list_reports(folder: Path, target: str) -> list[Path]:
    """Return a folder's files of scores, the latest first."""
    found = sorted(folder.glob(f"*{SCORES}"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    if not found:
        raise RunFolderError(f"{target} holds no scores. {EVALUATE.format(target)}")
    return found


def _read_reports(paths: Sequence[Path], target: str) -> Source:
    """Read scores, the latest of each (task, scoring, contract), with the predictions that stand beside them."""
    kept = _index_predictions(paths[0].parent)
    scores: dict[tuple[str, str, str], Scored] = {}
    notes, name, asked = [], "", []
    groups: list[Mapping[str, Any]] = []
    for path in paths:
        report = read_report(path)
        name, before = name or str(report["subject"]), len(scores)
        for result in report["results"]:
            for scoring, score in result["scores"].items():
                contract = Parts(result["contracts"][scoring]["parts"])
                key = (str(result["task"]), scoring, contract.hash)
                if key in scores:
                    continue
                places = [(scoring, contract.hash, how) for how in (Parts(result["conditions"]["parts"]).hash, None)]
                rows = next((kept[place] for place in places if place in kept), {})
                made = _make_scored(result, scoring, score, contract, rows)
                problem = _find_problem(made)
                if problem:
                    notes.append(f"{name}: {key[0]}, {scoring}, was left out: {problem}")
                else:
                    scores[key] = made
        if len(scores) > before:
            asked += [report["asked"]] if "asked" in report else []
            groups += [{**group, "contracts": list_contracts(report)} for group in report.get("groups", [])]
    if not scores:
        raise DataError(f"{target} holds no score that can be compared. {' '.join(notes)}")
    ordered = sorted(scores.values(), key=lambda score: score.task)
    return Source(name, target, ordered, notes, asked=asked, groups=groups)


def list_contracts(report: Mapping[str, Any]) -> list[str]:
    """Return the hashes of all contracts of a file of scores, in order."""
    parts = [contract["parts"] for result in report["results"] for contract in result["contracts"].values()]
    return sorted(Parts(each).hash for each in parts)


def read_report(path: Path) -> dict[str, Any]:
    """Read a file of scores as evaluation writes it. Raises RunFolderError for anything else."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path} cannot be read as JSON ({error}). Evaluate again.") from error
    results = report.get("results") if isinstance(report, dict) else None
    whole = isinstance(results, list) and all(isinstance(each, dict) and each.keys() >= NEEDED for each in results)
    if not whole or "subject" not in report:
        raise RunFolderError(f"{path} is not a file of scores as `koat eval` writes it. Evaluate again.")
    return dict(report)


def _index_predictions(folder: Path) -> dict[tuple[str, str, str | None], dict[str, dict[str, Any]]]:
    """Return a folder's predictions by id, for each (scoring, hash of the contract, hash of the conditions).

    Rows of before the conditions were written beside them stand under None.
    """
    found: dict[tuple[str, str, str | None], dict[str, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns):
        for row in read_lines(path):
            for scoring, contract in row.get("contracts", {}).items():
                found.setdefault((scoring, contract, row.get("conditions")), {})[str(row["id"])] = row
    return found


def _make_scored(
    result: Mapping[str, Any],
    scoring: str,
    score: Mapping[str, Any],
    contract: Parts,
    predictions: Mapping[str, Mapping[str, Any]],
) -> Scored:
    return Scored(
        task=str(result["task"]), scoring=scoring, metric=str(score["name"]), value=float(score["value"]),
        low=float(score["low"]), high=float(score["high"]), num_items=int(score["num_items"]),
        num_right=float(score["value"]) * int(score["num_items"]), contract=contract,
        conditions=Parts(result["conditions"]["parts"]), predictions=predictions,
        meaningful=bool(score.get("meaningful", True)), cost={name: result[name] for name in COSTS if name in result},
    )  # fmt: skip


def _find_problem(scored: Scored) -> str:
    """Say why a score cannot be compared by item; empty when it can."""
    if not scored.predictions:
        return "its predictions are not beside it (removed, or another evaluation has taken their place)."
    if len(scored.predictions) != scored.num_items:
        return f"it is over {scored.num_items} items, and {len(scored.predictions)} predictions are beside it."
    if not all(0 <= value <= 1 for value in scored.values.values()):
        return "it is no share between 0 and 1; only shares are compared."
    mean = sum(scored.values.values()) / scored.num_items
    if abs(mean - scored.value) > 1e-6:
        return f"it is {scored.value:.4f}, but the mean of its predictions is {mean:.4f}."
    return ""


def _read_published(target: str) -> list[Source]:
    table = load_published(target)
    scores: dict[str, list[Scored]] = {}
    for row in table.scores:
        low, high = wilson_interval(row.num_right, row.items)
        scores.setdefault(row.name, []).append(
            Scored(
                row.task, row.metric, row.metric, row.num_right / row.items, low, high, row.items, row.num_right,
                Parts(row.to_contract()), Parts(row.conditions),
            )
        )  # fmt: skip
    notes = [f"{table.title}. Source: {table.source}"] + ([table.note] if table.note else [])
    return [Source(name, target, found, notes) for name, found in scores.items()]


@dataclass(frozen=True, slots=True)
class Subject:
    """What is compared: one source, or the runs of one method that differ in their seed alone."""

    name: str
    sources: list[Source]


def group_subjects(sources: Sequence[Source], only: Sequence[str] = ()) -> list[Subject]:
    """Join runs that differ in nothing but their seed, give names that differ, and keep those that `only` names.

    Raises DataError for one thing named twice, and ConfigError for a name in `only` that nothing has.
    """
    places = [(source.place, source.name) for source in sources]
    if doubles := sorted({place for place, name in places if places.count((place, name)) > 1}):
        raise DataError(f"{', '.join(doubles)} was named twice; nothing can be compared with itself.")
    subjects = [Subject(name, group) for name, group in _name_groups(list(_join_seeds(sources)))]
    if unknown := [name for name in only if name not in {subject.name for subject in subjects}]:
        names = [subject.name for subject in subjects]
        raise ConfigError(f"nothing here is called {unknown[0]!r}{suggest(unknown[0], names)}: {', '.join(names)}")
    return [subject for subject in subjects if not only or subject.name in only]


def _join_seeds(sources: Sequence[Source]) -> Iterator[list[Source]]:
    groups: list[list[Source]] = []
    for source in sources:
        for group in groups:
            alike = source.settings is not None and source.settings == group[0].settings
            if alike and source.seed not in [other.seed for other in group]:
                group.append(source)
                break
        else:
            groups.append([source])
    yield from groups


def _name_groups(groups: Sequence[list[Source]]) -> Iterator[tuple[str, list[Source]]]:
    names = [group[0].name for group in groups]
    for group in groups:
        first = group[0]
        seeds = f" ({len(group)} seeds)" if len(group) > 1 else ""
        yield (first.name if names.count(first.name) == 1 else f"{first.place}: {first.name}") + seeds, group
