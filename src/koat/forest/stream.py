"""Compute a forest of any size in segments, each token once, whatever the budget.

A segment is a run of the forest's depth-first order. What its tokens may see besides one another are the ancestors
of its first token: an ancestor of any other either stands in the segment or is an ancestor of the first as well. So
the keys and values of that one path are all that is carried from segment to segment: a few-shot prompt is computed
once for all items behind it, however many micro-batches they fill. For scoring only; nothing is kept for gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as ListLike
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from koat.core.sequence import Sequence
from koat.core.soft_prompt import has_soft_prompt
from koat.forest.build import Forest, IntArray, build_forest
from koat.forest.head import gather_logprobs, head_scores
from koat.forest.narrow import narrow_last_layer
from koat.forest.pack import MicroBatch
from koat.forest.score import Layout, cut_sequences, score_tokens, set_kernel, show_trees, unwrap

COMFORTABLE = 2048
"""Tokens of a segment that is neither slow to start nor too large for a processor's cache (8 layers of 512)."""
WORTH_WHILE = 1.03
"""How many times the forest's tokens micro-batches have to compute before carrying keys and values pays."""


@dataclass(frozen=True, slots=True)
class Predictions:
    """Some of a forest's predictions: `owner`, `target`, `logprobs`, `likeliest` (a token id), each `[P]`.

    An owner's predictions come in the order of its tokens. `num_tokens` were computed for them.
    """

    owner: Tensor
    target: Tensor
    logprobs: Tensor
    likeliest: Tensor
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens `[start, stop)` of a forest with the n ancestors of the first: what it takes to compute them.

    `position`, `subtree_end`: `[1, n + L]`, ancestors first. `source [P]` counts from `start`; `ancestors [n]` and
    `prediction [P]` index the forest's tokens and predictions.
    """

    start: int
    stop: int
    ancestors: IntArray
    position: Tensor
    subtree_end: Tensor
    source: Tensor
    prediction: IntArray


@torch.no_grad()
def score_forest(
    model: nn.Module, layout: Layout, sequences: ListLike[Sequence], token_budget: int
) -> Iterator[Predictions]:
    """Yield all predictions of sequences that are laid out together, at most `token_budget` tokens at a time."""
    laid_out = lay_out(model, layout, sequences, token_budget)
    if isinstance(laid_out, Forest):
        yield from stream_forest(model, layout, laid_out, token_budget)
        return
    device = unwrap(model).device
    for batch in laid_out:
        moved = batch.to(device)
        yield Predictions(moved.owner, moved.target, *score_tokens(model, moved, layout), batch.num_tokens)


def lay_out(
    model: nn.Module, layout: Layout, sequences: ListLike[Sequence], token_budget: int
) -> Forest | list[MicroBatch]:
    """Return micro-batches of whole trees where they compute little twice, else one forest to be streamed."""
    batches = list(cut_sequences(sequences, layout, token_budget))
    if not layout.streams or has_soft_prompt(model):
        return batches
    forest = build_forest(sequences)
    return forest if sum(batch.num_tokens for batch in batches) > WORTH_WHILE * len(forest) else batches


def stream_forest(model: nn.Module, layout: Layout, forest: Forest, token_budget: int) -> Iterator[Predictions]:
    """Yield all predictions of a forest, segment by segment."""
    from transformers import DynamicCache

    causal = unwrap(model)
    device, token_ids = causal.device, torch.from_numpy(forest.token_ids)
    owner, target = torch.from_numpy(forest.owner).to(device), torch.from_numpy(forest.target).to(device)
    cache, held = DynamicCache(), np.empty(0, np.int64)
    for segment in cut_forest(forest, token_budget):
        keep_path(cache, np.searchsorted(held, segment.ancestors))
        ids = token_ids[None, segment.start : segment.stop].to(device)
        chosen = torch.from_numpy(segment.prediction).to(device)
        wanted = target.index_select(0, chosen)
        scores = score_segment(causal, layout, segment, ids, cache, wanted)
        held = np.concatenate([segment.ancestors, np.arange(segment.start, segment.stop)])
        yield Predictions(owner.index_select(0, chosen), wanted, *scores, segment.stop - segment.start)


def cut_forest(forest: Forest, token_budget: int) -> Iterator[Segment]:
    """Cut a forest's T tokens into segments of at most `token_budget`."""
    # A branch or a tree begins where the depth does not go on counting.
    branches = np.flatnonzero(np.diff(forest.position, prepend=-2) != 1)
    start = 0
    while start < len(forest):
        stop = choose_cut(branches, forest.position, start, min(token_budget, len(forest) - start))
        yield make_segment(forest, start, stop)
        start = stop


def choose_cut(branches: IntArray, position: IntArray, start: int, limit: int) -> int:
    """Return where the segment from `start` ends, at most `limit` tokens later, and before a branch if it can be.

    Of the branches within comfortable reach the one with the shortest path to carry, else the next one.
    """
    if limit <= COMFORTABLE // 2:
        return start + limit
    reach = np.append(branches, len(position))
    reach = reach[(reach > start + COMFORTABLE // 2) & (reach <= start + limit)]
    near = reach[reach <= start + COMFORTABLE]
    if len(near):
        depth = np.append(position, 0)[near]
        return int(near[depth == depth.min()][-1])
    return int(reach[0]) if len(reach) else start + limit


def make_segment(forest: Forest, start: int, stop: int) -> Segment:
    """Collect what it takes to compute the tokens `[start, stop)`."""
    ancestors = np.flatnonzero(forest.subtree_end[:start] > start)
    places = np.concatenate([ancestors, np.arange(start, stop)])
    end = np.minimum(forest.subtree_end[places], stop) - start + len(ancestors)
    prediction = np.flatnonzero((forest.source >= start) & (forest.source < stop))
    return Segment(
        start, stop, ancestors, torch.from_numpy(forest.position[places])[None], torch.from_numpy(end)[None],
        torch.from_numpy(forest.source[prediction] - start), prediction,
    )  # fmt: skip


def keep_path(cache: Any, places: IntArray) -> None:
    """Keep of a cache's keys and values only those in `places [n]`."""
    for layer in cache.layers:
        if layer.keys is not None:
            index = torch.from_numpy(places).to(layer.keys.device)
            layer.keys, layer.values = (heads.index_select(2, index) for heads in (layer.keys, layer.values))


def score_segment(
    causal: Any, layout: Layout, segment: Segment, token_ids: Tensor, cache: Any, target: Tensor
) -> tuple[Tensor, Tensor]:
    """Run a segment behind its cached ancestors, which then holds its tokens too; return what `score_tokens` does."""
    assert layout.plan is not None
    num_cached, device = len(segment.ancestors), token_ids.device
    position, subtree_end = segment.position.to(device), segment.subtree_end.to(device)
    source = segment.source.to(device)
    set_kernel(causal, layout.plan.kernel)
    shown = show_trees(causal, layout, position, subtree_end, source, num_cached)
    inputs: dict[str, Any] = {"input_ids": token_ids, "past_key_values": cache, "use_cache": True, **shown}
    with narrow_last_layer(causal, source) if layout.narrow else nullcontext():
        if layout.split_head:
            hidden = causal.base_model(**inputs).last_hidden_state.flatten(0, 1)
            return head_scores(causal, hidden, source, target)
        logits = causal(**inputs).logits.flatten(0, 1)
    return gather_logprobs(logits, source, target), logits.index_select(0, source).argmax(-1)
