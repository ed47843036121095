"""From hidden states to log-probabilities, computing only the rows of the LM head that some target needs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from koat.forest.narrow import draws_dropout
from koat.forest.pack import Distinct

CHUNK_BYTES = 128 * 1024 * 1024
"""Float32 logits that exist at once; more are cut into chunks and rebuilt in the backward pass."""
CACHE_BYTES = 2 * 1024 * 1024
"""Float32 logits that are worked on together on a CPU; 2.6 times faster than all of 40 MB at once."""
GPU_BYTES = 32 * 1024 * 1024
"""The same on a GPU, where more would only take memory."""


def compute_logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """Apply a causal model's head to hidden rows `[S, d]`: the linear map, and what some families add.

    Gemma 2 caps its logits (`final_logit_softcapping`), Granite divides them (`logits_scaling`), Cohere
    multiplies them (`logit_scale`). A head that does anything else is found out by `koat.forest.verify`.
    """
    config: Any = model.config
    logits: Tensor = model.get_output_embeddings()(hidden)  # type: ignore[operator]
    if getattr(config, "logits_scaling", None) is not None:
        logits = logits / config.logits_scaling
    if getattr(config, "logit_scale", None) is not None:
        logits = logits * config.logit_scale
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


class TargetLogprobs(torch.autograd.Function):
    """Log-probabilities of targets, a few rows at a time: what is read twice is still in the cache the second time."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, row: Tensor, target: Tensor) -> Tensor:
        """Return what `gather_logprobs` does."""
        num_rows = count_cached_rows(logits)
        log_sum = torch.cat([torch.logsumexp(part.float(), -1) for part in torch.split(logits, num_rows)])
        ctx.save_for_backward(logits, log_sum, row, target)
        picked = logits.reshape(-1).index_select(0, row * logits.shape[-1] + target).float()
        return picked - log_sum.index_select(0, row)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of the logits: what a row's targets weigh, less that much of its probabilities.

        It is rounded to the logits' type once, whole: a target that is nearly sure has the small difference of two
        numbers near one.
        """
        logits, log_sum, row, target = ctx.saved_tensors
        weight = torch.zeros_like(log_sum).index_add_(0, row, gradients[0])
        slope, num_rows = torch.empty_like(logits), count_cached_rows(logits)
        parts = [torch.split(each, num_rows) for each in (logits, slope, log_sum, weight)]
        for part, into, lows, weights in zip(*parts, strict=True):
            into.copy_(torch.exp(part.float() - lows[:, None]).mul_(-weights[:, None]))
        place, order = torch.sort(row * logits.shape[-1] + target)
        own = sum_equal(place, gradients[0][order])
        at = row[order]
        share = torch.exp(logits.reshape(-1)[place].float() - log_sum[at])
        slope.view(-1).index_copy_(0, place, (own - weight[at] * share).to(slope.dtype))
        return slope, None, None


def sum_equal(keys: Tensor, values: Tensor) -> Tensor:
    """Return for each of the sorted `keys [P]` the sum of all `values [P]` that have it."""
    group = (keys != keys.roll(1)).cumsum(0)  # from 1 on, or 0 where all are equal
    return values.new_zeros(len(values) + 1).index_add_(0, group, values)[group]


def count_cached_rows(logits: Tensor) -> int:
    """Return how many float32 rows of `logits [S, V]` are worked on together."""
    size = GPU_BYTES if logits.device.type == "cuda" else CACHE_BYTES
    return max(1, size // (4 * logits.shape[-1]))


def gather_logprobs(logits: Tensor, row: Tensor, target: Tensor) -> Tensor:
    """Return log-probabilities `[P]` of `target[P]` under rows `row[P]` of `logits [S, V]`, in float32."""
    logprobs: Tensor = TargetLogprobs.apply(logits, row, target)  # type: ignore[no-untyped-call]
    return logprobs


def find_rows(source: Tensor, distinct: Distinct | None) -> tuple[Tensor, Tensor]:
    """Return the distinct numbers `[S]` of `source`, ascending, and which of them each is `[P]`."""
    if distinct is not None:
        return source.index_select(0, distinct.first), distinct.row
    wanted, row = torch.unique(source, return_inverse=True)
    return wanted, row


def plan_chunks(
    model: nn.Module, source: Tensor, distinct: Distinct | None, chunk_bytes: int
) -> tuple[Tensor, Tensor, int]:
    """Return what `find_rows` does, and how many of the rows go through the head at a time."""
    vocabulary = model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    return *find_rows(source, distinct), max(1, chunk_bytes // (4 * vocabulary))


def cut_rows(row: Tensor, num_rows: int, chunk: int) -> list[Tensor]:
    """Return which predictions belong to each chunk of the rows; a GPU is asked once for all of them."""
    order = torch.argsort(row, stable=True)
    edges = torch.arange(0, num_rows + chunk, chunk, device=row.device)
    bounds = torch.searchsorted(row[order].contiguous(), edges).tolist()
    return [order[start:stop] for start, stop in pairwise(bounds)]


@torch.no_grad()
def head_scores(
    model: nn.Module,
    hidden: Tensor,
    source: Tensor,
    target: Tensor,
    chunk_bytes: int = CHUNK_BYTES,
    distinct: Distinct | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the log-probability `[P]` of each `target` and the likeliest token id `[P]` in its place."""
    wanted, row, chunk = plan_chunks(model, source, distinct, chunk_bytes)
    logprobs = torch.empty(len(source), device=hidden.device)
    greedy = torch.empty(len(source), dtype=torch.int64, device=hidden.device)
    for number, here in enumerate(cut_rows(row, len(wanted), chunk)):
        start = number * chunk
        logits = compute_logits(model, hidden.index_select(0, wanted[start : start + chunk]))
        logprobs[here] = gather_logprobs(logits, row[here] - start, target[here])
        greedy[here] = logits.argmax(-1)[row[here] - start]
    return logprobs, greedy


def head_logprobs(
    model: nn.Module,
    hidden: Tensor,
    source: Tensor,
    target: Tensor,
    chunk_bytes: int = CHUNK_BYTES,
    distinct: Distinct | None = None,
) -> Tensor:
    """Return the log-probability `[P]` of each `target` given the hidden state of its `source`.

    `hidden` is `[N, d]` for the N tokens of a micro-batch. Tokens that predict several targets (where a tree
    branches) go through the head once; `distinct` are those, where they are known beforehand.
    """
    wanted, row, chunk = plan_chunks(model, source, distinct, chunk_bytes)

    def compute_chunk(states: Tensor, row: Tensor, target: Tensor) -> Tensor:
        return gather_logprobs(compute_logits(model, states), row, target)

    states = hidden.index_select(0, wanted)
    if len(wanted) <= chunk:
        return compute_chunk(states, row, target)
    chosen, parts = cut_rows(row, len(wanted), chunk), []
    draws = draws_dropout(model.get_output_embeddings())  # type: ignore[operator]
    for number, (part, here) in enumerate(zip(torch.split(states, chunk), chosen, strict=True)):
        arguments = (part, row[here] - number * chunk, target[here])
        # Most heads draw nothing: the random generators' states need not be fetched from a GPU for each chunk.
        parts.append(
            checkpoint(compute_chunk, *arguments, use_reentrant=False, preserve_rng_state=draws)
            if torch.is_grad_enabled()
            else compute_chunk(*arguments)
        )
    return torch.cat(parts).index_select(0, torch.argsort(torch.cat(chosen)))
