"""Find out whether a model computes a forest exactly, instead of keeping a list of the ones that do.

The question is asked twice. On a small float32 twin (same class and configuration, few layers, small window,
random weights), where anything but rounding is an error. Then on the real weights, where the forest may
differ from single sequences no more than a padded batch of them does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as ListLike
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from koat.core.differences import find_largest
from koat.core.errors import ModelError, summarise_error
from koat.core.out_of_memory import is_out_of_memory
from koat.core.precision import exact_products
from koat.core.sequence import Sequence
from koat.core.soft_prompt import has_soft_prompt
from koat.forest.attend import MASKLESS, AttentionPlan, Kernel, find_windows
from koat.forest.kernels import find_attention_dropout, list_kernels
from koat.forest.probe import (
    estimate_rounding,
    make_probe,
    measure_difference,
    measure_slopes,
    measure_stream,
    single_logprobs,
)
from koat.forest.score import Layout, estimate_row_cost, make_padded, read_width, set_kernel, unwrap
from koat.forest.tree import measure_tree
from koat.forest.twin import make_twin, shrink_windows

TWIN_TOLERANCE = 2e-4
"""Largest log-probability difference on the float32 twin; rounding gives 8e-6, a wrong mask or position 0.4."""
SLOPE_TOLERANCE = 1e-3
"""Largest relative difference of a gradient on the float32 twin."""
KERNEL_TOLERANCE = 0.05
"""Largest relative difference of tree attention or one of its gradients in a short type; a wrong one gives 1 or 2."""
COMPILED: tuple[Kernel, ...] = ("tree", "flex")
"""Kernels that each machine compiles for itself: that one way works there says nothing of the way back."""
DENSE = "Attention runs on dense masks, whose memory grows with the square of a row: %s."
NOISE_FACTOR = 4.0
FLOOR = 1e-4
Measure = Callable[[nn.Module, ListLike[Sequence], Layout], float]
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Verification:
    """What was tried and found: goes into the manifest of a run."""

    shares: bool
    split_head: bool
    kernel: str
    twin_difference: float | None
    difference: float | None
    noise: float | None
    reason: str
    streams: bool = False
    """Whether scoring carries keys and values from one row to the next."""

    def to_mapping(self) -> dict[str, Any]:
        """Return a JSON-safe mapping."""
        return asdict(self)


def trains(model: nn.Module) -> bool:
    """Whether some weight of a model wants a gradient."""
    return any(weight.requires_grad for weight in model.parameters())


def list_candidates(config: Any, kernel: Kernel) -> list[Layout]:
    """Return the layouts worth trying with a kernel, the most sharing first."""
    windows = find_windows(config)
    cost = estimate_row_cost(config, kernel)
    longest = int(getattr(config, "max_position_embeddings", None) or 2048)
    limit = max(longest, 2048 if kernel in ("sdpa", "eager") else 8192)
    by_type = AttentionPlan(kernel, tuple(windows.items()), by_type=True)
    single = AttentionPlan(kernel, tuple(windows.items())[:1])
    plans = [by_type, single] if getattr(config, "layer_types", None) else [single]
    heads = ((True, True), (True, False), (False, False))
    return [Layout(plan, cost, limit, split, narrow=narrow) for split, narrow in heads for plan in plans]


def describe_error(error: Exception) -> str:
    """Return an error in a word and its message in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _try_layout(
    model: nn.Module, probe: ListLike[Sequence], layout: Layout, measure: Measure = measure_difference
) -> tuple[float, str]:
    """Return the difference that a layout makes, or infinity and why it cannot run."""
    try:
        return measure(model, probe, layout), ""
    except Exception as error:  # the model's own code may fail in any way on inputs it does not know
        if is_out_of_memory(error):  # says nothing of the layout
            raise
        return float("inf"), describe_error(error)


