"""A choice task: where its items stand in a file, how they are asked, and what is counted. Read from YAML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from koat.core.config import Layer, Section, resolve, to_mapping
from koat.core.errors import suggest

Scoring = Literal["first-token", "likelihood"]
Count = Annotated[int, Field(gt=0)]
PLACEHOLDER = re.compile(r"\{(\w+)\}")
LABEL = "label"
"""The field that holds an item's gold label."""


class Words(Section):
    """A text for people, in both languages."""

    ko: str = Field(default="", description="In Korean.")
    en: str = Field(default="", description="In English.")


class ShotPool(Section):
    """Which rows of the shots' file may be drawn."""

    field: str = Field(default="text", description="The field whose length counts, as it stands in the file.")
    max_tokens: Count | None = Field(default=None, description="Longest text in tokens, special tokens included.")


class Task(Section):
    """Everything that is asked of a model, and nothing about the model."""

    kind: Literal["choice"] = Field("choice", description="One of several given answers is chosen.")
    name: str = Field(description="Name of the task.", min_length=1)
    title: Words = Field(Words(), description="A line for tables.")
    description: Words = Field(Words(), description="A sentence for reports.")
    format: Literal["auto", "alpaca", "prompt-completion", "squad", "table", "datasets"] = Field(
        "auto", description="What the files hold; `auto` looks at their content."
    )
    columns: dict[str, str] = Field(description="Field of the task: column of the file. `label` is needed.")
    clean: dict[str, Literal["hangul", "strip"]] = Field(
        default_factory=dict, description="Cleaning per field, of items and shots."
    )
    prompt: str = Field(description="What is asked of an item; `{field}` stands for a field.")
    labels: dict[str, str] = Field(description="Label in the file: the text that answers the prompt.", min_length=2)
    shot_separator: str = Field("\n", description="What follows the answer of a shot.")
    num_shots: int = Field(0, ge=0, description="Examples with answers before each item.")
    shot_pool: ShotPool = Field(ShotPool(), description="Which rows may be shots.")
    shot_rule: Literal["per-item", "fixed"] = Field(
        "per-item", description="Draw shots anew for each item, or once for all items."
    )
    shot_seed: int = Field(1234, ge=0, description="Seeds the draw of shots.")
    items: Count | Literal["all"] = Field("all", description="How many items are drawn; all: the file in its order.")
    item_seed: int = Field(1234, ge=0, lt=2**32, description="Seeds the draw of items.")
    scorings: list[Scoring] = Field(["likelihood"], description="How an answer is read off.", min_length=1)
    normalisation: Literal["per-token", "per-character"] | None = Field(
        None, description="What a likelihood is divided by; none: nothing."
    )
    metric: Literal["accuracy"] = Field("accuracy", description="What is counted.")
    overflow: Literal["keep_out", "drop_shots"] = Field(
        "keep_out", description="An item too long for the model: keep it out, or drop shots from the front."
    )

    @model_validator(mode="after")
    def _check(self) -> Task:
        fields = [name for name in self.columns if name != LABEL]
        if LABEL not in self.columns:
            raise ValueError(f"columns must say which column holds the label, for example {LABEL}: sentiment")
        for name in [*PLACEHOLDER.findall(self.prompt), *self.clean]:
            if name not in fields:
                raise ValueError(
                    f"the field {name!r} is used but not in columns{suggest(name, fields)}; there are: "
                    f"{', '.join(fields) or 'none'}"
                )
        if not PLACEHOLDER.search(self.prompt):
            raise ValueError("the prompt names no field, so every item would be asked alike; write {text} in it")
        if self.num_shots and self.shot_pool.max_tokens and self.shot_pool.field not in fields:
            raise ValueError(f"shot_pool.field {self.shot_pool.field!r} is not in columns: {', '.join(fields)}")
        if len(set(self.words)) < len(self.words) or not all(self.words):
            raise ValueError(f"labels need words that differ and are not blank, but are {list(self.words)}")
        if len(set(self.scorings)) < len(self.scorings):
            raise ValueError(f"scorings names one twice: {self.scorings}")
        return self

    @property
    def words(self) -> tuple[str, ...]:
        """The answers as words, without white space, in the order of `labels`."""
        return tuple(answer.strip() for answer in self.labels.values())


def adjust_task(
    task: Task, *, num_shots: int | None = None, limit: int | str | None = None, seed: int | None = None
) -> Task:
    """Return a task with what the command line overrides; `limit` is a number of items or "all".

    Raises ConfigError for a value that cannot be.
    """
    given: Mapping[str, Any] = {"num_shots": num_shots, "items": limit, "shot_seed": seed}
    flags = {key: value for key, value in given.items() if value is not None}
    return resolve(Task, [Layer("task", to_mapping(task)), Layer("flag", flags)]).settings if flags else task
