"""IA3 where PEFT has no layer: after the norm that follows keys or queries, and inside experts.

A norm after a projection takes the common factor of its scale away again, and experts that are one 3-D parameter
have no linear layer to go around. Here a vector is put into the norm or the experts themselves, as a submodule that
PEFT counts, saves and switches as its own. It is a change of weights too: of the norm's gain, and of the columns of
each expert's last matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.ia3.layer import IA3Layer
from torch import Tensor, nn
from torch.nn import functional as F

from koat.adapters.architectures import UnknownFamilyError, find_architecture
from koat.adapters.ia3 import resolve_ia3_targets
from koat.adapters.lean import rescale, rescale_activated
from koat.adapters.refine import mix_in, take_out
from koat.adapters.settings import Ia3Settings
from koat.adapters.targets import covers
from koat.core.errors import AdapterError

if TYPE_CHECKING:
    from koat.core.config import Section

CHILD = "rescaling"
ADAPTER = "default"
TOLERANCE = 1e-4
"""How far two float32 computations of the same may be apart, over their size."""


class Rescaling(nn.Module, IA3Layer):
    """The vector of one place, beginning at one; named as PEFT's IA3 names its own."""

    weight = bias = None  # type: ignore[assignment]  # PEFT's look for a layer below, and there is none

    def __init__(self, shape: Iterable[int], device: torch.device, trainable: bool) -> None:
        """`shape` is the vector's; experts have a row each."""
        super().__init__()
        vector = nn.Parameter(torch.ones(tuple(shape), device=device), requires_grad=trainable)
        self.ia3_l = nn.ParameterDict({ADAPTER: vector})

    def read(self) -> Tensor | None:
        """Return the vector; None while adapters are switched off, or another one is active."""
        absent = self.disable_adapters or ADAPTER not in self.active_adapters or ADAPTER not in self.ia3_l
        return None if absent else self.ia3_l[ADAPTER]


class NormPlace(nn.Module):
    """Mixed into a norm: its output `[..., d]` is rescaled."""

    rescaling: Rescaling

    def forward(self, x: Tensor) -> Tensor:
        """Norm `x`, then rescale."""
        normed: Tensor = super().forward(x)
        vector = self.rescaling.read()
        return normed if vector is None else rescale(normed, vector)

    @staticmethod
    def shape_vector(norm: Any) -> Iterable[int]:
        """Return the vector's shape: a factor for each gain."""
        shape: torch.Size = norm.weight.shape
        return shape

    @torch.no_grad()
    def fold(self, vector: Tensor) -> None:
        """Put the vector into the gain, whichever way the norm has it: as a factor, or as a factor less one (Gemma).

        Raises AdapterError for a norm that has its gain in another way.
        """
        norm: Any = self
        probe = torch.randn(4, vector.numel(), generator=torch.Generator().manual_seed(0)).to(vector)
        wanted = super().forward(probe) * vector
        kept = {name: tensor.clone() for name, tensor in norm.named_parameters(recurse=False)}
        if "bias" in kept:
            norm.bias.mul_(vector)
        distances = []
        for gain in (candidates := (kept["weight"] * vector, (1 + kept["weight"]) * vector - 1)):
            norm.weight.copy_(gain)
            distances.append(float((super().forward(probe) - wanted).norm() / wanted.norm()))
        nearest = min(distances)
        if nearest <= TOLERANCE:
            norm.weight.copy_(candidates[distances.index(nearest)])
            return
        for name, tensor in kept.items():
            getattr(norm, name).copy_(tensor)
        raise AdapterError(
            f"How {type(norm).__name__} applies its gain is not known, so a scale after it cannot be merged into it. "
            "Use the adapter as it is, or train with adapter.reach=peft."
        )


class ExpertsPlace(nn.Module):
    """Mixed into experts `down(act(gate) * up)` kept as 3-D parameters: each one's inner activation is rescaled."""

    rescaling: Rescaling

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Send `hidden` `[T, d]` through the experts `chosen` `[T, k]` and add their outputs by `weights` `[T, k]`."""
        vectors = self.rescaling.read()
        if vectors is None:
            plain: Tensor = super().forward(hidden, chosen, weights)
            return plain
        experts: Any = self
        total, rows = torch.zeros_like(hidden), vectors.unbind()
        for expert, tokens, places in route(chosen, experts.num_experts):
            gate, up = F.linear(hidden[tokens], experts.gate_up_proj[expert]).chunk(2, dim=-1)
            inner = rescale_activated(gate, up, rows[expert], experts.act_fn)
            output = F.linear(inner, experts.down_proj[expert]) * weights[tokens, places, None]
            total.index_add_(0, tokens, output.to(total.dtype))
        return total

    @staticmethod
    def shape_vector(experts: Any) -> Iterable[int]:
        """Return the vector's shape: a row for each expert, as wide as its inner activation."""
        number, _, width = experts.down_proj.shape
        return (number, width)

    @torch.no_grad()
    def fold(self, vector: Tensor) -> None:
        """Scale the columns of each expert's last matrix."""
        experts: Any = self
        experts.down_proj.mul_(vector[:, None, :])