def _try_twin(twin: Any, probe: ListLike[Sequence], layout: Layout, compute: torch.dtype | None) -> tuple[float, str]:
    """Return the difference that a layout makes on a twin, and what is wrong with it; nothing if all is well.

    Where kernels were compiled here and a model will be trained in the type `compute`, so are gradients.
    """
    shrunk = shrink_windows(layout)
    difference, reason = _try_layout(twin, probe, shrunk)
    if difference > TWIN_TOLERANCE:
        return difference, reason or f"log-probabilities differ by {difference:.2g} on a float32 twin"
    assert shrunk.plan is not None
    if compute is None or shrunk.plan.kernel not in COMPILED:
        return difference, ""
    slopes, reason = _try_layout(twin, probe, shrunk, measure_slopes)
    if slopes > SLOPE_TOLERANCE:
        return difference, reason or f"gradients differ by {slopes:.2g} on a float32 twin"
    return difference, _find_wrong_kernel(twin, shrunk.plan, compute) if shrunk.plan.kernel == "tree" else ""


def _find_wrong_kernel(twin: Any, plan: AttentionPlan, compute: torch.dtype) -> str:
    """Return what is wrong with tree attention in the type that is trained in, at a twin's width of heads."""
    config = twin.config
    try:
        width = int(getattr(config, "head_dim", None) or read_width(config) // config.num_attention_heads)
        windows = dict.fromkeys(window for _, window in plan.windows)
        wrong = find_largest(measure_tree(width, compute, twin.device, window) for window in windows)
    except Exception as error:  # a compiler may fail in any way, and configurations have names of their own
        if is_out_of_memory(error):
            raise
        return describe_error(error)
    return "" if wrong <= KERNEL_TOLERANCE else f"tree attention in {compute} differs by {wrong:.2g} from its formula"


@torch.no_grad()
@exact_products()
def verify_layout(
    model: nn.Module, attention: str = "auto", compute: torch.dtype | None = None
) -> tuple[Layout, Verification]:
    """Return the layout with the most sharing that computes what single sequences compute.

    `attention` is the setting under which the model was loaded: `sdpa` keeps to dense masks; `compute` the type of
    training under autocast. Falls back to padded rows when no forest layout is exact; the reason is in the
    `Verification`.
    """
    causal = unwrap(model)
    was_training = causal.training
    causal.eval()
    try:
        return _verify(model, _pick_kernels(model, attention), compute or causal.dtype)
    finally:
        causal.train(was_training)


def _pick_kernels(model: nn.Module, attention: str) -> list[Kernel]:
    """Return the kernels to try: those alone that drop attention, and have a price, where training will drop some."""
    kernels, dropped = list_kernels(model, attention), find_attention_dropout(unwrap(model).config)
    if not dropped or not trains(model) or len(kernels) == 1:
        return kernels
    log.warning(DENSE, f"this model drops {dropped:g} of its attention in training, which other kernels do not compute")
    return kernels[-1:]


def _verify(model: nn.Module, kernels: list[Kernel], compute: torch.dtype) -> tuple[Layout, Verification]:
    causal, kernel = unwrap(model), kernels[-1]
    real = make_probe(causal.get_output_embeddings().weight.shape[0], seed=1)
    if has_soft_prompt(model):
        _check_prompt(model, real, kernel)
    try:
        twin = make_twin(causal)
    except Exception as error:  # an unusual configuration class; the model itself still runs
        if is_out_of_memory(error):
            raise
        allowed = max(FLOOR, NOISE_FACTOR * _estimate_rounding(model, real))
        reason = f"no small twin of this model can be made: {describe_error(error)}"
        return _fall_back(model, real, allowed, kernel, reason, heads=(False,))
    probe = make_probe(twin.config.vocab_size)
    reasons = []
    for layout in [layout for each in kernels for layout in list_candidates(causal.config, each)]:
        assert layout.plan is not None
        for each in (twin, causal):  # single sequences too: a kernel that cannot run here is no reference either
            set_kernel(each, layout.plan.kernel)
        twin_difference, reason = _try_twin(twin, probe, layout, compute if trains(model) else None)
        if reason:
            reasons.append(reason)
            continue
        noise = _estimate_noise(model, real, make_padded(layout.split_head))
        difference, reason = _try_layout(model, real, layout)
        allowed = max(FLOOR, NOISE_FACTOR * noise)
        if difference <= allowed:
            if layout.plan.kernel != kernels[0]:
                log.warning(DENSE, reasons[0])
            chosen = _let_stream(layout, (twin, probe, TWIN_TOLERANCE), (model, real, allowed))
            return chosen, Verification(
                shares=True, split_head=layout.split_head, kernel=layout.plan.kernel, twin_difference=twin_difference,
                difference=difference, noise=noise, reason="exact", streams=chosen.streams,
            )  # fmt: skip
        reasons.append(reason or f"log-probabilities differ by {difference:.2g}, batching alone by {noise:.2g}")
    reason = reasons[-1] if reasons else "not tried"
    return _fall_back(twin, probe, TWIN_TOLERANCE, kernel, reason, heads=(True, False))


def _check_prompt(model: nn.Module, probe: ListLike[Sequence], kernel: Kernel) -> None:
    """Raise ModelError where PEFT's own forward pass fails with a soft prompt: there is nothing to train or compare."""
    set_kernel(unwrap(model), kernel)
    try:
        single_logprobs(model, probe[:1])
    except Exception as error:  # prompts of a wrong size, caches of another kind
        if is_out_of_memory(error):
            raise
        first = summarise_error(error).rstrip(".")
        raise ModelError(
            f"This base cannot run with this soft prompt: {first}. Use adapter.method=ia3 or lora."
        ) from error


def _estimate_noise(model: nn.Module, probe: ListLike[Sequence], padded: Layout) -> float:
    """Return what batching and rounding alone do; a batch that cannot run says nothing of what may differ."""
    batching, _ = _try_layout(model, probe, padded)
    return max(batching if np.isfinite(batching) else 0.0, _estimate_rounding(model, probe))


def _estimate_rounding(model: nn.Module, probe: ListLike[Sequence]) -> float:
    """Return what rounding alone does; 0 where the model gives no finite numbers."""
    measure: Measure = lambda model, probe, layout: estimate_rounding(model, probe)  # noqa: E731
    rounding, _ = _try_layout(model, probe, make_padded(), measure)
    return rounding if np.isfinite(rounding) else 0.0


def _let_stream(layout: Layout, *trials: tuple[Any, ListLike[Sequence], float]) -> Layout:
    """Return the layout as one that streams, where that is worth while and exact too.

    Walked and tree attention make one long row as cheap as many; with dense masks its cost would be its square.
    """
    assert layout.plan is not None
    streaming = replace(layout, streams=True)
    if layout.plan.kernel not in MASKLESS or has_soft_prompt(trials[-1][0]):
        return layout
    for model, probe, allowed in trials:
        tried = shrink_windows(streaming) if model is trials[0][0] else streaming
        if _try_layout(model, probe, tried, measure_stream)[0] > allowed:
            return layout
    return streaming


def _fall_back(
    tried: Any, probe: ListLike[Sequence], allowed: float, kernel: Kernel, reason: str, heads: ListLike[bool]
) -> tuple[Layout, Verification]:
    """Return padded rows if they are exact on a twin, or the model without one; if not even they, single sequences.

    `heads` are the ways to compute the head that are tried: split, and whole.
    """
    padded = [make_padded(split) for split in heads]
    layouts = (*padded, replace(padded[0], alone=True))
    exact = (layout for layout in layouts if _try_layout(tried, probe, layout)[0] <= allowed)
    layout = next(exact, replace(padded[-1], alone=True))
    instead = "one sequence at a time" if layout.alone else "padded batches"
    log.warning("Prefixes are not shared for this model (%s): running %s instead.", reason, instead)
    return layout, Verification(False, layout.split_head, kernel, None, None, None, reason)
