"""Rotary positions: the model's own numbers, in fewer passes over queries and keys, most of all on the way back.

transformers writes the rotation as slices, a negation, a concatenation, two products and a sum, and autograd takes
each of them back by itself: the slices as zeros with a piece filled in. A rotation is taken back by the one the other
way, so both ways take the same few passes here, on a GPU one kernel (`koat.adapters.fused`). Su et al. 2021,
"RoFormer: Enhanced Transformer with Rotary Position Embedding", equation 34.

Models call a function of their own file. An attention layer's class is changed in place, as those of IA3 and norms
are, to one whose forward pass is the same code and finds the function here under that name; other models see nothing.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from koat.adapters.fused import find_frozen
from koat.adapters.refine import mix_in, take_out

NAME = "apply_rotary_pos_emb"
"""What models call the function that turns queries and keys."""
WIDEST = torch.complex128
"""The type of the largest numbers: half a narrow head moves as one of them."""

Rotation = Callable[..., tuple[Tensor, Tensor]]


class Rotate(torch.autograd.Function):
    """Turn queries and keys by their positions; keeps cosines and sines, which all layers share."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys are `[B, H, T, d]`, each with its H; cosines and sines as in `turn`."""
        ctx.save_for_backward(cos, sin)
        first, second = turn((query, key), cos, sin)
        return first, second

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of queries and keys."""
        cos, sin = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        turned = turn([each for each, wanted in zip(gradients, needed, strict=True) if wanted], cos, sin, back=True)
        return *(next(turned) if wanted else None for wanted in needed), None, None


def turn(heads: Iterable[Tensor], cos: Tensor, sin: Tensor, back: bool = False) -> Iterator[Tensor]:
    """Turn the first n numbers of heads `[B, H, T, d]` by `cos` and `sin` `[1 or B, T, n]`; the others stay.

    Number i goes with number i + n / 2. Products are rounded to the heads' type before they are added up, as in
    transformers. With `back` gradients are turned into those of what was turned.
    """
    frozen = find_frozen(cos)
    if frozen is not None:
        return (frozen.turn(each, cos, sin, back) for each in heads)
    falling, rising = sin.chunk(2, -1)
    cosines, sines = cos[:, :, None], torch.cat((-falling, rising), -1)[:, :, None]
    return (turn_rows(each.transpose(1, 2), cosines, sines, back).transpose(1, 2) for each in heads)


def turn_rows(rows: Tensor, cosines: Tensor, sines: Tensor, back: bool) -> Tensor:
    """Turn rows of heads `[B, T, H, d]`; `cosines` and `sines`, with their signs, are `[1 or B, T, 1, n]`."""
    width = cosines.shape[-1]
    part = rows if width == rows.shape[-1] else rows[..., :width].contiguous()
    crossed = swap_halves(part * sines) if back else swap_halves(part) * sines
    turned = (part * cosines).add_(crossed)
    if part is rows:
        return turned
    whole = rows.clone(memory_format=torch.contiguous_format)
    whole[..., :width] = turned
    return whole


def swap_halves(rows: Tensor) -> Tensor:
    """Return rows `[..., n]` with their second half before the first."""
    size = WIDEST.itemsize // rows.element_size()
    fits = rows.is_contiguous() and rows.shape[-1] % (2 * size) == 0 and rows.storage_offset() % size == 0
    first, second = (rows.view(WIDEST) if fits else rows).chunk(2, -1)
    return torch.cat((second, first), -1).view(rows.dtype)


class LeanRotary(nn.Module):
    """Mixed into the class of an attention layer that turns queries and keys here."""


def refine_rotary(model: nn.Module) -> None:
    """Let a model's attention layers turn queries and keys here, where their own function is found to do the same."""
    for module in model.modules():
        kind: Any = type(module)
        if not isinstance(module, LeanRotary) and (mixin := _make_mixin(kind)):
            mix_in(module, mixin)


def release_rotary(model: nn.Module) -> None:
    """Give the attention layers their own class back."""
    for module in model.modules():
        if isinstance(module, LeanRotary):
            take_out(module)


@functools.cache
def _make_mixin(plain: type[nn.Module]) -> type[LeanRotary] | None:
    """Return the class that goes before an attention layer's own; None for a class that is not known to turn so."""
    forward: Any = plain.forward
    code = getattr(forward, "__code__", None)
    if code is None or NAME not in code.co_names:
        return None
    own = forward.__globals__.get(NAME)
    turned = [share for share in (0.5, 1.0) if turns_alike(own, share)]
    if 1.0 not in turned:
        return None
    names = {**forward.__globals__, NAME: make_rotation(own, takes_parts=0.5 in turned)}
    lean = types.FunctionType(code, names, forward.__name__, forward.__defaults__, forward.__closure__)
    lean.__kwdefaults__ = forward.__kwdefaults__
    return type("LeanRotary", (LeanRotary,), {"forward": lean, "__doc__": LeanRotary.__doc__})


def make_rotation(plain: Rotation, takes_parts: bool) -> Rotation:
    """Return `plain`, computed here where that serves; `takes_parts`: it leaves what is beyond the cosines alone."""

    def rotate(
        query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *more: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        if more or options or not is_served(query, key, cos, sin, takes_parts):
            return plain(query, key, cos, sin, *more, **options)
        turned: tuple[Tensor, Tensor] = Rotate.apply(query, key, cos, sin)  # type: ignore[no-untyped-call]
        return turned

    return rotate


def is_served(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, takes_parts: bool) -> bool:
    """Whether queries, keys, cosines and sines have the shapes and the one type that `turn` takes, where it serves."""
    if query.dim() != 4 or key.dim() != 4:
        return False
    num_rows, _, length, width = query.shape
    turned = cos.shape[-1]
    return (
        {query.dtype} == {key.dtype, cos.dtype, sin.dtype}
        and cos.shape == sin.shape
        and cos.shape[:-1] in ((1, length), (num_rows, length))
        and (key.shape[0], key.shape[2], key.shape[3]) == (num_rows, length, width)
        and (turned == width or (takes_parts and turned < width))
        and turned % 2 == 0
        and not cos.requires_grad
        and (query.device.type in ("cpu", "meta") or find_frozen(query) is not None)
    )


def turns_alike(plain: Any, share: float) -> bool:
    """Whether a function turns that share of each head to the very bits that `turn` does, found by trying it."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        shapes = ((2, 3, 5, 8), (2, 1, 5, 8), (2, 5, int(8 * share)), (2, 5, int(8 * share)))
        query, key, cos, sin = (torch.randn(each, generator=generator, device="cpu").to(dtype) for each in shapes)
        try:
            found = plain(query, key, cos, sin)
            if not all(torch.equal(a, b) for a, b in zip(found, turn((query, key), cos, sin), strict=True)):
                return False
        except Exception:  # it takes something else, or runs elsewhere
            return False
    return True
