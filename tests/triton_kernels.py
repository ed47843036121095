"""koat's Triton kernels for tests: on a GPU, else as Triton interprets them (tests/conftest.py)."""

from __future__ import annotations

import importlib
from types import ModuleType

import numpy as np
import pytest
import torch


def load_kernels(name: str) -> ModuleType:
    """Return a module of kernels, or skip the test that wants it where they cannot run."""
    pytest.importorskip("triton", reason="Triton is not installed; it comes with PyTorch for CUDA")
    if not torch.cuda.is_available() and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("Triton's interpreter does not run loops under NumPy 2.4 and later")
    return importlib.import_module(name)
