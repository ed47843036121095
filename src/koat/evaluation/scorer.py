"""Score choices: every context, shot and choice that requests share goes through the model once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from koat.core.errors import ModelError
from koat.core.sequence import supervise_from
from koat.evaluation.protocol import ChoiceRequest
from koat.forest.score import Layout, cut_sequences, score_tokens, sum_by_owner, unwrap

BLOCK = 256
"""Requests that are laid out together; sorted, so that little sharing is lost between blocks."""
Progress = Callable[[int, int], None]
"""Called with the number of requests done and the number of all."""


@dataclass(frozen=True, slots=True)
class ItemScore:
    """What a model says to one request: each choice's log-probability and length, and its favourite token."""

    choice_logprobs: tuple[float, ...]
    choice_num_tokens: tuple[int, ...]
    greedy_token_id: int


@dataclass(frozen=True, slots=True)
class ScoredRequests:
    """Scores in the order of the requests, and what they cost.

    `num_tokens` counts every context with each of its choices, `num_unique_tokens` what was computed.
    """

    scores: list[ItemScore]
    num_tokens: int
    num_unique_tokens: int


@torch.no_grad()
def score_requests(
    model: nn.Module,
    layout: Layout,
    requests: Sequence[ChoiceRequest],
    *,
    token_budget: int = 4096,
    on_progress: Progress | None = None,
) -> ScoredRequests:
    """Score every choice of every request, without dropout, in the type that the caller's autocast sets.

    `token_budget` bounds the tokens of a micro-batch; the scores do not depend on it, nor on the order of
    requests. Raises ModelError when the model returns no numbers.
    """
    for request in requests:
        if not request.context_ids or not all(request.choices):
            raise ValueError(f"request {request.item_id!r} has an empty context or choice: nothing predicts a token")
    order = _order_requests(requests, layout)
    found: dict[int, ItemScore] = {}
    num_tokens = num_unique = 0
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), BLOCK):
            block = order[start : start + BLOCK]
            scores, tokens, unique = _score_block(model, layout, [requests[index] for index in block], token_budget)
            found.update(zip(block, scores, strict=True))
            num_tokens, num_unique = num_tokens + tokens, num_unique + unique
            if on_progress is not None:
                on_progress(len(found), len(requests))
    finally:
        model.train(was_training)
    return ScoredRequests([found[index] for index in range(len(requests))], num_tokens, num_unique)


def _order_requests(requests: Sequence[ChoiceRequest], layout: Layout) -> list[int]:
    """Put what can share side by side; where nothing is shared, what is of one length, the longest first."""
    if layout.shares:
        return sorted(range(len(requests)), key=lambda index: requests[index].context_ids)
    return sorted(range(len(requests)), key=lambda index: -requests[index].num_tokens)


def _score_block(
    model: nn.Module, layout: Layout, requests: Sequence[ChoiceRequest], token_budget: int
) -> tuple[list[ItemScore], int, int]:
    pairs = [(request, choice) for request in requests for choice in request.choices]
    sequences = [supervise_from(request.context_ids + choice, len(request.context_ids)) for request, choice in pairs]
    device = unwrap(model).device
    logprobs = torch.zeros(len(sequences), dtype=torch.float64, device=device)
    greedy = torch.full((len(sequences),), -1, dtype=torch.int64, device=device)
    num_unique = 0
    for batch in cut_sequences(sequences, layout, token_budget):
        moved = batch.to(device)
        values, likeliest = score_tokens(model, moved, layout)
        logprobs += sum_by_owner(values.double(), moved.owner, len(sequences))
        first = _find_firsts(moved.owner)
        greedy[moved.owner[first]] = likeliest[first]
        num_unique += batch.num_tokens
    if not bool(logprobs.isfinite().all()):
        raise ModelError(
            "the model's log-probabilities are not numbers (overflow, or broken weights). Try "
            "model.dtype=float32; if that does not help, the weights or the adapter are damaged."
        )
    return _collect_scores(requests, logprobs, greedy), sum(map(len, sequences)), num_unique


def _find_firsts(owner: Tensor) -> Tensor:
    """Return where each owner's first prediction stands; its predictions lie in order, side by side."""
    before = torch.cat([owner.new_full((1,), -1), owner[:-1]])
    return (owner != before).nonzero().squeeze(1)


def _collect_scores(requests: Sequence[ChoiceRequest], logprobs: Tensor, greedy: Tensor) -> list[ItemScore]:
    values, likeliest = logprobs.tolist(), greedy.tolist()
    scores, start = [], 0
    for request in requests:
        end = start + len(request.choices)
        lengths = tuple(len(choice) for choice in request.choices)
        scores.append(ItemScore(tuple(values[start:end]), lengths, likeliest[start]))
        start = end
    return scores
