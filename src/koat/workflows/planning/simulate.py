"""A training step on the meta device: shapes alone, no weights, and every living byte counted.

A model of one and of two layers tells what a layer keeps; `koat.workflows.planning.memory` puts a whole model together.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from koat.adapters.attach import attach_adapter
from koat.core.config import Section
from koat.core.settings import ModelSettings
from koat.forest.attend import MASKLESS, AttentionPlan, Kernel
from koat.forest.head import compute_logits, gather_logprobs
from koat.forest.kernels import find_attention_dropout, find_kernel, pick_own
from koat.forest.pack import MicroBatch
from koat.forest.pieces import Piece
from koat.forest.root import has_cached_root, take_root
from koat.forest.score import Layout, make_inputs, make_padded, unwrap
from koat.forest.verify import list_candidates
from koat.forest.walk import Walk
from koat.model import build_empty, pick_attention

ALIBI_FAMILIES = frozenset({"bloom", "mpt"})
"""Families that compute positions from a mask of tokens and cannot share prefixes; Falcon says it by a setting."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations made where `own` ones lie and that are still there; `own` left out.

    What a kernel takes and gives back inside one operation is not seen.
    """

    def __init__(self, own: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        own = list(own)
        self._known = {tensor.untyped_storage()._cdata for tensor in own}
        self._devices = {tensor.device for tensor in own}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count the storages that it made."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device in self._devices:
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def attend_fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Stand in for PyTorch's SDPA, which on the meta device would keep a square of probabilities.

    A boolean mask becomes an additive one in every layer, kept there; results lie as the kernel lays them.
    """
    if dropout_p:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    output: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return output


def multiply_grouped(inputs: Tensor, weight: Tensor, **kwargs: Any) -> Tensor:
    """Stand in for the products of experts, which the meta device has in bfloat16 alone: one expert takes all."""
    return inputs @ weight[0]


STAND_INS: dict[Any, Callable[..., Any]] = {
    F.scaled_dot_product_attention: attend_fused,
    getattr(F, "grouped_mm", None): multiply_grouped,
    getattr(torch, "_grouped_mm", None): multiply_grouped,
    # Models ask whether a mask hides nothing; without values the answer is no, and the mask is used.
    torch.Tensor.__bool__: lambda tensor: not tensor.is_meta and bool(tensor),
    # What moves to the CPU has no values to move, and without a GPU there is no pinned memory to move it to.
    torch.empty: lambda *shape, pin_memory=False, **options: torch.empty(*shape, **options),
    torch.Tensor.copy_: lambda target, source, *more, **options: (
        target if source.is_meta and not target.is_meta else target.copy_(source, *more, **options)
    ),
}


class StandIns(TorchFunctionMode):
    """Replaces what the meta device cannot run, or runs otherwise than a processor, by what keeps the same bytes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the stand-in where there is one."""
        return STAND_INS.get(func, func)(*args, **(kwargs or {}))


class ChainWalk(Walk):
    """Every row one chain: a single causal piece, whatever the window, for bytes do not depend on it."""

    def list_pieces(self, window: int | None, layer: int | None = None) -> list[Piece]:
        """Return a piece a row."""
        num_rows, length = self.position.shape
        return [Piece(row, 0, length, slice(0, length), None) for row in range(num_rows)]


@dataclass(frozen=True, slots=True)
class Trace:
    """Bytes alive beside weights, adapter and gradients: after the layers' forward pass, at most, and at most
    without gradients."""

    kept: float
    peak: float
    forward: float


def pick_layout(model: nn.Module, settings: ModelSettings, device: torch.device) -> Layout:
    """Return the layout that a run will most likely verify, from the model's class and configuration alone.

    Tree attention and FlexAttention keep what walked attention keeps, which stands in for them.
    """
    config = unwrap(model).config
    if settings.layout == "padded" or getattr(config, "alibi", False) or config.model_type in ALIBI_FAMILIES:
        return make_padded(split_head=True)
    eager = find_kernel(config) == "eager" or pick_attention(settings.attention, config) == "eager"
    kernel: Kernel = "eager" if eager else "sdpa"
    if kernel == "sdpa" and not has_cached_root(model) and _walks(model, settings, device):
        kernel = "walk"
    return list_candidates(config, kernel)[0]


