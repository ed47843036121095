"""Settings, an accelerator, and the tensors of adapters, for tests of the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def accelerator() -> Any:
    """One process on the CPU."""
    from accelerate import Accelerator

    return Accelerator(cpu=True)


@pytest.fixture(scope="session")
def make_settings() -> Callable[..., Any]:
    """`make_settings(**options)`: training settings of a short run."""
    from koat.core.settings import TrainingSettings

    def make(**options: Any) -> Any:
        return TrainingSettings(**{"batch_size": 4, "learning_rate": 1e-2, "max_steps": 5, **options})

    return make


@pytest.fixture(scope="session")
def measure_distance() -> Callable[..., float]:
    """`measure_distance(found, expected)`: norm of the difference over the norm, over all tensors of a state."""

    def measure(found: dict[str, Any], expected: dict[str, Any]) -> float:
        assert found.keys() == expected.keys()
        difference = sum(float((found[name] - tensor).double().square().sum()) for name, tensor in expected.items())
        size = sum(float(tensor.double().square().sum()) for tensor in expected.values())
        return float((difference / size) ** 0.5)

    return measure
