"""Multiplying activations by vectors, keeping as little as possible for the backward pass.

A vector of `d` numbers, of any shape, and its gradient are float32, activations `[..., d]` stay in their own type.
The backward pass of `s * h` needs `h`. Three ways to have it then, from plain to lean:

- `rescale` keeps its input;
- `rescale_output` keeps its output and divides by the vector. Attention keeps its values anyway, an activation
  function its argument: an output that one of them takes costs nothing to keep;
- `rescale_activated` keeps what the activation function took, and `up` rescaled in place of `up`, as the frozen
  model does, and computes `act(gate)`, which the frozen model keeps too, again.

What is computed on the way is written where a result will stand: fresh memory costs more than a pass over it. On a
GPU each of these is a function of one kernel each way (`koat.adapters.fused`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from koat.adapters.activations import activate_into, find_kernels, rebuild
from koat.adapters.fused import find_fused
from koat.adapters.vector_products import make_room, multiply, pull_back_product, sum_products, to_rows

TINY = 2.0**-60
"""Added to a vector where a product must be divided by it again: a zero becomes this, an entry above 2^-35 stays the
same float32. Beside the other channels' it is nothing, and products keep their digits: bfloat16 has float32's range."""


def make_divisible(vector: Tensor) -> Tensor:
    """Return a vector's numbers `[d]`, none of them zero."""
    return vector.flatten() + TINY


def is_divisible(activation: Tensor) -> bool:
    """Whether products with a vector may be kept in an activation's place: float16 has no room for tiny ones."""
    return activation.dtype != torch.float16


class Rescale(torch.autograd.Function):
    """`activation * vector`; keeps the activation."""

    @staticmethod
    def forward(ctx: Any, activation: Tensor, vector: Tensor) -> Tensor:
        """`activation` is `[..., d]`, `vector` has `d` numbers."""
        ctx.save_for_backward(activation if vector.requires_grad else None, vector)
        return multiply(activation, vector.flatten())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the activation and of the vector."""
        activation, vector = ctx.saved_tensors
        if activation is None:
            return multiply(gradients[0].contiguous(), vector.flatten()), None
        for_activation, for_vector = pull_back_product(to_rows(gradients[0]), to_rows(activation), vector.flatten())
        return for_activation.view(activation.shape), for_vector.to(vector.dtype).view(vector.shape)


def scale_output(
    activation: Tensor, vector: Tensor, held: Tensor | None, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the product of an activation `[..., d]` and a vector, and what to divide it by again, `[d]`.

    Entries that `held` `[d]` marks count as one.
    """
    divisor = make_divisible(vector)
    if held is not None:
        divisor.masked_fill_(held, 1.0)
    return multiply(activation, divisor, out), divisor


