"""A small float32 model of the same kind as another: what a layout is tried on first."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from koat.core.out_of_memory import is_out_of_memory
from koat.core.seeding import seeded
from koat.forest.score import Layout, unwrap

TWIN_WINDOW = 8
"""The twin's sliding window in tokens, where the family has one."""
WINDOWS = ("sliding_window", "window_size", "attention_chunk_size", "keep_window_size")
"""What families call how far a layer sees. Beyond the probe's length it would be tried on nothing."""
INNER_WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim", "n_inner")
"""What families call the width of their feed-forward layers, which no position and no mask has to do with."""
MOST_INNER = 1024
"""Numbers that they have at most in the twin: a few layers of a wide model would take gigabytes in float32."""

MOST_LAYERS = 4
"""Where the first layers of a model hold every type, so many of them are taken."""


def make_twin(model: nn.Module) -> Any:
    """Return a small float32 model of the same class: few layers, every layer type, a small window, large weights."""
    causal = unwrap(model)
    config = copy.deepcopy(causal.config)
    types = pick_layer_types(list(getattr(config, "layer_types", None) or []))
    config.num_hidden_layers = min(len(types) or 2, config.num_hidden_layers)
    if types and list(config.layer_types) != types:  # some families derive them from the number of layers
        config.layer_types = types[: config.num_hidden_layers]
    for name in WINDOWS:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, TWIN_WINDOW)
    config.vocab_size = min(config.vocab_size, 512)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        _forget_token(config, name)
    _shrink_rope(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        twin = _draw(type(causal), narrow_inner(config))
        with torch.no_grad():
            twin(input_ids=torch.zeros(1, 2, dtype=torch.int64, device="cpu"), use_cache=False)
    except Exception as error:  # a family whose widths hang on one another
        if is_out_of_memory(error):
            raise
        twin = _draw(type(causal), config)
    twin.config._attn_implementation = causal.config._attn_implementation
    return twin.to(causal.device).eval()


def narrow_inner(config: Any) -> Any:
    """Return a configuration whose feed-forward layers are `MOST_INNER` wide at most, where it says how wide."""
    narrow = copy.deepcopy(config)
    for name in INNER_WIDTHS:
        if isinstance(width := getattr(narrow, name, None), int):
            setattr(narrow, name, min(width, MOST_INNER))
    return narrow


def _draw(kind: Any, config: Any) -> Any:
    """Return a float32 model with large random weights, the same every time."""
    with seeded(0):
        drawn = kind._from_config(config, dtype=torch.float32)
        enlarge_weights(drawn)
    return drawn


@torch.no_grad()
def enlarge_weights(model: nn.Module) -> None:
    """Scale a model's matrices so that every token, position and mask matters to the outcome, whatever its width.

    At the usual 0.02, which a width of 3,600 has here too, a narrow model is all but a table of its last token: a wrong
    position or neighbour changes no more than rounding does.
    """
    for path, weight in model.named_parameters():
        owner, _, name = path.rpartition(".")
        # By name: recurrent layers keep decays as matrices. Experts lie in one tensor without it.
        if (name == "weight" and weight.ndim > 1) or (weight.ndim == 3 and len(weight) > 1):
            scale, drawn = find_scale(model.get_submodule(owner), weight), float(weight.std())
            weight.mul_(scale / drawn) if drawn > 0 else weight.normal_(0, scale)


def find_scale(module: nn.Module, weight: Tensor) -> float:
    """Return the standard deviation at which what a matrix puts out is about as large as what goes in.

    An embedding has that of the head, which it may be as well.
    """
    if isinstance(module, nn.Conv1d):
        return 1.2 / math.sqrt(weight[0].numel())
    turned = type(module).__name__ == "Conv1D"  # GPT-2's linear layer: inputs first
    return 1.2 / math.sqrt(weight.shape[0 if turned else -1])


def pick_layer_types(types: list[str]) -> list[str]:
    """Return the types of the twin's layers: the first few, or one of each where a type comes later (Gemma 3)."""
    if not types:
        return []
    needed = max(types.index(kind) for kind in set(types)) + 1
    return types[: max(2, needed)] if needed <= MOST_LAYERS else list(dict.fromkeys(types))


def shrink_windows(layout: Layout) -> Layout:
    """Return a layout with the twin's small window."""
    assert layout.plan is not None
    windows = tuple((kind, None if window is None else TWIN_WINDOW) for kind, window in layout.plan.windows)
    return replace(layout, plan=replace(layout.plan, windows=windows))


def _forget_token(config: Any, name: str) -> None:
    """Take a special token, which may lie outside the small vocabulary, from a configuration."""
    try:
        setattr(config, name, None)
    except Exception:  # some families want a number, each with an error of its own
        setattr(config, name, 0)


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
