"""Multiplying activations by vectors, keeping as little as possible for the backward pass.

A vector `[d]` and its gradient are float32, activations `[..., d]` stay in their own type. The backward pass of
`s * h` needs `h`. Three ways to have it then, from plain to lean:

- `rescale` keeps its input;
- `rescale_output` keeps its output and divides by the vector. Attention keeps its values anyway, an activation
  function its argument: an output that one of them takes costs nothing to keep;
- `rescale_activated` keeps what the activation function took, which the frozen model keeps too, and computes
  `act(gate) * up` again. The frozen model also keeps `act(gate)`; this does not.

A CPU works on pieces of some rows that stay in its cache, so what is computed on the way takes no memory either.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from koat.adapters.activations import rebuild

TINY = 2.0**-40
"""Stands in for smaller entries where a product must be divided by its vector again. Beside the other channels'
it is nothing, and products keep their digits: bfloat16 has float32's range."""
PIECE = 1 << 19
"""Numbers in a piece: measured, the few such tensors in use fit into a CPU's caches."""


def multiply(activation: Tensor, vector: Tensor, out: Tensor | None = None) -> Tensor:
    """Multiply by a float32 vector and round once, into the activation's type; into `out` where given.

    Rounding the vector first would move it: near one, bfloat16 knows steps of 1/128 only. On a CPU the one fast
    kernel that takes a short activation and a float32 vector is that of batch normalisation; with mean 0 and
    variance 1 it is this product, bit for bit, at a third of `torch.mul`'s time.
    """
    out = torch.empty_like(activation, memory_format=torch.contiguous_format) if out is None else out
    if not is_normalised_fast(activation):
        return torch.mul(activation, vector, out=out)
    width = len(vector)
    mean, variance, none = _make_neutral(width)
    results = (out.view(-1, width), none, none)
    torch.native_batch_norm(
        activation.reshape(-1, width), vector.float(), None, mean, variance, False, 0.0, 0.0, out=results
    )
    return out


def is_normalised_fast(activation: Tensor) -> bool:
    """Whether batch normalisation's kernels are the fast ones for an activation."""
    return activation.dtype == torch.bfloat16 and activation.device.type == "cpu"


