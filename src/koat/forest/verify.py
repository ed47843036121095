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
from torch import Tensor, nn

from koat.core.sequence import Sequence, supervise_from
from koat.core.soft_prompt import has_soft_prompt
from koat.forest.attend import MASKLESS, AttentionPlan, Kernel, find_windows
from koat.forest.build import build_forest
from koat.forest.grow import grow_forest
from koat.forest.kernels import find_kernel, list_kernels, pick_cached
from koat.forest.pack import RowCost
from koat.forest.score import Layout, cut_sequences, estimate_row_cost, set_kernel, token_logprobs, unwrap
from koat.forest.stream import stream_forest
from koat.forest.twin import TWIN_WINDOW, make_twin

TWIN_TOLERANCE = 2e-4
"""Largest log-probability difference on the float32 twin; a wrong mask or position gives 1e-2 and more."""
SLOPE_TOLERANCE = 1e-3
"""Largest relative difference of a gradient on the float32 twin."""
COMPILED: tuple[Kernel, ...] = ("tree", "flex")
"""Kernels that each machine compiles for itself: that one way works there says nothing of the way back."""
SEGMENT = 24
"""Tokens of a segment when carrying keys and values is tried; shorter than the probe's longest sequences."""
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
    worst = 0.0
    for batch in cut_sequences(sequences, layout, token_budget=4096):
        batch = batch.to(device)
        found = token_logprobs(model, batch, layout)
        for owner in torch.unique(batch.owner).tolist():
            difference = float((found[batch.owner == owner] - expected[owner]).abs().max())
            worst = max(worst, difference if np.isfinite(difference) else float("inf"))
    return worst


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
    return max(abs(a - b) if np.isfinite(b) else float("inf") for a, b in pairs)


def trains(model: nn.Module) -> bool:
    """Whether some weight of a model wants a gradient."""
    return any(weight.requires_grad for weight in model.parameters())


def measure_slopes(twin: nn.Module, sequences: ListLike[Sequence], layout: Layout) -> float:
    """Return the relative difference that a layout makes to the gradient of a twin's input embeddings."""
    weight = unwrap(twin).get_input_embeddings().weight
    found = []
    with torch.enable_grad():
        for each in (layout, make_padded(layout.split_head)):
            batches = (batch.to(weight.device) for batch in cut_sequences(sequences, each, token_budget=4096))
            total = torch.stack([token_logprobs(twin, batch, each).sum() for batch in batches]).sum()
            found.append(torch.autograd.grad(total, weight)[0])
    mine, exact = found
    difference = float((mine - exact).norm() / exact.norm())
    return difference if np.isfinite(difference) else float("inf")


def estimate_rounding(model: nn.Module, sequences: ListLike[Sequence]) -> float:
    """Return what rounding alone may do to a log-probability in the model's own type.

    A padded batch of short sequences can come out bit for bit like single ones and then says nothing of it.
    """
    largest = max(float(logprobs.abs().max()) for logprobs in single_logprobs(model, sequences))
    return torch.finfo(unwrap(model).dtype).eps * largest


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


def make_padded(split_head: bool = False) -> Layout:
    """Return the layout without sharing: one sequence a row, right-padded, of similar lengths."""
    return Layout(None, RowCost(0.0), 1, split_head)


def _shrink_windows(layout: Layout) -> Layout:
    """Return the same layout with the twin's small window."""
    assert layout.plan is not None
    windows = tuple((kind, None if window is None else TWIN_WINDOW) for kind, window in layout.plan.windows)
    return replace(layout, plan=replace(layout.plan, windows=windows))


def _try_layout(
    model: nn.Module, probe: ListLike[Sequence], layout: Layout, measure: Measure = measure_difference
) -> tuple[float, str]:
    """Return the difference that a layout makes, or infinity and why it cannot run."""
    try:
        return measure(model, probe, layout), ""
    except torch.OutOfMemoryError:  # says nothing of the layout
        raise
    except Exception as error:  # the model's own code may fail in any way on inputs it does not know
        return float("inf"), f"{type(error).__name__}: {error}"


@torch.no_grad()
def verify_layout(model: nn.Module, attention: str = "auto") -> tuple[Layout, Verification]:
    """Return the layout with the most sharing that computes what single sequences compute.

    `attention` is the setting under which the model was loaded: `sdpa` keeps to dense masks. Falls back to
    padded rows when no forest layout is exact; the reason is in the `Verification`.
    """
    causal = unwrap(model)
    was_training = causal.training
    causal.eval()
    try:
        return _verify(model, list_kernels(model, attention))
    finally:
        causal.train(was_training)


