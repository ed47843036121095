"""RMS norms of a frozen model: the model's own values, and a backward pass that keeps the input as it came.

transformers computes them in float32, so autograd keeps a float32 copy of every input, and its backward pass of a
mean over the last dimension makes tensors whose rows are columns, which every product after it pays for on a CPU.
With the gain frozen the gradient is one formula, and on a GPU one kernel (`koat.adapters.fused`). Zhang and Sennrich
2019, "Root Mean Square Layer Normalization".
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from koat.adapters.fused import find_frozen
from koat.adapters.refine import mix_in, take_out

PIECE = 1 << 19
"""Numbers that a CPU works on at a time, so that their float32 copies stay small; fewer cost more in calls."""


class NormRows(torch.autograd.Function):
    """`x / rms(x) * gain`, computed as the norm itself does; keeps `x`, in its own type."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, offset: float, epsilon: float, compute: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """`x` is `[..., d]`, the gain `weight + offset` `[d]`."""
        ctx.save_for_backward(x, weight)
        ctx.offset, ctx.epsilon, ctx.frozen = offset, epsilon, find_frozen(x)
        return compute_in_pieces(compute, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of `x`."""
        x, weight = ctx.saved_tensors
        if ctx.frozen is not None:
            return ctx.frozen.pull_back_norm(gradients[0], x, weight, ctx.offset, ctx.epsilon), None, None, None, None
        wide, width = torch.promote_types(x.dtype, torch.float32), len(weight)
        gain = (weight.to(wide) + ctx.offset) * width**0.5
        num_rows = count_rows(x)
        rows, upstream = x.reshape(-1, width), gradients[0].reshape(-1, width)
        if len(rows) <= num_rows:
            result = pull_back(rows.to(wide), upstream.to(wide) * gain, ctx.epsilon).to(x.dtype)
        else:
            result = torch.empty_like(rows, memory_format=torch.contiguous_format)
            for each, above, out in zip(*(tensor.split(num_rows) for tensor in (rows, upstream, result)), strict=True):
                out.copy_(pull_back(each.to(wide), above.to(wide) * gain, ctx.epsilon))
        return result.view(x.shape), None, None, None, None


def compute_in_pieces(compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return a norm of `x` `[..., d]`, which takes each row for itself, a piece of the rows at a time."""
    num_rows, rows = count_rows(x), x.reshape(-1, x.shape[-1])
    if len(rows) <= num_rows:
        return compute(x)
    pieces = torch.split(rows, num_rows)
    return torch.cat([compute(piece) for piece in pieces]).view(x.shape)


def count_rows(x: Tensor) -> int:
    """Return how many rows of `x` `[..., d]` are worked on at a time: all, unless on a CPU with its caches."""
    width = x.shape[-1]
    return max(1, PIECE // width if x.device.type == "cpu" else x.numel() // width)


def pull_back(rows: Tensor, upstream: Tensor, epsilon: float) -> Tensor:
    """Return the gradient of `x` `[n, d]`; `upstream` is `sqrt(d)` times `u`, that of `x / rms`.

    It is `(u - x (u . x) / l^2) / rms` with `l = sqrt(d) rms`. With `l` in place of a row's length that is the gradient
    of weight normalisation (Salimans and Kingma 2016, equation 3), for which PyTorch has one kernel.
    """
    rows, upstream = rows.contiguous(), upstream.contiguous()
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).square_().add_(rows.shape[-1] * epsilon).sqrt_()
    scales = rows.new_ones(len(rows), 1)
    result: Tensor = torch.ops.aten._weight_norm_interface_backward(upstream, rows, scales, length, 0)[0]
    return result


class LeanNorm(nn.Module):
    """Mixed into the class of an RMS norm whose gain is `weight + offset`."""

    offset: float

    def forward(self, x: Tensor) -> Tensor:
        """Norm `x` `[..., d]`; where no backward pass follows or the gain is trained, as the model's own class does."""
        norm: Any = self
        plain = super().forward
        if not (torch.is_grad_enabled() and x.requires_grad) or norm.weight.requires_grad:
            ordinary: Tensor = plain(x)
            return ordinary
        normed: Tensor = NormRows.apply(x, norm.weight, self.offset, read_epsilon(norm), plain)  # type: ignore[no-untyped-call]
        return normed


def refine_norms(model: nn.Module) -> None:
    """Give the RMS norms of a frozen model the lean backward pass; a norm that is not exactly one stays as it is."""
    for module in model.modules():
        if isinstance(module, LeanNorm) or not type(module).__name__.endswith("RMSNorm"):
            continue
        offset = find_offset(module)
        if offset is not None:
            mix_in(module, LeanNorm)
            module.offset = offset  # type: ignore[assignment]  # modules take more than parameters


def release_norms(model: nn.Module) -> None:
    """Give the norms their own class back."""
    for module in model.modules():
        if isinstance(module, LeanNorm):
            take_out(module)
            del module.offset


def find_offset(norm: nn.Module) -> float | None:
    """Return what a norm adds to its weight to get its gain, found by trying it; None where it is no plain RMS norm."""
    parameters = dict(norm.named_parameters())
    epsilon = read_epsilon(norm)
    if set(parameters) != {"weight"} or any(norm.children()) or epsilon is None:
        return None
    if len(inspect.signature(norm.forward).parameters) != 1 or parameters["weight"].dim() != 1:
        return None
    generator = torch.Generator().manual_seed(0)
    width = len(parameters["weight"])
    x, weight = torch.randn(3, width, generator=generator), torch.randn(width, generator=generator)
    with torch.no_grad():
        found = torch.func.functional_call(norm, {"weight": weight}, (x,))
    normed = x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return next((each for each in (0.0, 1.0) if torch.allclose(found, normed * (weight + each), atol=1e-5)), None)


def read_epsilon(norm: nn.Module) -> float | None:
    """Return what a norm adds to the mean square, under the names that transformers has for it."""
    value = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return value if isinstance(value, float) else None
