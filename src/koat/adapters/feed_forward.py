"""Feed-forward blocks whose inner activation IA3 rescales, computed so that the activation is not kept.

The rescaling layer alone sees `act(gate) * up` and would have to keep it. The block also knows what it was made of.
Its class is changed in place, as the layers' classes are; wherever the block is not exactly of a known form, it
stays as it is and the layer keeps its input.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from koat.adapters.blocks import RescaleBlock, RescaleGatedBlock
from koat.adapters.ia3 import Ia3Linear
from koat.adapters.lean import rescale_activated
from koat.adapters.projections import is_plain


@dataclass(frozen=True, slots=True)
class Form:
    """The submodules, all of them, of a block `inner(activation(gate(x)) * up(x))`, or without `up`, by name."""

    gate: str
    activation: str
    inner: str
    up: str | None = None
    dropout: str | None = None
    """Follows the inner layer."""

    def fits(self, module: nn.Module) -> bool:
        """Whether a module has exactly these submodules, the inner one rescaling its input."""
        names = {self.gate, self.activation, self.inner, self.up, self.dropout} - {None}
        inner = getattr(module, self.inner, None)
        return {name for name, _ in module.named_children()} == names and (
            isinstance(inner, Ia3Linear) and inner.is_feedforward
        )


FORMS = (
    Form("gate_proj", "act_fn", "down_proj", up="up_proj"),  # Llama and most since
    Form("dense_h_to_4h", "act", "dense_4h_to_h"),  # GPT-NeoX, Falcon
    Form("c_fc", "act", "c_proj", dropout="dropout"),  # GPT-2
    Form("fc_in", "act", "fc_out", dropout="dropout"),  # GPT-J
    Form("fc1", "activation_fn", "fc2"),  # Phi
)


class LeanFeedForward(nn.Module):
    """Mixed into the class of a block of a known form."""

    form: ClassVar[Form]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to `x` `[..., d]`; where no backward pass follows, as the model's own class does."""
        form = self.form
        inner = getattr(self, form.inner)
        vector = inner.combine_vectors() if torch.is_grad_enabled() and isinstance(inner, Ia3Linear) else None
        if vector is None:
            plain: Tensor = super().forward(x)
            return plain
        first = [getattr(self, name) for name in (form.gate, form.up) if name]
        result = apply_block(x, vector, first, inner.base_layer, getattr(self, form.activation))
        return getattr(self, form.dropout)(result) if form.dropout else result


def apply_block(
    x: Tensor, vector: Tensor, first: list[nn.Module], inner: nn.Module, activate: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return `inner(activate(gate(x)) * up(x) * vector)`; `first` is `[gate, up]` or, without `up`, `[gate]`."""
    if all(is_plain(layer, x) for layer in (*first, inner)):
        form: Any = RescaleGatedBlock if len(first) > 1 else RescaleBlock
        whole: Tensor = form.apply(x, vector, *first, inner, activate)
        return whole
    gate, *up = (layer(x) for layer in first)
    result: Tensor = inner(rescale_activated(gate, up[0] if up else None, vector, activate))
    return result


@functools.cache
def _derive_class(plain: type[nn.Module], form: Form) -> type[nn.Module]:
    return type(f"Lean{plain.__name__}", (LeanFeedForward, plain), {"form": form})


def refine_feed_forwards(model: nn.Module) -> None:
    """Let blocks of a known form rebuild their inner activation in the backward pass.

    One block of each class is tried on random numbers: names alone do not say what a block computes.
    """
    agrees: dict[type[nn.Module], bool] = {}
    for module in model.modules():
        form = next((form for form in FORMS if form.fits(module)), None)
        if form is None or isinstance(module, LeanFeedForward):
            continue
        plain: Any = type(module)
        lean = _derive_class(plain, form)
        if plain not in agrees:
            agrees[plain] = _compute_alike(module, lean, form, _pick_dtype(model, module, form))
        if agrees[plain]:
            module.__class__ = lean


def _pick_dtype(model: nn.Module, block: nn.Module, form: Form) -> torch.dtype:
    """Return the type of a block's activations: its weights', or the model's where they are quantised."""
    found: torch.dtype = getattr(block, form.inner).get_base_layer().weight.dtype
    whole: Any = model.dtype
    return found if found.is_floating_point else whole


def _compute_alike(module: nn.Module, lean: type[nn.Module], form: Form, dtype: torch.dtype) -> bool:
    """Whether a block computes the same under both classes while training, dropout included.

    On the meta device, where nothing has a value, the form decides.
    """
    inner: Any = getattr(module, form.inner)
    device = next(iter(inner.ia3_l.values())).device
    if device.type == "meta":
        return True
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, inner.out_features, generator=generator).to(device, dtype)
    plain, was_training = type(module), module.training
    results = []
    try:
        module.train()
        for kind in (plain, lean):
            module.__class__ = kind
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
                torch.manual_seed(0)
                results.append(module(x).detach().float())
    finally:
        module.__class__ = plain
        module.train(was_training)
    expected, found = results
    return bool((found - expected).norm() <= 1e-2 * expected.norm())