def route(chosen: Tensor, num_experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield each expert that is chosen, with the tokens that chose it and the places `[T, k]` where they did.

    On the meta device, where no choice has a value, one expert takes all.
    """
    if chosen.is_meta:
        tokens = torch.arange(chosen.numel(), device=chosen.device)
        yield 0, tokens // chosen.shape[1], tokens % chosen.shape[1]
        return
    for expert in range(num_experts):
        tokens, places = torch.where(chosen == expert)
        if len(tokens):
            yield expert, tokens, places


def list_kinds(settings: Section, config: Any) -> list[str]:
    """Return the ends of the names of modules that get a vector of koat's own; none unless `reach` is `whole`.

    Raises AdapterError for a family that is not in the table.
    """
    if not isinstance(settings, Ia3Settings) or settings.reach == "peft":
        return []
    try:
        architecture = find_architecture(config)
    except UnknownFamilyError as error:
        raise AdapterError(
            f"adapter.reach=whole must know where a family has norms and experts, and {config.model_type!r} is not in "
            "the table. Leave it out, or set adapter.reach=peft."
        ) from error
    targets, _ = resolve_ia3_targets(settings, config)
    norms = ((architecture.query, architecture.query_norm), (architecture.key, architecture.key_norm))
    kinds = [norm for layer, norm in norms if norm is not None and covers(targets, layer)]
    if architecture.experts is not None and settings.targets in ("paper", "attention", "all-linear"):
        kinds.append(architecture.experts)
    return kinds


def find_places(kinds: list[str], base: nn.Module) -> list[str]:
    """Return the modules of a base model, PEFT's layers in it, whose names end as `kinds` say.

    A norm is one of them where the projection before it is rescaled: targets may name single layers.
    """
    if not kinds:
        return []
    architecture = find_architecture(base.config)
    before = {architecture.query_norm: architecture.query, architecture.key_norm: architecture.key}
    modules = dict(base.named_modules())
    places = []
    for path in modules:
        kind = next((kind for kind in kinds if f".{path}".endswith(f".{kind}")), None)
        beside = f"{path.rpartition('.')[0]}.{before.get(kind)}"
        if kind is not None and (kind not in before or hasattr(modules.get(beside), "ia3_l")):
            places.append(path)
    return places


def extend_reach(base: nn.Module, places: Iterable[str], trainable: bool) -> None:
    """Put a vector into every module of a base model that is named.

    Raises AdapterError for a place that the model does not have, or whose experts compute something else.
    """
    modules = dict(base.named_modules())
    for place in places:
        if place not in modules:
            raise AdapterError(f"This adapter rescales {place}, and the base model has no such module.")
        _extend(modules[place], trainable)


def _extend(module: nn.Module, trainable: bool) -> None:
    kind: Any = ExpertsPlace if hasattr(module, "down_proj") else NormPlace
    weight = next(module.parameters())
    mix_in(module, kind)
    module.add_module(CHILD, Rescaling(kind.shape_vector(module), weight.device, trainable))
    if kind is ExpertsPlace and not weight.is_meta:
        _check_experts(module)


@torch.no_grad()
def _check_experts(module: Any) -> None:
    """Raise AdapterError unless vectors of ones change nothing: experts come in more than one form."""
    number, width = module.num_experts, module.down_proj.shape[1]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2 * number, width, generator=generator).to(module.down_proj)
    chosen = torch.arange(2 * number, device=hidden.device)[:, None] % number
    weights = torch.ones_like(chosen, dtype=hidden.dtype)
    found = module(hidden, chosen, weights)
    if not are_close(found, super(ExpertsPlace, module).forward(hidden, chosen, weights)):
        raise AdapterError(
            f"{type(module).__name__} does not compute its experts in the form that koat knows. Use adapter.reach=peft."
        )


def are_close(left: Tensor, right: Tensor) -> bool:
    """Whether two results are the same but for rounding in their type."""
    step = max(TOLERANCE, 4 * torch.finfo(left.dtype).eps)
    return bool((left - right).float().norm() <= step * right.float().norm())


def list_places(base: nn.Module) -> list[str]:
    """Return the modules of a base model that hold a vector of koat's own."""
    return [name for name, module in base.named_modules() if isinstance(module, (NormPlace, ExpertsPlace))]


def fold_places(model: nn.Module) -> None:
    """Merge koat's own vectors into the weights and take them out. Raises AdapterError where that cannot be."""
    for module in list(model.modules()):
        vector = getattr(module, CHILD, None)
        if isinstance(module, (NormPlace, ExpertsPlace)) and isinstance(vector, Rescaling):
            module.fold(vector.ia3_l[ADAPTER].detach())
            del module._modules[CHILD]
            take_out(module)
