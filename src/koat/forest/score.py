"""The one function that carries everything: log-probabilities of a forest's targets.

Training loss is their weighted negative sum; a choice's score is their sum per owner; a vote compares owners.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from koat.core.sequence import Sequence
from koat.forest.attend import FLEX_BLOCK, AttentionPlan, Kernel, render_mask
from koat.forest.head import gather_logprobs, head_logprobs, head_scores
from koat.forest.pack import MicroBatch, RowCost, batch_rows, plan_rows, plan_separate_rows
from koat.forest.walk import IMPLEMENTATION, Walk, register_walk


@dataclass(frozen=True, slots=True)
class Layout:
    """How sequences go through one model. `koat.forest.verify` finds the right one.

    `plan` is None for padded rows: one sequence each, the model's own causal mask, nothing shared. With
    `split_head` only the rows of the head that some target needs are computed. With `alone` each sequence
    is a micro-batch of its own, for models whose result depends on the longest row beside it.
    """

    plan: AttentionPlan | None
    cost: RowCost
    max_row_length: int
    split_head: bool = True
    alone: bool = False

    @property
    def shares(self) -> bool:
        """Whether common prefixes are computed once."""
        return self.plan is not None


def estimate_row_cost(config: Any, kernel: str) -> RowCost:
    """Estimate the price of attention from a model's shape.

    A token costs about `24 * hidden^2` operations per layer in matrix products and `4 * hidden` per key it is
    multiplied with. Dense masked attention runs at about half the rate of the products; block masks and
    walked attention skip what is hidden, so most of a long row costs nothing. Starting a micro-batch took as
    long as 16 to 48 tokens on a CPU (8 layers of 512); a GPU computes a thousand meanwhile.
    """
    hidden = int(getattr(config, "hidden_size", None) or config.n_embd)
    skips_hidden = {"flex": 1024.0, "walk": 32.0}
    if kernel in skips_hidden:
        return RowCost(0.1 / (3 * hidden), start_up=skips_hidden[kernel])
    return RowCost(1 / (3 * hidden), start_up=32.0)


def cut_sequences(
    sequences: ListLike[Sequence], layout: Layout, token_budget: int, max_row_length: int | None = None
) -> Iterator[MicroBatch]:
    """Lay sequences out in micro-batches of at most `token_budget` tokens, as `layout` has it."""
    if layout.plan is None:
        rows = plan_separate_rows(sequences)
        yield from batch_rows(sequences, rows, 1 if layout.alone else token_budget, cost=layout.cost)
        return
    limit = min(max_row_length or layout.max_row_length, token_budget)
    rows = plan_rows(sequences, layout.cost, limit)
    multiple = FLEX_BLOCK if layout.plan.kernel == "flex" else 1
    yield from batch_rows(sequences, rows, token_budget, multiple, layout.cost)


def token_logprobs(model: nn.Module, batch: MicroBatch, layout: Layout) -> Tensor:
    """Return the log-probability `[P]` (float32) of every prediction of a micro-batch.

    `model` is a causal model of transformers, with or without PEFT around it. Differentiable.
    """
    causal = unwrap(model)
    if layout.split_head:
        hidden = causal.base_model(**make_inputs(causal, batch, layout)).last_hidden_state
        return head_logprobs(causal, hidden.flatten(0, 1), batch.source, batch.target)
    logits = causal(**make_inputs(causal, batch, layout)).logits.flatten(0, 1)
    return gather_logprobs(logits, batch.source, batch.target)


@torch.no_grad()
def score_tokens(model: nn.Module, batch: MicroBatch, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return each prediction's log-probability `[P]` and the token id `[P]` that the model likes best there."""
    causal = unwrap(model)
    if layout.split_head:
        hidden = causal.base_model(**make_inputs(causal, batch, layout)).last_hidden_state.flatten(0, 1)
        return head_scores(causal, hidden, batch.source, batch.target)
    logits = causal(**make_inputs(causal, batch, layout)).logits.flatten(0, 1)
    greedy = logits.index_select(0, batch.source).argmax(-1)
    return gather_logprobs(logits, batch.source, batch.target), greedy


def unwrap(model: nn.Module) -> Any:
    """Return the transformers model inside a `PeftModel`, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def make_inputs(causal: Any, batch: MicroBatch, layout: Layout) -> dict[str, Any]:
    """Return the keyword arguments of the model's forward pass."""
    inputs: dict[str, Any] = {"input_ids": batch.token_ids, "use_cache": False}
    if layout.plan is None:
        # A row is one sequence: real tokens stand below its end, padding tokens are their own roots.
        lengths = batch.subtree_end[:, :1]
        index = torch.arange(batch.token_ids.shape[1], device=batch.token_ids.device)
        inputs["attention_mask"] = (index < lengths).long()
        return inputs
    set_kernel(causal, layout.plan.kernel)
    inputs["position_ids"] = batch.position
    inputs["attention_mask"] = render_mask(layout.plan, batch.position, batch.subtree_end, causal.dtype)
    if layout.plan.kernel == "walk":
        inputs["walk"] = Walk(batch.position, batch.subtree_end)
    return inputs


def set_kernel(causal: Any, kernel: Kernel) -> None:
    """Let a model's layers compute attention with a kernel; they look it up at each pass."""
    if kernel == "walk":
        register_walk()
    names = {"flex": "flex_attention", "walk": IMPLEMENTATION}
    causal.config._attn_implementation = names.get(kernel, kernel)


def sum_by_owner(values: Tensor, owner: Tensor, num_sequences: int) -> Tensor:
    """Sum `values [P]` per owner into `[num_sequences]`."""
    return torch.zeros(num_sequences, dtype=values.dtype, device=values.device).index_add(0, owner, values)
