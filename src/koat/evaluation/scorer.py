"""Score choices: every context, shot and choice that requests share goes through the model once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from koat.core.sequence import supervise_from
from koat.evaluation.protocol import ChoiceRequest
from koat.evaluation.spans import order_tokens, score_block, settled
from koat.forest.score import Layout

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
    order = order_requests(requests, layout)
    found: dict[int, ItemScore] = {}
    num_tokens = num_unique = 0
    with settled(model):
        for start in range(0, len(order), BLOCK):
            block = order[start : start + BLOCK]
            asked = [requests[index] for index in block]
            sequences = [
                supervise_from(request.context_ids + choice, len(request.context_ids))
                for request in asked
                for choice in request.choices
            ]
            scores = score_block(model, layout, sequences, token_budget)
            found.update(zip(block, _collect_scores(asked, scores.logprobs, scores.first), strict=True))
            num_tokens += sum(map(len, sequences))
            num_unique += scores.num_unique_tokens
            if on_progress is not None:
                on_progress(len(found), len(requests))
    return ScoredRequests([found[index] for index in range(len(requests))], num_tokens, num_unique)


def order_requests(requests: Sequence[ChoiceRequest], layout: Layout) -> list[int]:
    """Put requests with like contexts side by side; where nothing is shared, the longest first."""
    if layout.shares:
        return order_tokens([request.context_ids for request in requests], layout)
    return sorted(range(len(requests)), key=lambda index: -requests[index].num_tokens)


def _collect_scores(requests: Sequence[ChoiceRequest], logprobs: Tensor, greedy: Tensor) -> list[ItemScore]:
    values, likeliest = logprobs.tolist(), greedy.tolist()
    scores, start = [], 0
    for request in requests:
        end = start + len(request.choices)
        lengths = tuple(len(choice) for choice in request.choices)
        scores.append(ItemScore(tuple(values[start:end]), lengths, likeliest[start]))
        start = end
    return scores
