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

TINY = 2.0**-40
"""Stands in for smaller entries where a product must be divided by its vector again. Beside the other channels'
it is nothing, and products keep their digits: bfloat16 has float32's range."""
PIECE = 1 << 19
"""Numbers in a piece: measured, the few such tensors in use fit into a CPU's caches."""
BLOCK = 32
"""Rows that are added up at once in their own type."""


def multiply(activation: Tensor, vector: Tensor, out: Tensor | None = None) -> Tensor:
    """Multiply by a float32 vector and round once, into the activation's type; into `out` where given.

    Rounding the vector first would move it: near one, bfloat16 knows steps of 1/128 only. On a CPU the one fast
    kernel that takes a short activation and a float32 vector is that of batch normalisation; with mean 0 and
    variance 1 it is this product, bit for bit, at a third of `torch.mul`'s time.
    """
    out = torch.empty_like(activation, memory_format=torch.contiguous_format) if out is None else out
    if activation.dtype != torch.bfloat16 or activation.device.type != "cpu":
        return torch.mul(activation, vector, out=out)
    width = len(vector)
    mean, variance, none = _make_neutral(width)
    results = (out.view(-1, width), none, none)
    torch.native_batch_norm(
        activation.reshape(-1, width), vector.float(), None, mean, variance, False, 0.0, 0.0, out=results
    )
    return out


@functools.cache
def _make_neutral(width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean 0, the variance 1 and the place for statistics of a normalisation that changes nothing."""
    return torch.zeros(width, device="cpu"), torch.ones(width, device="cpu"), torch.empty(0, device="cpu")


def cut_rows(rows: Tensor) -> Iterator[slice]:
    """Yield the pieces in which rows `[n, d]` are worked on: all at once unless on a CPU."""
    count, width = rows.shape
    step = BLOCK * max(1, PIECE // (BLOCK * width)) if rows.device.type == "cpu" else max(1, count)
    for start in range(0, max(1, count), step):
        yield slice(start, start + step)


def sum_rows(rows: Tensor) -> Tensor:
    """Return the sums `[d]` over rows `[n, d]`, in float32 at least.

    A CPU adds bfloat16 numbers fast only into bfloat16 sums, which are exact inside and rounded once: it adds
    blocks of rows so, and the blocks' sums in float32.
    """
    if rows.dtype != torch.bfloat16 or rows.device.type != "cpu":
        return rows.sum(0, dtype=torch.promote_types(rows.dtype, torch.float32))
    rest = len(rows) % BLOCK
    blocks = rows[: len(rows) - rest].view(-1, BLOCK, rows.shape[1]).sum(1).sum(0, dtype=torch.float32)
    return blocks + rows[-rest:].sum(0, dtype=torch.float32) if rest else blocks


def sum_products(left: Tensor, right: Tensor) -> Tensor:
    """Return the sums `[d]` of `left * right` over all but the last axis, in float32 at least."""
    left, right = left.flatten(0, -2), right.flatten(0, -2)
    sums = [sum_rows(left[piece] * right[piece]) for piece in cut_rows(left)]
    return functools.reduce(torch.add, sums)


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
        gradient = gradients[0].contiguous()
        activation, vector = ctx.saved_tensors
        for_activation = multiply(gradient, vector) if ctx.needs_input_grad[0] else None
        for_vector = sum_products(gradient, activation).to(vector.dtype) if ctx.needs_input_grad[1] else None
        return for_activation, for_vector


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
        gradient = gradients[0].contiguous()
        product, divisor = ctx.saved_tensors
        for_activation = multiply(gradient, divisor) if ctx.needs_input_grad[0] else None
        for_vector = None
        if ctx.needs_input_grad[1]:
            for_vector = (sum_products(gradient, product) / divisor).to(divisor.dtype)
        return for_activation, for_vector


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
            with torch.enable_grad():
                source = gate[piece].detach().requires_grad_()
                result = ctx.activate(source)
            part = gradient[piece]
            for_activated = multiply(part, vector)
            products = part * result.detach()
            if up is not None and for_up is not None:
                for_activated.mul_(up[piece])
                multiply(products, vector, out=for_up[piece])
                products.mul_(up[piece])
            for_vector += sum_rows(products)
            (for_gate[piece],) = torch.autograd.grad(result, source, for_activated)
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
