"""Drawing random numbers that are the same every time, and leave everybody else's as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


def seed_step(seed: int, step: int, process: int = 0) -> None:
    """Draw PyTorch's random numbers from a run's seed, a step and a process, whatever was drawn before."""
    import torch

    torch.manual_seed(int(np.random.SeedSequence((seed, step, process)).generate_state(1)[0]))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw PyTorch's random numbers from `seed` within the block; the generators of CPU and GPUs are put back."""
    import torch

    gpus = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(seed)
        yield