def pull_back_output(
    gradient: Tensor, product: Tensor | None, divisor: Tensor, held: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of activation `[..., d]` and vector `[d]`; no `product`: the vector needs none."""
    if product is None:
        return multiply(gradient.contiguous(), divisor), None
    for_activation, for_product = pull_back_product(to_rows(gradient), to_rows(product), divisor)
    for_vector = for_product.div_(divisor).to(divisor.dtype)
    if held is not None:
        for_vector.masked_fill_(held, 0.0)
    return for_activation.view(product.shape), for_vector


def scale_activated(gate: Tensor, vector: Tensor, activate: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `activate(gate) * vector`; `gate` is `[..., d]`, `vector` has `d` numbers."""
    scaled = make_room(gate)
    activate_into(activate, gate, scaled)
    return multiply(scaled, vector.flatten(), out=scaled)


def pull_back_activated(
    gradient: Tensor, gate: Tensor, vector: Tensor, activate: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `gate` `[..., d]` and of the vector."""
    for_gate = make_room(gate)
    pull_back = rebuild(activate, gate, for_gate)
    gradient, flat = gradient.contiguous(), vector.flatten()
    for_vector = sum_products(to_rows(gradient), to_rows(for_gate), flat)
    pull_back(multiply(gradient, flat, out=for_gate), for_gate)
    return for_gate, for_vector.to(vector.dtype).view(vector.shape)


def scale_gated(
    gate: Tensor, up: Tensor, vector: Tensor, activate: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `activate(gate) * (up * vector)` `[..., d]`, what to keep of `up`, and what to divide it by, `[d]`."""
    divisor = make_divisible(vector)
    scaled_up = multiply(up, divisor)
    product = make_room(gate)
    activate_into(activate, gate, product)
    return product.mul_(scaled_up), scaled_up if is_divisible(up) else up, divisor


def pull_back_gated(
    gradient: Tensor, gate: Tensor, kept: Tensor, divisor: Tensor, activate: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `gate` and `up` `[..., d]` and of the vector `[d]`."""
    gradient = gradient.contiguous()
    for_gate = make_room(gate)
    pull_back = rebuild(activate, gate, for_gate)
    upstream = gradient * for_gate
    for_vector = sum_products(to_rows(upstream), to_rows(kept), divisor)
    torch.mul(gradient, kept if is_divisible(kept) else multiply(kept, divisor), out=for_gate)
    pull_back(for_gate, for_gate)
    if is_divisible(kept):
        for_vector = for_vector.div_(divisor)
    return for_gate, multiply(upstream, divisor, out=upstream), for_vector.to(divisor.dtype)


class RescaleOutput(torch.autograd.Function):
    """`activation * vector`; keeps the product and gets the activation back by division."""

    @staticmethod
    def forward(ctx: Any, activation: Tensor, vector: Tensor, held: Tensor | None) -> Tensor:
        """`activation` is `[..., d]`, `vector` has `d` numbers; those that `held` `[d]` marks count as one."""
        product, divisor = scale_output(activation, vector, held)
        ctx.shape, ctx.held = vector.shape, held
        ctx.save_for_backward(product if vector.requires_grad else None, divisor)
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the activation and of the vector."""
        product, divisor = ctx.saved_tensors
        for_activation, for_vector = pull_back_output(gradients[0], product, divisor, ctx.held)
        return for_activation, None if for_vector is None else for_vector.view(ctx.shape), None


class RescaleActivated(torch.autograd.Function):
    """`activate(gate) * vector`; keeps `gate` and computes the rest again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, vector: Tensor, activate: Callable[[Tensor], Tensor]) -> Tensor:
        """`gate` is `[..., d]`, `vector` has `d` numbers."""
        ctx.save_for_backward(gate, vector)
        ctx.activate = activate
        return scale_activated(gate, vector, activate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the gate and of the vector."""
        gate, vector = ctx.saved_tensors
        return *pull_back_activated(gradients[0], gate, vector, ctx.activate), None


class RescaleGated(torch.autograd.Function):
    """`activate(gate) * (up * vector)`; keeps `gate` and `up * vector`, and gets the rest back from them.

    The vector stands at `up`, where its gradient comes with that of `up`: one pass less than at the product.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, vector: Tensor, activate: Callable[[Tensor], Tensor]) -> Tensor:
        """`gate` and `up` are `[..., d]`, `vector` has `d` numbers."""
        product, kept, divisor = scale_gated(gate, up, vector, activate)
        ctx.save_for_backward(gate, kept, divisor)
        ctx.activate, ctx.shape = activate, vector.shape
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of gate, up and the vector."""
        gate, kept, divisor = ctx.saved_tensors
        for_gate, for_up, for_vector = pull_back_gated(gradients[0], gate, kept, divisor, ctx.activate)
        return for_gate, for_up, for_vector.view(ctx.shape), None


def rescale(activation: Tensor, vector: Tensor) -> Tensor:
    """Return `activation [..., d] * vector [d]` in the activation's type."""
    fused = find_fused(activation)
    if fused is not None:
        product: Tensor = fused.RescaleActivated.apply(activation, None, vector, "identity")
        return product
    scaled: Tensor = Rescale.apply(activation, vector)  # type: ignore[no-untyped-call]
    return scaled


def rescale_output(activation: Tensor, vector: Tensor, held: Tensor | None = None) -> Tensor:
    """Return `activation [..., d] * vector [d]`, for an activation that nobody else keeps.

    Entries of the vector that `held` `[d]` marks count as one and get no gradient; the others are shifted by `TINY`.
    In float16 the activation is kept instead. The result must not be changed in place.
    """
    if is_divisible(activation):
        fused = find_fused(activation)
        form: Any = fused.RescaleOutput if fused else RescaleOutput
        scaled: Tensor = form.apply(activation, vector, held)
        return scaled
    return rescale(activation, vector if held is None else vector.masked_fill(held.view_as(vector), 1.0))


def rescale_activated(gate: Tensor, up: Tensor | None, vector: Tensor, activate: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `activate(gate) [..., d] * up [..., d] * vector [d]` in the activations' type; `up` may be None.

    `activate` works entry by entry, and is called again in the backward pass.
    """
    fused = find_fused(gate)
    kernels = find_kernels(activate) if fused else None
    if fused is not None and kernels is not None:
        product: Tensor = fused.RescaleActivated.apply(gate, up, vector, kernels.name)
        return product
    scaled: Tensor = (
        RescaleActivated.apply(gate, vector, activate)  # type: ignore[no-untyped-call]
        if up is None
        else RescaleGated.apply(gate, up, vector, activate)  # type: ignore[no-untyped-call]
    )
    return scaled
