"""What a layout's numbers differ by from those of single sequences: log-probabilities, streamed ones, gradients."""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from koat.core.differences import find_largest
from koat.core.sequence import Sequence
from koat.core.soft_prompt import has_soft_prompt
from koat.forest.build import build_forest
from koat.forest.kernels import pick_dense
from koat.forest.score import Layout, cut_sequences, make_padded, set_kernel, token_logprobs, unwrap
from koat.forest.stream import stream_forest

SEGMENT = 24
"""Tokens of a segment when carrying keys and values is tried; shorter than the probe's longest sequences."""


def make_probe(vocabulary: int, seed: int = 0, longest: int = 40) -> list[Sequence]:
    """Return sequences that share prefixes in every way a forest knows: branches, a repeat, a stranger."""
    rng = np.random.default_rng(seed)

    def draw(length: int) -> tuple[int, ...]:
        return tuple(int(token) for token in rng.integers(2, vocabulary, length))

    trunk, limb = draw(longest // 2), draw(longest // 4)
    bodies = [trunk + limb + draw(6), trunk + limb + draw(3), trunk + draw(longest // 2), draw(longest // 2 + 3)]
    bodies.append(bodies[1])
    return [Sequence(body, (False,) + (True,) * (len(body) - 1)) for body in bodies]


@torch.no_grad()
def single_logprobs(model: nn.Module, sequences: ListLike[Sequence]) -> list[Tensor]:
    """Return each sequence's target log-probabilities from a plain pass of that sequence alone.

    A soft prompt is put before it by PEFT's own forward pass.
    """
    results = []
    device = next(model.parameters()).device
    caller: Any = model if has_soft_prompt(model) else unwrap(model)
    for sequence in sequences:
        ids = torch.tensor([sequence.token_ids], device=device)
        mask = {"attention_mask": torch.ones_like(ids)} if has_soft_prompt(model) else {}
        logits = caller(input_ids=ids, use_cache=False, **mask).logits[0]
        logprobs = logits[-len(sequence) :].float().log_softmax(-1)
        at = torch.tensor(sequence.supervised, device=device).nonzero().squeeze(1)
        results.append(logprobs[at - 1, ids[0, at]])
    return results


@torch.no_grad()
def measure_difference(model: nn.Module, sequences: ListLike[Sequence], layout: Layout) -> float:
    """Return the largest difference between a layout's log-probabilities and the single sequences'.

    Rows of all lengths are made to share a micro-batch: some models compute a row by the longest beside it.
    """
    layout = replace(layout, cost=replace(layout.cost, start_up=1e9))
    expected = single_logprobs(model, sequences)
    check_finite(model, expected)
    device = next(model.parameters()).device
    differences = [0.0]
    for batch in cut_sequences(sequences, layout, token_budget=4096):
        batch = batch.to(device)
        found = token_logprobs(model, batch, layout)
        for owner in torch.unique(batch.owner).tolist():
            differences.append(float((found[batch.owner == owner] - expected[owner]).abs().max()))
    return find_largest(differences)


def check_finite(model: nn.Module, logprobs: ListLike[Tensor]) -> None:
    """Raise ValueError where a model's own log-probabilities are not finite: nothing could be compared with them."""
    if not all(bool(each.isfinite().all()) for each in logprobs):
        raise ValueError(f"the model's own log-probabilities are no finite numbers in {unwrap(model).dtype}")


@torch.no_grad()
def measure_stream(model: nn.Module, sequences: ListLike[Sequence], layout: Layout) -> float:
    """Return the same difference for a forest that is computed in short segments, keys and values carried along."""
    expected = single_logprobs(model, sequences)
    check_finite(model, expected)
    found: list[list[float]] = [[] for _ in sequences]
    for part in stream_forest(model, layout, build_forest(sequences), SEGMENT):
        for owner, value in zip(part.owner.tolist(), part.logprobs.tolist(), strict=True):
            found[owner].append(value)
    pairs = (
        pair for left, right in zip(expected, found, strict=True) for pair in zip(left.tolist(), right, strict=True)
    )
    return find_largest(abs(a - b) for a, b in pairs)


def measure_slopes(twin: nn.Module, sequences: ListLike[Sequence], layout: Layout) -> float:
    """Return the relative difference that a layout makes to the gradient of a twin's input embeddings.

    It is held against padded rows on dense masks.
    """
    assert layout.plan is not None
    causal, found = unwrap(twin), []
    weight = causal.get_input_embeddings().weight
    with torch.enable_grad():
        for each in (make_padded(layout.split_head), layout):
            set_kernel(causal, pick_dense(causal) if each.plan is None else layout.plan.kernel)
            batches = (batch.to(weight.device) for batch in cut_sequences(sequences, each, token_budget=4096))
            total = torch.stack([token_logprobs(twin, batch, each).sum() for batch in batches]).sum()
            found.append(torch.autograd.grad(total, weight)[0])
    exact, mine = found
    return find_largest([float((mine - exact).norm() / exact.norm())])


def estimate_rounding(model: nn.Module, sequences: ListLike[Sequence]) -> float:
    """Return what rounding alone may do to a log-probability in the model's own type.

    A padded batch of short sequences can come out bit for bit like single ones and then says nothing of it.
    """
    largest = max(float(logprobs.abs().max()) for logprobs in single_logprobs(model, sequences))
    return torch.finfo(unwrap(model).dtype).eps * largest
