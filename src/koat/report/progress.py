"""Progress that people can read: one line that moves on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

LOG_SECONDS = 10.0


def format_seconds(seconds: float) -> str:
    """Return a duration in words: 48 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class ProgressLine:
    """Shows how far a piece of work is: rewrites one line on a terminal, prints one every ten seconds elsewhere."""

    def __init__(self, title: str, stream: TextIO | None = None) -> None:
        self._title, self._stream = title, stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._began = self._shown = time.monotonic()
        self._width = 0
        self.start = 0
        """What was done before this line began, in an earlier session."""

    def update(self, done: int, total: int, detail: str = "") -> None:
        """Say that `done` of `total` is done."""
        now = time.monotonic()
        last = done >= total
        if not last and now - self._shown < (0.2 if self._terminal else LOG_SECONDS):
            return
        self._shown = now
        elapsed = now - self._began
        left = elapsed / max(done - self.start, 1) * (total - done)
        ending = f"{format_seconds(elapsed)} in all" if last else f"{format_seconds(left)} left"
        text = " · ".join(part for part in (f"{self._title} {done}/{total}", detail, ending) if part)
        if self._terminal:
            self._stream.write("\r" + text.ljust(self._width) + ("\n" if last else ""))
            self._width = len(text)
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def say(self, text: str) -> None:
        """Print a line of its own between two states of the moving one."""
        if self._terminal:
            self._stream.write("\r" + " " * self._width + "\r")
        self._stream.write(text + "\n")
        self._stream.flush()


class TrainingDisplay:
    """Shows training steps on a progress line and says remarks aloud."""

    def __init__(self, title: str = "training") -> None:
        self._line = ProgressLine(title)
        self._tokens = 0
        self._seconds = 0.0
        self._loss: float | None = None

    def show(self, record: Any) -> None:
        """Show one step: smoothed loss, original tokens per second, time left."""
        if self._loss is None:
            self._line.start = record.step - 1
        self._tokens += record.tokens
        self._seconds += record.seconds
        self._loss = record.loss if self._loss is None else 0.9 * self._loss + 0.1 * record.loss
        rate = self._tokens / max(self._seconds, 1e-9)
        if record.remark:
            self._line.say(f"! {record.remark}")
        if record.validation_loss is not None:
            self._line.say(f"step {record.step}: validation loss {record.validation_loss:.4f}")
        self._line.update(record.step, record.num_steps, f"loss {self._loss:.3f} · {rate:,.0f} tokens/s")
