"""Every example once an epoch, steps of one size, groups kept whole where they fit, nothing but the seed."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from koat.core.sequence import Sequence
from koat.training.sampler import fill_steps, group_examples, plan_steps

KINDS = ("shuffled", "grouped")


def make_examples(sizes: list[int]) -> list[Sequence]:
    """Return examples in groups of the given sizes, in mixed order; groups of one have no name."""
    names = [f"article {number}" if size > 1 else "" for number, size in enumerate(sizes) for _ in range(size)]
    random.Random(len(sizes)).shuffle(names)
    return [Sequence((1, 2), (False, True), group=name) for name in names]


def count_cut_groups(steps: list[list[int]], examples: list[Sequence]) -> int:
    """Return how many named groups stand in more than one step."""
    homes: dict[str, set[int]] = {}
    for number, step in enumerate(steps):
        for index in step:
            homes.setdefault(examples[index].group, set()).add(number)
    homes.pop("", None)
    return sum(len(home) > 1 for home in homes.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 2, 5, 7, 16, 100])
def test_every_example_once_in_steps_of_one_size(kind: str, batch_size: int) -> None:
    rng = random.Random(batch_size)
    for trial in range(20):
        examples = make_examples([rng.randint(1, 12) for _ in range(rng.randint(1, 30))])
        plan = plan_steps(examples, kind, batch_size, 1, None, seed=trial)
        for epoch in (0, 1, 5):
            steps = plan.order_epoch(epoch)
            assert len(steps) == plan.steps_per_epoch == math.ceil(len(examples) / batch_size)
            assert {len(step) for step in steps[:-1]} <= {batch_size}
            assert 1 <= len(steps[-1]) <= batch_size
            assert Counter(index for step in steps for index in step) == Counter(range(len(examples)))


@pytest.mark.parametrize("kind", KINDS)
def test_order_depends_on_seed_and_epoch_alone(kind: str) -> None:
    examples = make_examples([3, 1, 4, 1, 5, 9, 2, 6])
    plan, again = (plan_steps(examples, kind, 4, 3, None, seed=7) for _ in range(2))
    random.seed(1)
    first = [plan.order_epoch(epoch) for epoch in range(4)]
    random.seed(2)
    assert [again.order_epoch(epoch) for epoch in (3, 2, 1, 0)] == first[::-1]
    assert len({str(order) for order in first}) == 4
    assert plan_steps(examples, kind, 4, 3, None, seed=8).order_epoch(0) != first[0]


def test_groups_stay_whole_where_they_fit() -> None:
    # Sizes that can fill every step exactly: whatever the order, few groups need to be cut.
    examples = make_examples([6] * 40 + [4] * 40 + [2] * 40 + [1] * 80)
    plan = plan_steps(examples, "grouped", 16, 1, None, seed=0)
    cut = [count_cut_groups(plan.order_epoch(epoch), examples) for epoch in range(10)]
    assert max(cut) <= 3
    shuffled = plan_steps(examples, "shuffled", 16, 1, None, seed=0)
    assert count_cut_groups(shuffled.order_epoch(0), examples) > 60


def test_groups_of_one_size_are_cut_only_at_the_edge_of_a_step() -> None:
    examples = make_examples([6] * 64)
    steps = plan_steps(examples, "grouped", 16, 1, None, seed=3).order_epoch(0)
    for step in steps:
        sizes = Counter(examples[index].group for index in step)
        assert sum(size < 6 for size in sizes.values()) <= 2


def test_a_group_larger_than_a_step_fills_steps_of_its_own() -> None:
    assert fill_steps([[0, 1, 2, 3, 4, 5, 6]], 3) == [[0, 1, 2], [3, 4, 5], [6]]


def test_a_group_that_does_not_fit_waits_for_one_that_does() -> None:
    assert fill_steps([[0, 1, 2], [3, 4, 5], [6]], 4) == [[0, 1, 2, 6], [3, 4, 5]]


def test_sequences_without_a_group_stand_alone() -> None:
    plain = [Sequence((1,), (False,)) for _ in range(3)]
    named = [Sequence((1,), (False,), group="a"), Sequence((1,), (False,), group="a")]
    assert group_examples([plain[0], named[0], plain[1], named[1], plain[2]]) == [[0], [1, 3], [2], [4]]


@pytest.mark.parametrize(
    ("epochs", "max_steps", "expected"), [(1, None, 4), (2.5, None, 10), (0.1, None, 1), (3, 7, 7), (0.01, 50, 50)]
)
def test_length_of_a_run(epochs: float, max_steps: int | None, expected: int) -> None:
    assert plan_steps(make_examples([1] * 13), "shuffled", 4, epochs, max_steps, 0).num_steps == expected
