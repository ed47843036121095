"""The one function that carries everything: log-probabilities of a forest's targets.

Training loss is their weighted negative sum; a choice's score is their sum per owner; a vote compares owners.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as ListLike
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from koat.core.sequence import Sequence
from koat.forest.attend import FLEX_BLOCK, AttentionPlan, Kernel, render_mask
from koat.forest.head import gather_logprobs, head_logprobs, head_scores
from koat.forest.interface import NAMES, Trees, register
from koat.forest.narrow import narrow_last_layer
from koat.forest.pack import MicroBatch, RowCost, batch_rows, plan_rows, plan_separate_rows
from koat.forest.root import Root, shift_source, stand_on, take_root
from koat.forest.tree import Tree
from koat.forest.walk import Walk

MOST_COMPILED = 64
"""How often one attention function may be compiled: a few kinds of gradient times the length buckets."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How sequences go through one model. `koat.forest.verify` finds the right one.

    `plan` is None for padded rows: one sequence each, the model's own causal mask, nothing shared. With
    `split_head` only the rows of the head that some target needs are computed. With `alone` each sequence
    is a micro-batch of its own, for models whose result depends on the longest row beside it. With `narrow` the
    last layer computes only what some target needs (`koat.forest.narrow`). With `streams` scoring carries keys and
    values from micro-batch to micro-batch (`koat.forest.stream`).
    """

    plan: AttentionPlan | None
    cost: RowCost
    max_row_length: int
    split_head: bool = True
    alone: bool = False
    narrow: bool = False
    streams: bool = False

    @property
    def shares(self) -> bool:
        """Whether common prefixes are computed once."""
        return self.plan is not None


def make_padded(split_head: bool = False) -> Layout:
    """Return the layout without sharing: one sequence a row, right-padded, of similar lengths."""
    return Layout(None, RowCost(0.0), 1, split_head)


def read_width(config: Any) -> int:
    """Return the width of a model's hidden states."""
    return int(getattr(config, "hidden_size", None) or config.n_embd)


def estimate_row_cost(config: Any, kernel: str) -> RowCost:
    """Estimate the price of attention from a model's shape.

    A token costs about `24 * hidden^2` operations per layer in matrix products and `4 * hidden` per key it is
    multiplied with. Dense masked attention runs at about half the rate of the products; tree attention and block masks
    skip most of what is hidden, walked attention all of it, so that a long row costs next to nothing. Starting a
    micro-batch takes as long as 128 tokens on a CPU (8 layers of 512; short products also run slower); a GPU computes a
    thousand meanwhile.
    """
    share, start_up = {"flex": (0.1, 1024.0), "tree": (0.1, 1024.0), "walk": (0.01, 128.0)}.get(kernel, (1.0, 32.0))
    return RowCost(share / (3 * read_width(config)), start_up)


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
    output, source = run_rows(model, batch, layout)
    if layout.split_head:
        return head_logprobs(unwrap(model), output, source, batch.target, distinct=batch.distinct)
    return gather_logprobs(output, source, batch.target)


