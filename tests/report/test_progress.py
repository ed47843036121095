"""Progress lines: what is left is reckoned from what this session did."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest

from koat.report import progress
from koat.report.progress import TrainingDisplay


class Terminal(io.StringIO):
    """A stream that is looked at by a person."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("first", [1, 501])
def test_the_time_left_of_a_resumed_run(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten steps in ten seconds, ten to go: ten seconds, wherever the run began."""
    clock, stream = SimpleNamespace(now=0.0), Terminal()
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream))
    display = TrainingDisplay()
    for step in range(first, first + 10):
        clock.now += 1
        display.show(SimpleNamespace(
            step=step, num_steps=first + 19, tokens=5, seconds=1.0, loss=2.0, remark=None, validation_loss=None
        ))  # fmt: skip
    assert stream.getvalue().rstrip().endswith("10 s left")
