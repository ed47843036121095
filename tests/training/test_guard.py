"""The guard stops at what cannot be mended, speaks up at divergence, and explains the steps between epochs."""

from __future__ import annotations

import math

import pytest

from koat.core.errors import TrainingError
from koat.training.guard import PATIENCE, RISE, LossGuard


def feed(guard: LossGuard, losses: list[float], begin: int = 1) -> list[str | None]:
    """Return the guard's remarks on a run of losses."""
    return [guard.judge(begin + number, loss, 1.0, starts_epoch=False) for number, loss in enumerate(losses)]


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_what_is_no_number_ends_training(loss: float, norm: float) -> None:
    guard = LossGuard()
    feed(guard, [1.0] * 5)
    with pytest.raises(TrainingError, match=r"Step 6: .*training\.learning_rate"):
        guard.judge(6, loss, norm, starts_epoch=False)


def test_ordinary_noise_is_left_alone() -> None:
    losses = [2.0 + 0.5 * math.sin(3.7 * number) - 0.002 * number for number in range(300)]
    assert feed(LossGuard(), losses) == [None] * 300


def test_divergence_is_named_once_after_patience() -> None:
    guard = LossGuard()
    assert feed(guard, [1.0] * 40) == [None] * 40
    remarks = feed(guard, [RISE * 1.0 + 0.1] * PATIENCE, begin=41)
    assert remarks[:-1] == [None] * (PATIENCE - 1)
    assert remarks[-1] is not None
    assert "divergence" in remarks[-1]
    assert f"step {40 + PATIENCE}" in remarks[-1]


def test_a_spike_is_no_divergence() -> None:
    losses = [1.0] * 20 + ([9.0] * (PATIENCE - 1) + [1.0]) * 2
    assert feed(LossGuard(), losses) == [None] * len(losses)


@pytest.mark.parametrize(
    ("loss", "starts_epoch", "speaks"), [(0.7, True, True), (0.7, False, False), (0.9, True, False)]
)
def test_the_step_down_at_an_epoch_is_explained(loss: float, starts_epoch: bool, speaks: bool) -> None:
    guard = LossGuard()
    feed(guard, [1.0] * 20)
    remark = guard.judge(21, loss, 1.0, starts_epoch=starts_epoch)
    assert (remark is not None) == speaks
    if remark is not None:
        assert "epoch" in remark
        assert "validation" in remark
        assert guard.judge(22, 0.5, 1.0, starts_epoch=True) is None  # once is enough
