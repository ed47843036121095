"""Report: one page that shows what was compared, what came of it, at what cost, and how to do it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from koat.core.atomic import write_text
from koat.core.errors import ConfigError
from koat.evaluation.disagreements import find_disagreements
from koat.report.page import render_page
from koat.report.words import LANGUAGES, Language
from koat.workflows.comparing.compare import Cell, Column, collect_columns, compare_subjects
from koat.workflows.comparing.run_facts import describe_runs, set_side_by_side
from koat.workflows.comparing.scored import Subject, collect_sources, group_subjects

NUM_ITEMS = 40
"""Items shown where subjects disagree, for each score."""
MOST_ANSWERS = 400
"""Answers shown altogether: with many scores or subjects there are fewer items of each."""


def write_report(
    targets: Sequence[str],
    out: Path,
    *,
    language: Language = "en",
    title: str = "",
    names: Mapping[str, str] | None = None,
    reproduce: Sequence[str] = (),
    only: Sequence[str] = (),
) -> Path:
    """Write a self-contained HTML page about runs, folders of predictions and published tables; return `out`.

    Both languages are in it; `language` is shown first. `names` gives targets other names, `reproduce` holds
    the commands that led here. Unlike `compare_targets` it takes a single subject, and scores that may not be
    ranked, which it says. Raises KoatError when a target cannot be read.
    """
    if language not in LANGUAGES:
        raise ConfigError(f"language={language!r}: a report opens in one of {', '.join(LANGUAGES)}.")
    subjects = [drop_count(subject) for subject in group_subjects(collect_sources(targets, names), only)]
    facts = gather_facts(subjects)
    commands = list(reproduce) or list_commands(subjects, targets, out)
    write_text(out, render_page({**facts, "title": title, "commands": commands}, language))
    return out


def drop_count(subject: Subject) -> Subject:
    """Take the number of seeds out of a subject's name: a page shows it where it shows the seeds."""
    return replace(subject, name=subject.name.removesuffix(f" ({len(subject.sources)} seeds)"))


def gather_facts(subjects: Sequence[Subject]) -> dict[str, Any]:
    """Return all that a report shows, JSON-safe.

    Beside what `compare_targets` returns (`found`): `runs` by subject, `costs` and `disagreements` in the order
    of the columns, `settings` side by side.
    """
    columns = list(collect_columns(subjects))
    limit = min(NUM_ITEMS, max(4, MOST_ANSWERS // (len(columns) * len(subjects))))
    return {
        "found": compare_subjects(subjects),
        "runs": {subject.name: describe_runs(subject) for subject in subjects},
        "costs": [{cell.subject: average_cost(cell) for cell in column.cells} for column in columns],
        "disagreements": [compare_items(column, limit) for column in columns],
        "settings": set_side_by_side(subjects),
    }


def average_cost(cell: Cell) -> dict[str, float]:
    """Return the mean over seeds of what evaluating took."""
    kinds = cell.scores[0].cost
    return {kind: sum(score.cost.get(kind, 0.0) for score in cell.scores) / len(cell.scores) for kind in kinds}


def compare_items(column: Column, limit: int) -> dict[str, Any] | None:
    """Return the items that the subjects of a column disagree on; their first seeds stand for them."""
    predictions = {cell.subject: cell.scores[0].predictions for cell in column.cells if cell.scores[0].predictions}
    return find_disagreements(predictions, column.scoring, limit)


def list_commands(subjects: Sequence[Subject], targets: Sequence[str], out: Path) -> list[str]:
    """Return the commands that train the runs again, ask them the same and write the page.

    A report is passed on: what lies outside the folder that one stands in goes by its name alone.
    """
    steps: list[list[str]] = []
    again: dict[str, str] = {}
    for source in (source for subject in subjects for source in subject.sources):
        is_run = source.settings is not None
        if is_run or source.asked:
            again[source.place] = f"{shorten(source.place)}-again"
        if is_run:
            config = f"{shorten(source.place)}/config.yaml"
            steps.append(["finetune", "--config", config, "--out", again[source.place]])
        for asked in source.asked:
            whom = [again[source.place]] if is_run else [shorten(asked["target"]), "--out", again[source.place]]
            steps.append(["eval", *whom, *list_options(asked)])
    shown = [again.get(target, shorten(target)) for target in targets]
    return [shlex.join(["koat", *step]) for step in (*steps, ["report", *shown, "--out", shorten(str(out))])]


def list_options(asked: Mapping[str, Any]) -> list[str]:
    """Return the options of `koat eval` that it was given."""
    options: list[str] = []
    for name, value in asked.items():
        if name == "target":
            continue
        for each in value if isinstance(value, list) else [value]:
            options += [f"--{name}"] if each is True else [f"--{name}", shorten(str(each))]
    return options


def shorten(path: str) -> str:
    """Return a path as it is where it lies beneath the folder that one stands in, else its last part."""
    outside = Path(path).is_absolute() or path.startswith("~") or ".." in Path(path).parts
    return Path(path).name if outside else path
