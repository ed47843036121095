"""Watch the loss: stop at what cannot be mended, speak up at what looks wrong, explain what only looks so."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

from koat.core.errors import TrainingError

WINDOW = 50
RISE = 1.5
"""Loss above this many times the recent median, for `PATIENCE` steps, is called a divergence."""
PATIENCE = 10


def check_validation(step: int, loss: float) -> None:
    """Raise TrainingError for a validation loss that is no finite number: none after it could be told from the best."""
    if not math.isfinite(loss):
        raise TrainingError(
            f"Step {step}: validation loss {loss}, while training's is finite. The model overflows on some validation "
            "text. Train anew in training.precision=float32, or with a lower training.learning_rate; --resume would "
            "come to the same step. The run's last checkpoint, if it has one, is whole."
        )


class LossGuard:
    """Judges each step's loss and gradient norm against the recent past."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._high = 0
        self._explained = False

    def judge(self, step: int, loss: float, gradient_norm: float, starts_epoch: bool) -> str | None:
        """Return a remark about this step, or None.

        Raises TrainingError when loss or gradient is not a finite number: nothing after that can be trusted.
        """
        if not math.isfinite(loss) or not math.isfinite(gradient_norm):
            raise TrainingError(
                f"Step {step}: loss {loss}, gradient norm {gradient_norm}. Training cannot go on from there. "
                "Train anew with a lower training.learning_rate, or in training.precision=float32 if this was not; "
                "--resume would come to the same step. The run's last checkpoint, if it has one, is whole."
            )
        usual = median(self._recent) if len(self._recent) >= 10 else None
        self._recent.append(loss)
        if usual is None:
            return None
        if starts_epoch and loss < 0.8 * usual and not self._explained:
            self._explained = True
            return (
                f"step {step}: a new epoch begins and the loss steps down from {usual:.3f} to {loss:.3f}. "
                "The model has seen these examples before; watch the validation loss, not this one."
            )
        self._high = self._high + 1 if loss > RISE * usual else 0
        if self._high == PATIENCE:
            self._high = 0
            return (
                f"step {step}: the loss has been {RISE} times its recent median for {PATIENCE} steps. "
                "This is divergence, not noise: lower training.learning_rate."
            )
        return None
