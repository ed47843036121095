"""Find out whether a model computes a forest exactly, instead of keeping a list of the ones that do.

The question is asked twice. On a small float32 twin (same class and configuration, few layers, small window,
random weights), where anything but rounding is an error. Then on the real weights, where the forest may
differ from single sequences no more than a padded batch of them does.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence as ListLike
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from koat.core.sequence import Sequence
from koat.forest.attend import AttentionPlan, Kernel, find_windows
from koat.forest.pack import RowCost
from koat.forest.root import has_cached_root, is_rooted
from koat.forest.score import Layout, cut_sequences, estimate_row_cost, token_logprobs, unwrap
from koat.forest.walk import IMPLEMENTATION

TWIN_TOLERANCE = 2e-4
"""Largest log-probability difference on the float32 twin; a wrong mask or position gives 1e-2 and more."""
TWIN_WINDOW = 8
NOISE_FACTOR = 4.0
FLOOR = 1e-4
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
    caller: Any = model if is_rooted(model) else unwrap(model)
    for sequence in sequences:
        ids = torch.tensor([sequence.token_ids], device=device)
        mask = {"attention_mask": torch.ones_like(ids)} if is_rooted(model) else {}
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
    device = next(model.parameters()).device
    worst = 0.0
    for batch in cut_sequences(sequences, layout, token_budget=4096):
        batch = batch.to(device)
        found = token_logprobs(model, batch, layout)
        for owner in torch.unique(batch.owner).tolist():
            worst = max(worst, float((found[batch.owner == owner] - expected[owner]).abs().max()))
    return worst if np.isfinite(worst) else float("inf")


def make_twin(model: nn.Module) -> Any:
    """Return a small float32 model of the same class: few layers, every layer type, a small window."""
    causal = unwrap(model)
    config = copy.deepcopy(causal.config)
    types = list(getattr(config, "layer_types", None) or [])
    num_layers = 2 if not types else min(4, max(2, max(types.index(kind) for kind in set(types)) + 1))
    config.num_hidden_layers = min(num_layers, config.num_hidden_layers)
    if types and len(config.layer_types) != config.num_hidden_layers:
        config.layer_types = types[: config.num_hidden_layers]
    if getattr(config, "sliding_window", None):
        config.sliding_window = TWIN_WINDOW
    config.vocab_size = min(config.vocab_size, 512)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, None)
    _shrink_rope(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    try:
        twin = type(causal)._from_config(config, dtype=torch.float32)
    finally:
        torch.random.set_rng_state(state)
    twin.config._attn_implementation = causal.config._attn_implementation
    return twin.to(causal.device).eval()


def _shrink_rope(config: Any) -> None:
    """Bring the length at which some rotary scalings switch (longrope, dynamic) among the probe's lengths."""
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and rope.get("rope_type") in {"longrope", "dynamic"}:
        config.max_position_embeddings = 4 * TWIN_WINDOW
        for holder in (config, rope):
            if _read(holder, "original_max_position_embeddings"):
                _write(holder, "original_max_position_embeddings", 3 * TWIN_WINDOW)


def _read(holder: Any, name: str) -> Any:
    return holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)


def _write(holder: Any, name: str, value: Any) -> None:
    if isinstance(holder, dict):
        holder[name] = value
    else:
        setattr(holder, name, value)


def estimate_rounding(model: nn.Module, sequences: ListLike[Sequence]) -> float:
    """Return what rounding alone may do to a log-probability in the model's own type.

    A padded batch of short sequences can come out bit for bit like single ones and then says nothing of it.
    """
    largest = max(float(logprobs.abs().max()) for logprobs in single_logprobs(model, sequences))
    return torch.finfo(unwrap(model).dtype).eps * largest


def find_kernel(config: Any) -> Kernel:
    """Return the kernel whose mask a loaded model understands, from its configuration."""
    known: dict[str, Kernel] = {"sdpa": "sdpa", "flex_attention": "flex", IMPLEMENTATION: "walk"}
    return known.get(config._attn_implementation, "eager")


def list_kernels(model: nn.Module, wanted: str) -> list[Kernel]:
    """Return the kernels worth trying: on a CPU, where SDPA serves, walked attention before it.

    Keys in a cache (prefix tuning) are for kernels that take a dense mask.
    """
    causal = unwrap(model)
    kernel = find_kernel(causal.config)
    if has_cached_root(model):
        return ["eager" if kernel == "eager" else "sdpa"]
    if causal.device.type != "cpu" or kernel not in ("sdpa", "walk"):
        return [kernel]
    if wanted == "sdpa":
        return ["sdpa"]
    return ["walk", "sdpa"]


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


def make_padded(config: Any, split_head: bool = False) -> Layout:
    """Return the layout without sharing: one sequence a row, right-padded, of similar lengths."""
    return Layout(None, RowCost(0.0), 1, split_head)


def _shrink_windows(layout: Layout) -> Layout:
    """Return the same layout with the twin's small window."""
    assert layout.plan is not None
    windows = tuple((kind, None if window is None else TWIN_WINDOW) for kind, window in layout.plan.windows)
    return replace(layout, plan=replace(layout.plan, windows=windows))


def _try_layout(model: nn.Module, probe: ListLike[Sequence], layout: Layout) -> tuple[float, str]:
    """Return the difference that a layout makes, or infinity and why it cannot run."""
    try:
        return measure_difference(model, probe, layout), ""
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
    except Exception as error:  # an unusual configuration class; the model itself still runs
        log.warning("Prefixes are not shared: no small twin of this model can be made (%s).", error)
        return make_padded(causal.config), Verification(False, False, kernel, None, None, None, str(error))
    probe = make_probe(twin.config.vocab_size)
    reasons = []
    for layout in [layout for each in kernels for layout in list_candidates(causal.config, each)]:
        assert layout.plan is not None
        twin_difference, reason = _try_layout(twin, probe, _shrink_windows(layout))
        if twin_difference > TWIN_TOLERANCE:
            reasons.append(reason or f"log-probabilities differ by {twin_difference:.2g} on a float32 twin")
            continue
        real = make_probe(causal.get_output_embeddings().weight.shape[0], seed=1)
        noise, _ = _try_layout(model, real, make_padded(causal.config, layout.split_head))
        noise = max(noise, estimate_rounding(model, real))
        difference, reason = _try_layout(model, real, layout)
        if difference <= max(FLOOR, NOISE_FACTOR * noise):
            found = Verification(
                True, layout.split_head, layout.plan.kernel, twin_difference, difference, noise, "exact"
            )
            return layout, found
        reasons.append(reason or f"log-probabilities differ by {difference:.2g}, batching alone by {noise:.2g}")
    layout, reason = _fall_back(twin, probe), reasons[-1] if reasons else "not tried"
    instead = "one sequence at a time" if layout.alone else "padded batches"
    log.warning("Prefixes are not shared for this model (%s): running %s instead.", reason, instead)
    return layout, Verification(False, layout.split_head, kernel, None, None, None, reason)


def _fall_back(twin: Any, probe: ListLike[Sequence]) -> Layout:
    """Return padded rows if they are exact on the twin; if not even they are, one sequence at a time."""
    padded = [make_padded(twin.config, split) for split in (True, False)]
    for layout in (*padded, replace(padded[0], alone=True)):
        if _try_layout(twin, probe, layout)[0] <= TWIN_TOLERANCE:
            return layout
    return replace(padded[1], alone=True)
