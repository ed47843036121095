"""IA3 and the frozen layers around it as one function each, on a CPU, where a step of few tokens waits for calls.

What a projection or a block computes, and keeps, is what it does in parts (`koat.adapters.lean`); the product stands
where the projection stood, and gradients of what both halves of a gated block take are added up by the kernel that
multiplies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from koat.adapters.lean import (
    pull_back_activated,
    pull_back_gated,
    pull_back_output,
    scale_activated,
    scale_gated,
    scale_output,
)
from koat.adapters.projections import project, pull_back_projection


class RescaleProjection(torch.autograd.Function):
    """`layer(x) * vector`; keeps the product, as `koat.adapters.lean.RescaleOutput` does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, vector: Tensor, held: Tensor | None, layer: nn.Linear) -> Tensor:
        """`x` is `[..., in]`, `vector` has `out` numbers; those that `held` `[out]` marks count as one."""
        projected = project(x, layer.weight, layer.bias)
        product, divisor = scale_output(projected, vector, held, out=projected)
        ctx.shape, ctx.held = vector.shape, held
        ctx.save_for_backward(product if vector.requires_grad else None, divisor, layer.weight)
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of `x` and of the vector."""
        product, divisor, weight = ctx.saved_tensors
        for_output, for_vector = pull_back_output(gradients[0], product, divisor, ctx.held)
        for_x = pull_back_projection(for_output, weight) if ctx.needs_input_grad[0] else None
        return for_x, None if for_vector is None else for_vector.view(ctx.shape), None, None


class RescaleBlock(torch.autograd.Function):
    """`inner(activate(gate(x)) * vector)`; keeps `gate(x)`, as `koat.adapters.lean.RescaleActivated` does."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, vector: Tensor, gate: nn.Linear, inner: nn.Linear, activate: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """`x` is `[..., in]`; `vector` has as many numbers as `gate` makes."""
        argument = project(x, gate.weight, gate.bias)
        ctx.save_for_backward(argument, vector, gate.weight, inner.weight)
        ctx.activate = activate
        return project(scale_activated(argument, vector, activate), inner.weight, inner.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of `x` and of the vector."""
        argument, vector, gate, inner = ctx.saved_tensors
        upstream = pull_back_projection(gradients[0], inner)
        for_gate, for_vector = pull_back_activated(upstream, argument, vector, ctx.activate)
        for_x = pull_back_projection(for_gate, gate) if ctx.needs_input_grad[0] else None
        return for_x, for_vector, None, None, None


class RescaleGatedBlock(torch.autograd.Function):
    """`inner(activate(gate(x)) * up(x) * vector)`; keeps what `koat.adapters.lean.RescaleGated` does."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        vector: Tensor,
        gate: nn.Linear,
        up: nn.Linear,
        inner: nn.Linear,
        activate: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """`x` is `[..., in]`; `vector` has as many numbers as `gate` and `up` make."""
        argument = project(x, gate.weight, gate.bias)
        product, kept, divisor = scale_gated(argument, project(x, up.weight, up.bias), vector, activate)
        ctx.save_for_backward(argument, kept, divisor, gate.weight, up.weight, inner.weight)
        ctx.activate, ctx.shape = activate, vector.shape
        return project(product, inner.weight, inner.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of `x` and of the vector."""
        argument, kept, divisor, gate, up, inner = ctx.saved_tensors
        upstream = pull_back_projection(gradients[0], inner)
        for_gate, for_up, for_vector = pull_back_gated(upstream, argument, kept, divisor, ctx.activate)
        for_x = None
        if ctx.needs_input_grad[0]:
            for_x = pull_back_projection(for_gate, gate)
            for_x.view(-1, gate.shape[1]).addmm_(for_up.view(-1, len(up)), up)
        return for_x, for_vector.view(ctx.shape), None, None, None, None
