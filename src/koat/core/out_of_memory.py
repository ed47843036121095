"""Whether an error says that memory ran out: which speaks of the machine, never of what was tried on it."""

from __future__ import annotations

WORDS = (
    "can't allocate memory",
    "not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
)
"""What PyTorch's allocator says on a CPU, and CUDA, its libraries and Triton on a GPU, in errors of other kinds."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator, a GPU's or a CPU's, had no more to give."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)