@torch.no_grad()
def score_tokens(model: nn.Module, batch: MicroBatch, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return each prediction's log-probability `[P]` and the token id `[P]` that the model likes best there."""
    output, source = run_rows(model, batch, layout)
    if layout.split_head:
        return head_scores(unwrap(model), output, source, batch.target, distinct=batch.distinct)
    greedy = output.index_select(0, source).argmax(-1)
    return gather_logprobs(output, source, batch.target), greedy


def run_rows(model: nn.Module, batch: MicroBatch, layout: Layout) -> tuple[Tensor, Tensor]:
    """Run a micro-batch's N tokens; return hidden states `[N, d]`, or logits `[N, V]` without `split_head`.

    Beside them stands where each prediction's source lies among the N: a soft prompt's tokens come first.
    """
    causal, root = unwrap(model), take_root(model, len(batch.token_ids))
    source = batch.source
    if root is not None and root.embeddings is not None:
        source = shift_source(batch, root.num_tokens)
    with narrow_last_layer(causal, source, batch.distinct) if layout.narrow else nullcontext():
        inputs = make_inputs(causal, batch, layout, root)
        if layout.split_head:
            return causal.base_model(**inputs).last_hidden_state.flatten(0, 1), source
        return causal(**inputs).logits.flatten(0, 1), source


def unwrap(model: nn.Module) -> Any:
    """Return the transformers model inside a `PeftModel`, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def make_inputs(causal: Any, batch: MicroBatch, layout: Layout, root: Root | None = None) -> dict[str, Any]:
    """Return the keyword arguments of the model's forward pass."""
    inputs: dict[str, Any] = {"input_ids": batch.token_ids, "use_cache": False}
    num_below = 0 if root is None else root.num_tokens
    if root is not None and root.embeddings is not None:
        embedded = causal.get_input_embeddings()(inputs.pop("input_ids"))
        inputs["inputs_embeds"] = torch.cat([root.embeddings.to(embedded.dtype), embedded], 1)
    elif root is not None:
        inputs["past_key_values"] = root.cache
    if layout.plan is None:
        # A row is one sequence: real tokens stand below its end, padding tokens are their own roots.
        lengths = batch.subtree_end[:, :1] + num_below
        index = torch.arange(batch.token_ids.shape[1] + num_below, device=batch.token_ids.device)
        inputs["attention_mask"] = (index < lengths).long()
        return inputs
    set_kernel(causal, layout.plan.kernel)
    num_cached = 0 if root is None else root.num_cached
    standing = batch if root is None else stand_on(batch, num_below, computed=not num_cached)
    shown = show_trees(causal, layout, standing.position, standing.subtree_end, standing.source, num_cached)
    return {**inputs, **shown}


def show_trees(
    causal: Any, layout: Layout, position: Tensor, subtree_end: Tensor, source: Tensor, num_cached: int
) -> dict[str, Any]:
    """Return what tells a model who sees whom: positions, a mask, and for koat's own kernels the trees themselves.

    The first `num_cached` tokens of a row are keys in a cache, and not counted by `source [P]`, which predict.
    """
    assert layout.plan is not None
    mask = render_mask(layout.plan, position, subtree_end, causal.dtype, num_cached)
    shown: dict[str, Any] = {"position_ids": position[:, num_cached:], "attention_mask": mask}
    if layout.plan.kernel == "walk":
        shown["trees"] = make_walk(causal, layout, position, subtree_end, source, num_cached)
    elif layout.plan.kernel == "tree":
        shown["trees"] = Tree.plant(position, subtree_end, num_cached)
    return shown


def make_walk(
    causal: Any, layout: Layout, position: Tensor, subtree_end: Tensor, source: Tensor, num_cached: int
) -> Trees:
    """Return the pieces of a micro-batch; with `narrow` the last layer answers predicting tokens alone."""
    if not layout.narrow:
        return Walk(position, subtree_end, num_cached=num_cached)
    asking = torch.zeros_like(position, dtype=torch.bool)
    asking.view(-1)[source + num_cached] = True
    return Walk(position, subtree_end, asking, int(causal.config.num_hidden_layers) - 1, num_cached)


def set_kernel(causal: Any, kernel: Kernel) -> None:
    """Let a model's layers compute attention with a kernel; they look it up at each pass."""
    if kernel in NAMES:
        register(NAMES[kernel])
    elif kernel == "flex":
        allow_compiling()
    causal.config._attn_implementation = {"flex": "flex_attention", **NAMES}.get(kernel, kernel)


def allow_compiling() -> None:
    """Let FlexAttention be compiled for every kind of row and gradient that verification and training bring.

    Past its limit PyTorch runs it uncompiled, with all scores in memory, and only logs it.
    """
    from torch._dynamo import config

    for name in ("recompile_limit", "cache_size_limit"):  # one setting's names since PyTorch 2.7 and before
        if hasattr(config, name):
            setattr(config, name, max(getattr(config, name), MOST_COMPILED))


def sum_by_owner(values: Tensor, owner: Tensor, num_sequences: int) -> Tensor:
    """Sum `values [P]` per owner into `[num_sequences]`."""
    return torch.zeros(num_sequences, dtype=values.dtype, device=values.device).index_add(0, owner, values)
