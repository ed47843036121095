"""Which examples make up each optimizer step. A function of seed and epoch alone, so that resuming is exact."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from typing import Literal

from koat.core.sequence import Sequence

LOOKAHEAD = 64
"""How many groups are looked at to fill a step without cutting a group in two."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The examples of every step of a run, as indices into the training sequences."""

    sequences: ListLike[Sequence]
    kind: Literal["shuffled", "grouped"]
    batch_size: int
    num_steps: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the data."""
        return math.ceil(len(self.sequences) / self.batch_size)

    def order_epoch(self, epoch: int) -> list[list[int]]:
        """Return the steps of one epoch, each a list of example indices."""
        rng = random.Random(f"{self.seed}-{epoch}")
        if self.kind == "shuffled":
            order = list(range(len(self.sequences)))
            rng.shuffle(order)
            return [order[at : at + self.batch_size] for at in range(0, len(order), self.batch_size)]
        groups = group_examples(self.sequences)
        rng.shuffle(groups)
        return fill_steps(groups, self.batch_size)

    def walk_steps(self, start: int) -> Iterator[list[int]]:
        """Yield the examples of each step from step `start` (counted from 0) to the last."""
        for step in range(start, self.num_steps):
            epoch, place = divmod(step, self.steps_per_epoch)
            if step == start or place == 0:
                order = self.order_epoch(epoch)
            yield order[place]

    def begins_epoch(self, step: int) -> bool:
        """Whether a step is the first of a later pass over the data, where losses drop by nature."""
        return step >= self.steps_per_epoch and step % self.steps_per_epoch == 0


def plan_steps(
    sequences: ListLike[Sequence],
    kind: Literal["shuffled", "grouped"],
    batch_size: int,
    epochs: float,
    max_steps: int | None,
    seed: int,
) -> StepPlan:
    """Plan a run of `max_steps`, or else of `epochs` passes over the data."""
    num_steps = max_steps or max(1, round(epochs * math.ceil(len(sequences) / batch_size)))
    return StepPlan(sequences, kind, batch_size, num_steps, seed)


def group_examples(sequences: ListLike[Sequence]) -> list[list[int]]:
    """Return the indices of sequences by group; a sequence without a group stands alone."""
    groups: dict[str, list[int]] = {}
    for index, sequence in enumerate(sequences):
        groups.setdefault(sequence.group or f"\0{index}", []).append(index)
    return list(groups.values())


def fill_steps(groups: ListLike[list[int]], batch_size: int) -> list[list[int]]:
    """Fill steps of exactly `batch_size` examples (the last may be smaller), cutting few groups.

    Takes groups in order; a group that does not fit waits while a later one that does is taken. Only when
    none of the next `LOOKAHEAD` fits is a group divided between two steps.
    """
    waiting, steps, step = deque(groups), [], list[int]()
    while waiting:
        room = batch_size - len(step)
        near = range(min(LOOKAHEAD, len(waiting)))
        fitting = next((place for place in near if len(waiting[place]) <= room), None)
        if fitting is None:
            group = waiting.popleft()
            step += group[:room]
            waiting.appendleft(group[room:])
        else:
            step += waiting[fitting]
            del waiting[fitting]
        if len(step) == batch_size:
            steps.append(step)
            step = []
    return [*steps, step] if step else steps
