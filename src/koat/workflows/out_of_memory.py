"""What to say when memory runs out in the middle of the work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from koat.core.errors import KoatError
from koat.core.out_of_memory import is_out_of_memory

TO_TRAIN = (
    "Lower training.tokens_per_microbatch, set training.activation_checkpointing=true or model.quantisation=nf4; "
    "`koat plan --fit 24GB` says what fits a card."
)
TO_EVALUATE = "Lower the tokens that go through at once (--tokens), or set model.dtype=bfloat16 (--dtype bfloat16)."


@contextmanager
def explain_out_of_memory(kind: type[KoatError], what: str, advice: str) -> Iterator[None]:
    """Turn an allocator's error within a block, or a function that it decorates, into one that says what to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise kind(f"Memory ran out {what}: {first} {advice}") from error
