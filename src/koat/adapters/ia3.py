"""IA3 as its paper has it: vectors that rescale keys, values and the inner feed-forward activation.

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
equations 1-3. The file format, the merging and the saving are PEFT's; the forward pass is koat's: it
multiplies in the activation's own type, keeping next to nothing for the backward pass (lean.py, feed_forward.py),
and on a fused projection it can hold the queries' entries at one.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.ia3 import IA3Config
from peft.tuners.ia3.layer import IA3Layer
from torch import Tensor, nn

from koat.adapters.architectures import UnknownFamilyError, find_architecture, is_transposed, mark_queries
from koat.adapters.blocks import RescaleProjection
from koat.adapters.lean import rescale, rescale_output
from koat.adapters.projections import is_plain
from koat.adapters.refine import is_refinable, mix_in
from koat.adapters.targets import read_peft_default, resolve_roles
from koat.core.errors import AdapterError, suggest

if TYPE_CHECKING:
    from koat.adapters.settings import Ia3Settings


class Ia3Linear(nn.Module, IA3Layer):
    """Mixed into PEFT's IA3 layers: koat's forward pass. `held` marks entries that stay one, or is None."""

    held: Tensor | None
    num_held: int
    is_last: bool
    """Whether it ends a feed-forward block."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the layer to `x` `[..., in]` and rescale its input or its output."""
        vector = self.combine_vectors()
        if vector is None:
            plain: Tensor = super().forward(x, *args, **kwargs)
            return plain
        if self.is_feedforward:
            fed: Tensor = self.base_layer(rescale(x, vector), *args, **kwargs)
            return fed
        if not (args or kwargs or self.is_last) and is_plain(self.base_layer, x):
            product: Tensor = RescaleProjection.apply(x, vector, self.held, self.base_layer)  # type: ignore[no-untyped-call]
            return product
        result: Tensor = self.base_layer(x, *args, **kwargs)
        # Falcon adds to its last feed-forward layer's output in place: what is kept must not be that.
        return rescale(result, vector) if self.is_last else rescale_output(result, vector, self.held)

    def combine_vectors(self) -> Tensor | None:
        """Return the product of the active adapters' vectors, `[d, 1]` or `[1, d]` as PEFT stores them.

        None where there is nothing to multiply by. Held entries are in it as they are stored.
        """
        if self.disable_adapters or self.merged:
            return None
        stored = self.ia3_l
        vectors = [stored[name] for name in self.active_adapters if name in stored]
        if not vectors:
            return None
        vector: Tensor = functools.reduce(torch.mul, vectors)
        return vector

    @torch.no_grad()
    def reset_held(self) -> None:
        """Set held entries to one: weight decay moves parameters that have no gradient."""
        if self.held is not None:
            for vector in self.ia3_l.values():
                vector.masked_fill_(self.held.view_as(vector), 1.0)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Merge as PEFT does, held entries being one."""
        self.reset_held()
        super().merge(*args, **kwargs)


def make_ia3_config(settings: Ia3Settings, config: Any) -> IA3Config:
    """Return PEFT's configuration for these settings on this model."""
    targets, feedforward = resolve_ia3_targets(settings, config)
    return IA3Config(
        task_type="CAUSAL_LM",
        target_modules=targets,
        feedforward_modules=feedforward,
        fan_in_fan_out=is_transposed(config),
    )


def resolve_ia3_targets(settings: Ia3Settings, config: Any) -> tuple[list[str], list[str]]:
    """Return (linear layers rescaled, those of them whose input is rescaled).

    Raises AdapterError for a feed-forward name that is no target: it would change nothing.
    """
    if isinstance(settings.targets, list):
        for name in settings.feedforward:
            if name not in settings.targets:
                raise AdapterError(
                    f"adapter.feedforward names {name!r}, which is not among adapter.targets"
                    f"{suggest(name, settings.targets)}: {', '.join(settings.targets)}. Write it the same in both."
                )
        return settings.targets, settings.feedforward
    if settings.feedforward:
        raise AdapterError(
            f"adapter.feedforward goes with named targets; adapter.targets={settings.targets} knows its own. "
            "Leave it out, or name the layers, for example adapter.targets=[k_proj,v_proj,down_proj]."
        )
    if settings.targets == "peft":
        return (
            read_peft_default("TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING", config),
            read_peft_default("TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING", config),
        )
    architecture = find_architecture(config)
    inner = [] if architecture.inner is None else [architecture.inner]
    paper = settings.targets == "paper"
    names = [architecture.key, architecture.value] if paper else resolve_roles(settings.targets, config)
    return list(dict.fromkeys((*names, *inner))), inner


def refine_ia3_layers(model: nn.Module, holds: bool) -> None:
    """Give PEFT's IA3 layers koat's forward pass; on fused projections hold the queries if `holds`.

    The class of each layer is changed in place: its parameters, names and files stay PEFT's.
    """
    config: Any = model.config
    inner = find_inner(config)
    for name, module in model.named_modules():
        if not is_refinable(module, "ia3"):
            continue
        mix_in(module, Ia3Linear)
        layer: Any = module
        held, layer.num_held = None, 0
        layer.is_last = inner is not None and name.endswith(f".{inner}")
        if holds and not layer.is_feedforward and _is_fused(name, config):
            held = mark_queries(find_architecture(config), config)
            layer.num_held = int(held.sum())
            held = held.to(next(iter(layer.ia3_l.values())).device)
        layer.register_buffer("held", held, persistent=False)


def find_inner(config: Any) -> str | None:
    """Return the layer that ends a feed-forward block, where the family is known and has one."""
    try:
        return find_architecture(config).inner
    except UnknownFamilyError:
        return None


def _is_fused(name: str, config: Any) -> bool:
    architecture = find_architecture(config)
    return architecture.fused is not None and name.endswith(f".{architecture.key}")


def reset_held(model: nn.Module) -> None:
    """Set the held entries of all IA3 vectors to one, before they are read, saved or merged."""
    for module in model.modules():
        if isinstance(module, Ia3Linear):
            module.reset_held()


def count_held(model: nn.Module) -> int:
    """Return how many entries of IA3 vectors are held at one and never trained."""
    return sum(
        module.num_held * sum(vector.requires_grad for vector in module.ia3_l.values())
        for module in model.modules()
        if isinstance(module, Ia3Linear)
    )


def holds_queries(model: nn.Module) -> bool:
    """Whether an IA3 adapter keeps the query entries of fused projections at one."""
    return any(isinstance(module, Ia3Linear) and module.held is not None for module in model.modules())
