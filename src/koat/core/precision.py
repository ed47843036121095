"""Float32 products with all their digits, for comparisons that look for a fault and not for rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial


@contextmanager
def exact_products() -> Iterator[None]:
    """Multiply float32 matrices in float32 within the block, though TF32 (1e-3) or less was allowed outside."""
    import torch

    matmul = torch.backends.cuda.matmul
    try:
        kept, exact, put = torch.get_float32_matmul_precision(), "highest", torch.set_float32_matmul_precision
    except RuntimeError:  # PyTorch's older interface does not read what was set by the newer one
        kept, exact, put = matmul.fp32_precision, "ieee", partial(setattr, matmul, "fp32_precision")
    if kept == exact:
        yield
        return
    put(exact)
    try:
        yield
    finally:
        put(kept)