@functools.cache
def _make_neutral(width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean 0, the variance 1 and the place for statistics of a normalisation that changes nothing."""
    return torch.zeros(width, device="cpu"), torch.ones(width, device="cpu"), torch.empty(0, device="cpu")


def multiply_back(gradient: Tensor, activation: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `activation` `[n, d]` and of `vector` `[d]` from that of their product.

    On a CPU the backward pass of the same normalisation makes both in one pass, in little more than half the time
    of two, and adds bfloat16 products up in float32.
    """
    if activation.device.type != "cpu" or activation.dtype not in (torch.bfloat16, torch.float32):
        sums = (gradient * activation).sum(0, dtype=torch.promote_types(activation.dtype, torch.float32))
        return multiply(gradient, vector), sums
    mean, variance, none = _make_neutral(len(vector))
    wanted = [True, True, False]
    for_activation, for_vector, _ = torch.ops.aten.native_batch_norm_backward(
        gradient, activation, vector.float(), mean, variance, none, none, False, 0.0, wanted
    )
    return for_activation, for_vector


def cut_rows(rows: Tensor) -> Iterator[slice]:
    """Yield the pieces in which rows `[n, d]` are worked on: all at once unless on a CPU."""
    count, width = rows.shape
    step = max(1, PIECE // width) if rows.device.type == "cpu" else max(1, count)
    for start in range(0, max(1, count), step):
        yield slice(start, start + step)


class Rescale(torch.autograd.Function):
    """`activation * vector`; keeps the activation."""

    @staticmethod
    def forward(ctx: Any, activation: Tensor, vector: Tensor) -> Tensor:
        """`activation` is `[..., d]`, `vector` `[d]`."""
        ctx.save_for_backward(activation if vector.requires_grad else None, vector)
        return multiply(activation, vector)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the activation and of the vector."""
        activation, vector = ctx.saved_tensors
        if activation is None:
            return multiply(gradients[0].contiguous(), vector), None
        rows = (gradients[0].contiguous().flatten(0, -2), activation.flatten(0, -2))
        for_activation, for_vector = multiply_back(*rows, vector)
        return for_activation.view(activation.shape), for_vector.to(vector.dtype)


class RescaleOutput(torch.autograd.Function):
    """`activation * vector`; keeps the product and gets the activation back by division."""

    @staticmethod
    def forward(ctx: Any, activation: Tensor, vector: Tensor) -> Tensor:
        """`activation` is `[..., d]`, `vector` `[d]`."""
        divisor = torch.where(vector.abs() < TINY, TINY, vector)
        product = multiply(activation, divisor)
        ctx.save_for_backward(product if vector.requires_grad else None, divisor)
        return product

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the activation and of the vector."""
        product, divisor = ctx.saved_tensors
        if product is None:
            return multiply(gradients[0].contiguous(), divisor), None
        rows = (gradients[0].contiguous().flatten(0, -2), product.flatten(0, -2))
        for_activation, for_vector = multiply_back(*rows, divisor)
        return for_activation.view(product.shape), (for_vector / divisor).to(divisor.dtype)


class RescaleActivated(torch.autograd.Function):
    """`activate(gate) * up * vector`, or without `up`; keeps `gate` and `up` and computes the rest again."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor | None, vector: Tensor, activate: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """`gate` and `up` are rows `[n, d]`, `vector` is `[d]`."""
        ctx.save_for_backward(gate, up, vector)
        ctx.activate = activate
        scaled = torch.empty_like(gate)
        for piece in cut_rows(gate):
            inner = activate(gate[piece])
            multiply(inner if up is None else inner * up[piece], vector, out=scaled[piece])
        return scaled

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of gate, up and the vector."""
        gradient = gradients[0].contiguous()
        gate, up, vector = ctx.saved_tensors
        for_gate = torch.empty_like(gate)
        for_up = None if up is None else torch.empty_like(up)
        for_vector = vector.new_zeros(vector.shape)
        for piece in cut_rows(gate):
            activated, pull_back = rebuild(ctx.activate, gate[piece])
            inner = activated if up is None else activated * up[piece]
            for_inner, sums = multiply_back(gradient[piece], inner, vector)
            for_vector += sums
            if up is not None and for_up is not None:
                torch.mul(for_inner, activated, out=for_up[piece])
                for_inner.mul_(up[piece])
            pull_back(for_inner, for_gate[piece])
        return for_gate, for_up, for_vector, None


def rescale(activation: Tensor, vector: Tensor) -> Tensor:
    """Return `activation [..., d] * vector [d]` in the activation's type."""
    scaled: Tensor = Rescale.apply(activation, vector)  # type: ignore[no-untyped-call]
    return scaled


def rescale_output(activation: Tensor, vector: Tensor) -> Tensor:
    """Return `activation [..., d] * vector [d]`, for an activation that nobody else keeps.

    Entries nearer to zero than `TINY` count as `TINY`. In float16 such products would vanish: there the
    activation is kept instead. The result must not be changed in place.
    """
    function = Rescale if activation.dtype == torch.float16 else RescaleOutput
    scaled: Tensor = function.apply(activation, vector)  # type: ignore[no-untyped-call]
    return scaled


def rescale_activated(gate: Tensor, up: Tensor | None, vector: Tensor, activate: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `activate(gate) [..., d] * up [..., d] * vector [d]` in the activations' type; `up` may be None.

    `activate` works entry by entry, and is called again in the backward pass.
    """
    rows = [None if tensor is None else tensor.flatten(0, -2) for tensor in (gate, up)]
    scaled: Tensor = RescaleActivated.apply(*rows, vector, activate)  # type: ignore[no-untyped-call]
    return scaled.view(gate.shape)
