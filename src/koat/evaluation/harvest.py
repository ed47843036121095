"""From files to items and shots: read, sample, and draw, so that the same seed gives the same questions."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from koat.core.errors import DataError, suggest
from koat.data.readers import clean_text, read_records
from koat.data.records import Record
from koat.evaluation.answer_task import AnswerTask
from koat.evaluation.task import LABEL, Task

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Item:
    """One question: its fields as they are asked (cleaned) and as they stand in the file, and its gold label.

    `gold` is the place of its label in the task's `labels`.
    """

    id: str
    fields: Mapping[str, str]
    raw: Mapping[str, str]
    gold: int


@dataclass(frozen=True, slots=True)
class Harvest:
    """The items of a file in its order, and how many rows were dropped because a field was empty."""

    items: list[Item]
    num_empty: int


def read_items(path: str, task: Task) -> Harvest:
    """Read a task's items from a file; rows with an empty field are dropped and counted.

    Raises DataError for a file that cannot be read, a missing column (with the nearest) and an unknown label.
    """
    records = read_records(path, format=task.format, columns=task.columns).records
    ids = [record.fields.get("id", "") for record in records]
    if "" in ids or len(set(ids)) < len(ids):
        ids = [str(number) for number in range(1, len(records) + 1)]
    items = [item for name, record in zip(ids, records, strict=True) if (item := _make_item(name, record, task))]
    if not items:
        raise DataError(f"{path}: no row has text in every field of the task {task.name!r}")
    return Harvest(items, len(records) - len(items))


def _make_item(name: str, record: Record, task: Task) -> Item | None:
    for field in task.columns:
        if field not in record.fields:
            raise DataError(
                f"{record.source}: the field {field!r} (column {task.columns[field]!r}) is missing"
                f"{suggest(task.columns[field], record.fields)}; the row has: {', '.join(record.fields)}"
            )
    label = record.fields[LABEL].strip()
    if label not in task.labels:
        raise DataError(
            f"{record.source}: the label is {label!r}, but the task {task.name!r} knows "
            f"{', '.join(map(repr, task.labels))}. Correct the row, or map the label in the task's `labels`"
        )
    raw = {field: record.fields[field] for field in task.columns if field != LABEL}
    if not all(raw.values()):
        return None
    fields = {
        field: clean_text(task.clean[field], text) if field in task.clean else text for field, text in raw.items()
    }
    return Item(name, fields, raw, list(task.labels).index(label))


def sample_items(items: Sequence[T], task: Task | AnswerTask) -> list[T]:
    """Return the items that are asked: all in order, or a draw without replacement.

    The draw is the one of `pandas.DataFrame.sample(n, random_state=seed)`, so published subsets come out. A
    smaller draw with the same seed is the beginning of a larger one.
    """
    if task.items == "all" or task.items >= len(items):
        return list(items)
    drawn = np.random.RandomState(task.item_seed).choice(len(items), task.items, replace=False)
    return [items[index] for index in drawn]


def pick_pool(items: Sequence[Item], task: Task, tokenizer: Any) -> list[Item]:
    """Return the items that may be shots: those whose text in the file is short enough, in file order."""
    limit = task.shot_pool.max_tokens
    if limit is None:
        return list(items)
    encoded = tokenizer([item.raw[task.shot_pool.field] for item in items]).input_ids
    return [item for item, token_ids in zip(items, encoded, strict=True) if len(token_ids) <= limit]


def draw_shots(pool: Sequence[Item], task: Task, num_items: int) -> list[list[Item]]:
    """Return each item's shots, by `random.sample` from a generator that starts at the task's seed.

    Raises DataError when the pool holds too few.
    """
    if len(pool) < task.num_shots:
        limit = task.shot_pool.max_tokens
        short = f" of at most {limit} tokens" if limit else ""
        raise DataError(
            f"the task {task.name!r} draws {task.num_shots} shots, but the file for shots has only "
            f"{len(pool)} rows{short}. Give a larger file with --shots-from, or fewer --shots"
        )
    source = random.Random(task.shot_seed)
    if task.shot_rule == "fixed":
        return [source.sample(pool, task.num_shots)] * num_items
    return [source.sample(pool, task.num_shots) for _ in range(num_items)]
