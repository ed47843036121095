"""Scores that were published as counts or rates: a table of a paper, through the same door as koat's own."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from koat.core.config import Layer, Section, resolve
from koat.core.config_files import read_config_file
from koat.core.errors import ConfigError, suggest

COUNTED = frozenset({"acc", "acc_norm", "accuracy", "mc1", "em", "exact_match"})
"""Metrics that are a share of items. Others are means of values between 0 and 1."""


class PublishedScore(Section):
    """One score of a table, with as much of its contract as was published."""

    name: str = Field(description="The model or method, as the table calls it.", min_length=1)
    task: str = Field(description="What was asked; scores of one task stand together.", min_length=1)
    metric: str = Field(description="acc, acc_norm, mc1, mc2, accuracy, f1 or another; never left out.", min_length=1)
    items: int = Field(gt=0, description="How many items were asked.")
    value: float | None = Field(None, ge=0, le=1, description="The score as a share: 0.664 for 66.4 %.")
    right: int | None = Field(None, ge=0, description="How many were answered right, where the table counts them.")
    shots: int | None = Field(None, ge=0, description="Solved examples before each item, where the table says so.")
    contract: dict[str, Any] = Field(default_factory=dict, description="Further parts of what was asked, by name.")
    conditions: dict[str, Any] = Field(default_factory=dict, description="How this model was asked, by name.")

    @model_validator(mode="after")
    def _check(self) -> PublishedScore:
        if (self.value is None) == (self.right is None):
            raise ValueError(f"{self.name}, {self.task}: give either `value` (a share) or `right` (a count)")
        if self.right is not None and self.right > self.items:
            raise ValueError(f"{self.name}, {self.task}: {self.right} right of {self.items} items")
        return self

    @property
    def num_right(self) -> float:
        """How many items were answered right; a fraction where the metric is no count."""
        return float(self.right) if self.right is not None else self._count()

    def _count(self) -> float:
        number = (self.value or 0.0) * self.items
        return float(round(number)) if self.metric in COUNTED else number

    def to_contract(self) -> dict[str, Any]:
        """Return the parts of the contract that are known, named as in koat's own contracts."""
        parts: dict[str, Any] = {"items": {"num": self.items}}
        if self.shots is not None:
            parts["shots"] = {"num": self.shots}
        return {**parts, **self.contract, "metric": self.metric}


class PublishedTable(Section):
    """A file of published scores."""

    title: str = Field(description="A line for people.", min_length=1)
    source: str = Field(description="Where the figures were published.", min_length=1)
    note: str = Field("", description="What a reader must know.")
    scores: list[PublishedScore] = Field(description="The table, a row per score.", min_length=1)

    @model_validator(mode="after")
    def _check(self) -> PublishedTable:
        seen: set[tuple[str, ...]] = set()
        for score in self.scores:
            key = (score.name, score.task, score.metric, str(score.to_contract()))
            if key in seen:
                raise ValueError(f"{score.name} has two scores for {score.task}, {score.metric}")
            seen.add(key)
        return self


def list_published() -> list[str]:
    """Return the names of the tables that ship."""
    files = resources.files("koat").joinpath("published").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def load_published(name_or_path: str | Path) -> PublishedTable:
    """Load a table that ships, or one's own from a YAML or JSON file.

    Raises ConfigError for an unknown name (with the nearest), an unknown key, or a value that cannot be.
    """
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml", ".json"):
        return _resolve(read_config_file(path), path.name)
    if str(name_or_path) not in list_published():
        raise ConfigError(
            f"there is no published table {str(name_or_path)!r}{suggest(str(name_or_path), list_published())}; "
            f"there are: {', '.join(list_published())}"
        )
    with resources.as_file(resources.files("koat").joinpath("published", f"{name_or_path}.yaml")) as file:
        return _resolve(read_config_file(file), str(name_or_path))


def _resolve(values: Mapping[str, Any], name: str) -> PublishedTable:
    try:
        return resolve(PublishedTable, [Layer("file", values)]).settings
    except ConfigError as error:
        raise ConfigError(f"published scores in {name}: {error}") from None
