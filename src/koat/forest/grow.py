"""Let a model write on behind the leaves of a forest, greedily: a prompt that many share is computed once.

The prompts go through the model as rows of trees, keys and values kept. Then every prompt grows by one token a pass:
the tokens that a row's S prompts write stand behind the row in blocks of S, and each sees its own path and what its
own prompt has written.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from koat.core.sequence import supervise_from
from koat.forest.attend import Kernel
from koat.forest.head import compute_logits
from koat.forest.kernels import pick_cached
from koat.forest.pack import MicroBatch, RowCost, batch_rows, plan_rows
from koat.forest.score import Layout, make_inputs, read_width, set_kernel, unwrap

NEW_TOKENS = 4
"""How many times the token budget prompts that grow together may write: their keys are kept beside the prompts'."""


@dataclass(frozen=True, slots=True)
class Grown:
    """What was written behind one prompt: token ids, and the log-probability of each."""

    token_ids: list[int]
    logprobs: list[float]


IsDone = Callable[[list[int], Tensor], Tensor]
"""From prompts (their places in the list given) and what they have written `[S, t]` to which are done `[S]`."""


@torch.no_grad()
def grow_forest(
    model: nn.Module,
    layout: Layout,
    prompts: ListLike[tuple[int, ...]],
    max_new_tokens: int,
    is_done: IsDone,
    *,
    token_budget: int = 8192,
    on_progress: Callable[[int], None] = lambda num_done: None,
) -> tuple[list[Grown], int]:
    """Return what the model writes behind each prompt, up to and with the token at which `is_done` says so.

    Beside it stands how many tokens went through the model: what prompts share counts once, and a prompt that is done
    goes on until all of its micro-batch are.

    `layout` shares, and its model carries no soft prompt. What is written depends neither on the budget nor on the
    order of prompts.
    """
    causal = unwrap(model)
    cost = RowCost(1 / (3 * read_width(causal.config)), layout.cost.start_up)
    order = sorted(range(len(prompts)), key=prompts.__getitem__)
    together = max(1, NEW_TOKENS * token_budget // max_new_tokens)
    grown: dict[int, Grown] = {}
    num_tokens = 0
    for start in range(0, len(order), together):
        part = order[start : start + together]
        sequences = [supervise_from((*prompts[place], 0), len(prompts[place])) for place in part]
        rows = plan_rows(sequences, cost, min(layout.max_row_length, token_budget))
        for batch in batch_rows(sequences, rows, token_budget, cost=cost):
            places = [part[owner] for owner in batch.owner.tolist()]
            written = grow_rows(causal, layout, batch, max_new_tokens, partial(is_done, places))
            grown.update(zip(places, written, strict=True))
            num_tokens += batch.num_tokens + len(places) * (max(len(each.token_ids) for each in written) - 1)
            on_progress(len(places))
    return [grown[place] for place in range(len(prompts))], num_tokens


def grow_rows(
    causal: Any, layout: Layout, batch: MicroBatch, max_new_tokens: int, is_done: Callable[[Tensor], Tensor]
) -> list[Grown]:
    """Let every prompt of a micro-batch grow until all are done; return what each wrote, as `batch.owner` has them.

    `is_done` says of what they have written `[S, t]` which are done `[S]`.
    """
    from transformers import DynamicCache

    batch = batch.to(causal.device)
    cache, growth = DynamicCache(), Growth(batch)
    inputs = {**make_inputs(causal, batch, layout), "past_key_values": cache, "use_cache": True}
    states = causal.base_model(**inputs).last_hidden_state.flatten(0, 1).index_select(0, batch.source)
    kernel = pick_cached(causal, layout.plan.kernel if layout.plan else "sdpa")
    set_kernel(causal, kernel)
    written, logprobs = _choose(causal, states)
    lengths = torch.zeros(len(written), dtype=torch.int64)
    while True:
        done = is_done(written).cpu()
        lengths[done & (lengths == 0)] = written.shape[1]
        if written.shape[1] == max_new_tokens or bool((lengths > 0).all()):
            break
        mask = growth.render(layout, kernel, causal.dtype)
        token_ids, position = growth.extend(written[:, -1])
        inputs = {"input_ids": token_ids, "position_ids": position, "attention_mask": mask}
        states = causal.base_model(**inputs, past_key_values=cache, use_cache=True).last_hidden_state
        newest = _choose(causal, growth.pick(states))
        written, logprobs = torch.cat([written, newest[0]], 1), torch.cat([logprobs, newest[1]], 1)
    ends = [length or written.shape[1] for length in lengths.tolist()]
    pairs = zip(written.tolist(), logprobs.tolist(), ends, strict=True)
    return [Grown(ids[:end], values[:end]) for ids, values, end in pairs]


def _choose(causal: Any, states: Tensor) -> tuple[Tensor, Tensor]:
    """Return the likeliest token after each state `[P, d]` and its log-probability, both `[P, 1]`."""
    best, chosen = compute_logits(causal, states).float().log_softmax(-1).max(-1)
    return chosen[:, None], best[:, None]


class Growth:
    """Where the P prompts of a micro-batch stand, and who sees whom while they grow.

    A row of the micro-batch has up to S prompts; `slot [P]` says where among the flattened `[R * S]` each is.
    """

    def __init__(self, batch: MicroBatch) -> None:
        num_rows, length = batch.position.shape
        row, place = batch.source // length, batch.source % length
        counts = torch.bincount(row, minlength=num_rows)
        self.num_slots = int(counts.max())
        # Predictions stand row by row: a prompt's number in its row counts from the row's first.
        first = torch.cumsum(counts, 0) - counts
        self.slot = row * self.num_slots + torch.arange(len(row), device=row.device) - first[row]
        self.num_rows, self.num_steps = num_rows, 0
        key = torch.arange(length, device=row.device)
        self.path = self._spread((key <= place[:, None]) & (place[:, None] < batch.subtree_end[row]))
        self.key_position = batch.position
        self.position = self._spread(batch.position[row, place])

    def _spread(self, values: Tensor) -> Tensor:
        """Lay `[P, ...]` out as `[R, S, ...]`, zero where a row has fewer prompts."""
        shape = (self.num_rows * self.num_slots, *values.shape[1:])
        return values.new_zeros(shape).index_copy(0, self.slot, values).view(self.num_rows, self.num_slots, *shape[1:])

    def pick(self, states: Tensor) -> Tensor:
        """Return the prompts' states `[P, d]` of `[R, S, d]`."""
        return states.flatten(0, 1).index_select(0, self.slot)

    def extend(self, newest: Tensor) -> tuple[Tensor, Tensor]:
        """Take the newest tokens `[P]`; return what goes through the model: token ids and positions `[R, S]`."""
        self.num_steps += 1
        return self._spread(newest), self.position + self.num_steps

    def render(self, layout: Layout, kernel: Kernel, dtype: torch.dtype) -> Any:
        """Return the mask of the next pass, `[R, 1, S, L + S * (steps + 1)]`, in the form that the model takes."""
        assert layout.plan is not None
        made: dict[int | None, Tensor] = {}
        for _, window in layout.plan.windows:
            visible = self._see(window)[:, None]
            additive = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
            made[window] = visible if kernel == "sdpa" else additive.masked_fill(~visible, torch.finfo(dtype).min)
        if layout.plan.by_type:
            return {kind: made[window] for kind, window in layout.plan.windows}
        return made[layout.plan.windows[0][1]]

    def _see(self, window: int | None) -> Tensor:
        """Return what each prompt's next token sees `[R, S, K]`: its path, and its own block's earlier tokens."""
        steps = torch.arange(1, self.num_steps + 2, device=self.position.device)
        own = torch.eye(self.num_slots, dtype=torch.bool, device=self.position.device)
        own = own.repeat(1, len(steps)).expand(self.num_rows, -1, -1)
        path = self.path
        if window is not None:
            query = self.position[:, :, None] + self.num_steps + 1
            path = path & (query - self.key_position[:, None] < window)
            recent = (self.num_steps + 1 - steps < window).repeat_interleave(self.num_slots)
            own = own & recent
        return torch.cat([path, own], 2)
