"""Memory that runs out in the middle is said with what to change; other errors pass as they are."""

from __future__ import annotations

import pytest
import torch

from koat.core.errors import TrainingError
from koat.workflows.out_of_memory import TO_TRAIN, explain_out_of_memory

AcceleratorError = getattr(torch, "AcceleratorError", RuntimeError)
"""PyTorch's own kind since 2.8."""


@explain_out_of_memory(TrainingError, "in training", TO_TRAIN)
def fail(error: Exception) -> None:
    """Stand for the work."""
    raise error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore than anyone wants to read."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        MemoryError("Unable to allocate 9 bytes."),
        AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported by anyone."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
)
def test_the_settings_to_change_are_named(error: Exception) -> None:
    with pytest.raises(TrainingError, match="tokens_per_microbatch") as caught:
        fail(error)
    assert "in training" in str(caught.value) and "anyone" not in str(caught.value)


def test_a_real_allocation_that_cannot_be_had() -> None:
    with pytest.raises(TrainingError), explain_out_of_memory(TrainingError, "in training", TO_TRAIN):
        torch.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.parametrize("text", ["of another kind", "CUDA error: an illegal memory access was encountered"])
def test_other_errors_pass(text: str) -> None:
    with pytest.raises(RuntimeError, match=text):
        fail(RuntimeError(text))