def _verify(model: nn.Module, kernels: list[Kernel]) -> tuple[Layout, Verification]:
    causal, kernel = unwrap(model), kernels[-1]
    try:
        twin = make_twin(causal)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # an unusual configuration class; the model itself still runs
        log.warning("Prefixes are not shared: no small twin of this model can be made (%s).", error)
        return make_padded(), Verification(False, False, kernel, None, None, None, str(error))
    probe = make_probe(twin.config.vocab_size)
    reasons = []
    for layout in [layout for each in kernels for layout in list_candidates(causal.config, each)]:
        assert layout.plan is not None
        for each in (twin, causal):  # single sequences too: a kernel that cannot run here is no reference either
            set_kernel(each, layout.plan.kernel)
        twin_difference, reason = _try_layout(twin, probe, _shrink_windows(layout))
        if twin_difference <= TWIN_TOLERANCE and layout.plan.kernel in COMPILED and trains(model):
            slopes, reason = _try_layout(twin, probe, _shrink_windows(layout), measure_slopes)
            twin_difference = twin_difference if slopes <= SLOPE_TOLERANCE else max(twin_difference, slopes)
        if twin_difference > TWIN_TOLERANCE:
            reasons.append(reason or f"log-probabilities differ by {twin_difference:.2g} on a float32 twin")
            continue
        real = make_probe(causal.get_output_embeddings().weight.shape[0], seed=1)
        noise, _ = _try_layout(model, real, make_padded(layout.split_head))
        # A padded batch that cannot run says nothing of what may differ.
        noise = max((each for each in (noise, estimate_rounding(model, real)) if np.isfinite(each)), default=0.0)
        difference, reason = _try_layout(model, real, layout)
        allowed = max(FLOOR, NOISE_FACTOR * noise)
        if difference <= allowed:
            chosen = _let_stream(layout, (twin, probe, TWIN_TOLERANCE), (model, real, allowed))
            return chosen, Verification(
                shares=True, split_head=layout.split_head, kernel=layout.plan.kernel, twin_difference=twin_difference,
                difference=difference, noise=noise, reason="exact", streams=chosen.streams,
            )  # fmt: skip
        reasons.append(reason or f"log-probabilities differ by {difference:.2g}, batching alone by {noise:.2g}")
    layout, reason = _fall_back(twin, probe), reasons[-1] if reasons else "not tried"
    instead = "one sequence at a time" if layout.alone else "padded batches"
    log.warning("Prefixes are not shared for this model (%s): running %s instead.", reason, instead)
    return layout, Verification(False, layout.split_head, kernel, None, None, None, reason)


def _let_stream(layout: Layout, *trials: tuple[Any, ListLike[Sequence], float]) -> Layout:
    """Return the layout as one that streams, where that is worth while and exact too.

    Walked and tree attention make one long row as cheap as many; with dense masks its cost would be its square.
    """
    assert layout.plan is not None
    streaming = replace(layout, streams=True)
    if layout.plan.kernel not in MASKLESS or has_soft_prompt(trials[-1][0]):
        return layout
    for model, probe, allowed in trials:
        tried = _shrink_windows(streaming) if model is trials[0][0] else streaming
        if _try_layout(model, probe, tried, measure_stream)[0] > allowed:
            return layout
    return streaming


@torch.no_grad()
def verify_growth(model: nn.Module, layout: Layout) -> bool:
    """Whether prompts that grow as a forest write, on a float32 twin, what plain passes find likeliest."""
    if not layout.shares or has_soft_prompt(model):
        return False
    twin = make_twin(model)
    prompts = [sequence.token_ids for sequence in make_probe(twin.config.vocab_size)]
    try:
        grown, _ = grow_forest(
            twin, _shrink_windows(layout), prompts, 12, lambda places, ids: torch.zeros(len(places)) > 0
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the model's own code may fail in any way on inputs it does not know
        log.warning("Prompts are continued one by one: %s: %s", type(error).__name__, error)
        return False
    wholes = [supervise_from(p + tuple(g.token_ids), len(p)) for p, g in zip(prompts, grown, strict=True)]
    set_kernel(twin, pick_cached(twin, find_kernel(twin.config)))
    worst = max(
        float((torch.tensor(each.logprobs) - expected.cpu()).abs().max())
        for each, expected in zip(grown, single_logprobs(twin, wholes), strict=True)
    )
    return worst <= TWIN_TOLERANCE


def _fall_back(twin: Any, probe: ListLike[Sequence]) -> Layout:
    """Return padded rows if they are exact on the twin; if not even they are, one sequence at a time."""
    padded = [make_padded(split) for split in (True, False)]
    for layout in (*padded, replace(padded[0], alone=True)):
        if _try_layout(twin, probe, layout)[0] <= TWIN_TOLERANCE:
            return layout
    return replace(padded[1], alone=True)