def _walks(model: nn.Module, settings: ModelSettings, device: torch.device) -> bool:
    if find_attention_dropout(unwrap(model).config):
        return False
    if settings.attention == "flex":
        return True
    own = settings.attention == "auto" and pick_own(device.type) in MASKLESS
    return own and bool(unwrap(model)._supports_attention_backend)


def keeps_squares(layout: Layout) -> bool:
    """Whether attention keeps something for each pair of a query and a key."""
    plan: AttentionPlan | None = layout.plan
    return plan is None or plan.kernel in ("sdpa", "eager")


def cut_depth(config: Any, periods: int) -> Any:
    """Return a copy of a configuration with as many layers as show each kind of them, `periods` times over."""
    config = copy.deepcopy(config)
    types = list(getattr(config, "layer_types", None) or [])
    period = max((types.index(kind) + 1 for kind in set(types)), default=1)
    config.num_hidden_layers = period * periods
    if types:
        config.layer_types = types[:period] * periods
    return config


def build_probe(config: Any, adapter: Section, dtype: torch.dtype) -> nn.Module:
    """Return a model on the meta device with its adapter, in training mode, its gradients there already."""
    model: nn.Module = attach_adapter(build_empty(config).to(dtype).requires_grad_(False), adapter).train()
    if all(weight.requires_grad for weight in model.parameters()):
        model.to(dtype)  # held in float32, multiplied in this
    for weight in model.parameters():
        if weight.requires_grad:
            weight.grad = torch.empty_like(weight)
    return model


def set_checkpointing(model: nn.Module, wanted: bool, offload: bool = False) -> None:
    """Switch the recomputation of layers on or off; with `offload` their inputs wait elsewhere."""
    causal = unwrap(model)
    if wanted:
        causal.gradient_checkpointing_enable({"use_reentrant": False}, offload=offload)
    elif causal.is_gradient_checkpointing:
        causal.gradient_checkpointing_disable()


def run_layers(model: nn.Module, layout: Layout, num_rows: int, length: int) -> Tensor:
    """Run chains of tokens through a model's layers on the meta device; return hidden states `[R, n + L, d]`."""
    token = torch.zeros(num_rows, length, dtype=torch.int64, device="meta")
    none = token.new_zeros(0)
    batch = MicroBatch(token, token, token, none, none, none, (), num_rows * length)
    inputs = make_inputs(unwrap(model), batch, layout, take_root(model, num_rows))
    if "trees" in inputs:
        inputs["trees"] = ChainWalk(inputs["trees"].position, inputs["trees"].subtree_end)
    hidden: Tensor = unwrap(model).base_model(**inputs).last_hidden_state
    return hidden


def trace_step(model: nn.Module, run: Callable[[], Tensor]) -> Trace:
    """Run forward and backward, then without gradients; `run` returns what the gradient starts from."""
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    own = list(chain(model.parameters(), model.buffers(), gradients))
    with StandIns(), LiveBytes(own) as live:
        result = run()
        kept = live.live
        torch.autograd.backward(result, torch.empty_like(result))
        peak = live.peak
        del result
    with torch.no_grad(), StandIns(), LiveBytes(own) as free:
        run()
    return Trace(kept, peak, free.peak)


def trace_layers(model: nn.Module, layout: Layout, length: int) -> Trace:
    """Trace one row of `length` tokens through the layers, root left out of the length."""
    return trace_step(model, functools.partial(run_layers, model, layout, 1, length))


def trace_head(model: nn.Module, num_rows: int) -> Trace:
    """Return the bytes of the head for some rows, from hidden state to log-probability."""
    causal: Any = unwrap(model)
    width, dtype = causal.get_output_embeddings().weight.shape[1], causal.dtype

    def run() -> Tensor:
        states = torch.empty(num_rows, width, dtype=dtype, device="meta", requires_grad=True)
        index = torch.zeros(num_rows, dtype=torch.int64, device="meta")
        return gather_logprobs(compute_logits(causal, states), index, index)

    return trace_step(model, run)
