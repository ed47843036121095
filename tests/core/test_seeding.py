"""Random numbers: the same every time, others for each step and process, nobody else's disturbed."""

from __future__ import annotations

import torch

from koat.core.seeding import seed_step, seeded


def test_each_step_of_each_process_has_draws_of_its_own() -> None:
    def draw(*of: int) -> tuple[float, ...]:
        seed_step(*of)
        return tuple(torch.rand(4).tolist())

    places = [(seed, step, process) for seed in (0, 1) for step in (0, 1, 2) for process in (0, 1)]
    first = {place: draw(*place) for place in places}
    assert len(set(first.values())) == len(places)
    assert {place: draw(*place) for place in reversed(places)} == first


def test_a_seeded_block_leaves_the_generator_where_it_was() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with seeded(1):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with seeded(1):
        assert torch.equal(torch.rand(3), inside)
