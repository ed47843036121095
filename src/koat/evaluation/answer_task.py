"""An answer task: questions on a text that a model answers in its own words. Read from YAML, `kind: answer`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from koat.core.config import Layer, Section, resolve, to_mapping
from koat.core.settings import Template
from koat.evaluation.task import Count, Words


class AnswerTask(Section):
    """What is asked, how long a model may write, and what is counted; articles and answers stand in the file."""

    kind: Literal["answer"] = Field("answer", description="Answers are written and compared with the right ones.")
    name: str = Field(description="Name of the task.", min_length=1)
    title: Words = Field(Words(), description="A line for tables.")
    description: Words = Field(Words(), description="A sentence for reports.")
    format: Literal["auto", "alpaca", "prompt-completion", "squad", "table", "datasets"] = Field(
        "auto", description="What the file holds; `auto` looks at its content."
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Field of the template: column of the file, as in data.columns; `output` is the right answer. "
        "Left out, question and answer in a table are these.",
    )
    template: Template = Field(
        "koalpaca-context", description="Prompt template of a model that was trained with none of its own."
    )
    items: Count | Literal["all"] = Field("all", description="How many items are drawn; all: the file in its order.")
    item_seed: int = Field(1234, ge=0, lt=2**32, description="Seeds the draw of items.")
    max_new_tokens: Count = Field(48, description="Longest answer in tokens.")
    until: list[str] = Field(["\n"], description="Texts that end an answer, besides the model's own end of text.")


def adjust_answers(task: AnswerTask, limit: int | str | None = None) -> AnswerTask:
    """Return a task with the number of items that the command line asks for: a number or "all"."""
    if limit is None:
        return task
    return resolve(AnswerTask, [Layer("task", to_mapping(task)), Layer("flag", {"items": limit})]).settings
