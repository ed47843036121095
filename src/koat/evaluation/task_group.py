"""A group of lm-evaluation-harness' tasks with the shots of each and the metrics that others published."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from koat.core.config import Section
from koat.core.errors import ConfigError, suggest
from koat.evaluation.group_means import average_group
from koat.evaluation.result import TaskResult
from koat.evaluation.task import Words


class GroupPart(Section):
    """One task of a group (or a group of tasks within it)."""

    task: str = Field(description="Name of the task or group in lm-evaluation-harness.", min_length=1)
    num_shots: int = Field(0, ge=0, description="Examples before each item.")
    label: str = Field(description="What tables call it.", min_length=1)
    views: dict[str, str] = Field(
        description="Whose table shows which metric: name of the table, metric.", min_length=1
    )
    weigh: Literal["items", "tasks"] = Field(
        "items", description="In the mean over several tasks, what counts alike: each item or each task."
    )


class TaskGroup(Section):
    """Tasks that are asked together, and the tables that may be made of them."""

    kind: Literal["group"] = Field("group", description="A group of lm-evaluation-harness' tasks.")
    name: str = Field(description="Name of the group.", min_length=1)
    title: Words = Field(Words(), description="A line for tables.")
    description: Words = Field(Words(), description="A sentence for reports.")
    parts: list[GroupPart] = Field(description="The tasks.", min_length=1)


def make_views(group: TaskGroup, results: Sequence[Sequence[TaskResult]]) -> list[dict[str, Any]]:
    """Return each table of a group, JSON-safe: a row per task with the metric that the table shows, and their mean.

    `results` holds the results of each part, more than one where the part is itself a group.
    """
    views: dict[str, list[dict[str, Any]]] = {}
    for part, found in zip(group.parts, results, strict=True):
        means = average_group(found)
        for name, scoring in part.views.items():
            if scoring not in means:
                raise ConfigError(
                    f"{group.name}: the view {name!r} shows {scoring!r} of {part.task}, which has none by item"
                    f"{suggest(scoring, means)}; there are: {', '.join(means) or 'none'}."
                )
            mean = means[scoring]
            score = mean.tasks if part.weigh == "tasks" else mean.items
            weighed = f"mean over {len(found)} tasks" if len(found) > 1 and part.weigh == "tasks" else ""
            row = {"label": part.label, "scoring": scoring, "num_shots": found[0].num_shots, "weighed": weighed}
            views.setdefault(name, []).append(row | score.to_mapping())
    return [
        {"name": name, "rows": rows, "mean": sum(row["value"] for row in rows) / len(rows)}
        for name, rows in views.items()
    ]
