"""Score continuations: how likely a model finds the tokens behind a context, and whether it would write them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from koat.core.errors import ModelError
from koat.core.sequence import Sequence as TokenSequence
from koat.core.sequence import supervise_from
from koat.forest.score import Layout, sum_by_owner, unwrap
from koat.forest.stream import score_forest

BLOCK = 1024
"""Spans that are laid out together; sorted, so that little sharing is lost between blocks."""
Progress = Callable[[int], None]
"""Called with the number of spans that were done since the last call."""


@dataclass(frozen=True, slots=True)
class Span:
    """A context and the continuation that is scored, as token ids; neither may be empty."""

    context_ids: tuple[int, ...]
    continuation_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.context_ids or not self.continuation_ids:
            raise ValueError("a span needs a context and a continuation: nothing else predicts a token")

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Context and continuation as one sequence."""
        return self.context_ids + self.continuation_ids


@dataclass(frozen=True, slots=True)
class SpanScores:
    """Per span, in the order given, its log-probability and whether greedy decoding would write it.

    `num_tokens` counts every context with its continuation, `num_unique_tokens` what was computed.
    """

    logprobs: list[float]
    greedy: list[bool]
    num_tokens: int
    num_unique_tokens: int


@dataclass(frozen=True, slots=True)
class BlockScores:
    """What a model says to S sequences: per sequence the sum of its log-probabilities `[S]`, how many targets greedy
    decoding misses `[S]`, the token id that it likes best for the first target `[S]`; and the tokens computed."""

    logprobs: Tensor
    missed: Tensor
    first: Tensor
    num_unique_tokens: int


@torch.no_grad()
def score_spans(
    model: nn.Module,
    layout: Layout,
    spans: Sequence[Span],
    *,
    token_budget: int = 8192,
    on_progress: Progress = lambda num_done: None,
) -> SpanScores:
    """Score every span, without dropout, in the type that the caller's autocast sets.

    `token_budget` bounds the tokens of a micro-batch; the scores do not depend on it, nor on the order of
    spans. Raises ModelError when the model returns no numbers.
    """
    order = order_tokens([span.token_ids for span in spans], layout)
    logprobs, greedy = [0.0] * len(spans), [False] * len(spans)
    num_unique = 0
    with settled(model):
        for start in range(0, len(order), BLOCK):
            block = order[start : start + BLOCK]
            sequences = [supervise_from(spans[index].token_ids, len(spans[index].context_ids)) for index in block]
            found = score_block(model, layout, sequences, token_budget)
            for index, value, misses in zip(block, found.logprobs.tolist(), found.missed.tolist(), strict=True):
                logprobs[index], greedy[index] = value, misses == 0
            num_unique += found.num_unique_tokens
            on_progress(len(block))
    return SpanScores(logprobs, greedy, sum(len(span.token_ids) for span in spans), num_unique)


def order_tokens(token_ids: Sequence[tuple[int, ...]], layout: Layout) -> list[int]:
    """Put what can share side by side; where nothing is shared, what is of one length, the longest first."""
    if layout.shares:
        return sorted(range(len(token_ids)), key=token_ids.__getitem__)
    return sorted(range(len(token_ids)), key=lambda index: -len(token_ids[index]))


@contextmanager
def settled(model: nn.Module) -> Iterator[None]:
    """Within the block, a model is in evaluation mode: it draws no dropout."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def score_block(model: nn.Module, layout: Layout, sequences: Sequence[TokenSequence], token_budget: int) -> BlockScores:
    """Score sequences that are laid out together. Raises ModelError when the model returns no numbers."""
    count, device = len(sequences), unwrap(model).device
    logprobs = torch.zeros(count, dtype=torch.float64, device=device)
    missed = torch.zeros(count, dtype=torch.int64, device=device)
    first = torch.full((count,), -1, dtype=torch.int64, device=device)
    num_unique = 0
    for part in score_forest(model, layout, sequences, token_budget):
        logprobs += sum_by_owner(part.logprobs.double(), part.owner, count)
        missed += sum_by_owner((part.likeliest != part.target).long(), part.owner, count)
        begins = find_firsts(part.owner)
        fresh = begins[first[part.owner[begins]] < 0]
        first[part.owner[fresh]] = part.likeliest[fresh]
        num_unique += part.num_tokens
    if not bool(logprobs.isfinite().all()):
        raise ModelError(
            "the model's log-probabilities are not numbers (overflow, or broken weights). Try "
            "model.dtype=float32; if that does not help, the weights or the adapter are damaged."
        )
    return BlockScores(logprobs, missed, first, num_unique)


def find_firsts(owner: Tensor) -> Tensor:
    """Return where each owner's first prediction here stands; its predictions lie in order, side by side."""
    before = torch.cat([owner.new_full((1,), -1), owner[:-1]])
    return (owner != before).nonzero().squeeze(1)
