"""RMS norms of a frozen model: the model's own values, and a backward pass that keeps the input as it came.

transformers computes them in float32, so autograd keeps a float32 copy of every input, and its backward pass of a
mean over the last dimension makes tensors whose rows are columns, which every product after it pays for on a CPU.
With the gain frozen the gradient is one formula, and on a GPU one kernel (`koat.adapters.fused`). On a CPU most norms
have their bfloat16 values in fewer passes as well, to the very bits. Zhang and Sennrich 2019, "Root Mean Square Layer
Normalization".
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from koat.adapters.fused import find_frozen
from koat.adapters.refine import mix_in, take_out
from koat.adapters.vector_products import is_normalised_fast, multiply, to_rows

PIECE = 1 << 19
"""Numbers that a CPU works on at a time, so that their float32 copies stay small; fewer cost more in calls."""


class NormRows(torch.autograd.Function):
    """`x / rms(x) * gain`, with the norm's own values; keeps `x`, in its own type, and a number for each row."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, offset: float, epsilon: float, compute: Callable[[Tensor], Tensor] | None
    ) -> Tensor:
        """`x` is `[..., d]`, the gain `weight + offset` `[d]`; without `compute` values are those of `norm_rows`."""
        ctx.offset, ctx.epsilon, ctx.frozen, means = offset, epsilon, find_frozen(x), None
        if compute is None:
            normed, means = norm_rows(x, weight, epsilon)
        else:
            normed = compute_in_pieces(compute, x)
        ctx.save_for_backward(x, weight, means)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of `x`."""
        x, weight, means = ctx.saved_tensors
        if ctx.frozen is not None:
            return ctx.frozen.pull_back_norm(gradients[0], x, weight, ctx.offset, ctx.epsilon), None, None, None, None
        rows, upstream = to_rows(x), to_rows(gradients[0])
        if means is not None:
            result = pull_back(rows, upstream, weight, means, ctx.epsilon)
        else:
            result = pull_back_wide(rows, upstream, weight, ctx.offset, ctx.epsilon)
        return result.view(x.shape), None, None, None, None


def norm_rows(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return `x [..., d] / rms(x)`, rounded to its type, times `weight [d]`, and the mean squares `[n]`.

    The rows are channels of a normalisation with mean 0, PyTorch's one kernel that divides each by a root of its own.
    """
    rows = to_rows(x)
    means = average_squares(rows)
    scaled = torch.native_batch_norm(rows[None], None, None, torch.zeros_like(means), means, False, 0.0, epsilon)[0]
    return scaled.view(x.shape).mul_(weight), means


def average_squares(rows: Tensor) -> Tensor:
    """Return the mean square of each row `[n, d]` in float32 at least, computed as transformers does."""
    num_rows, wide = count_rows(rows), torch.promote_types(rows.dtype, torch.float32)
    if len(rows) <= num_rows:
        return rows.to(wide).square().mean(-1)
    return torch.cat([piece.to(wide).square().mean(-1) for piece in torch.split(rows, num_rows)])


def compute_in_pieces(compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return a norm of `x` `[..., d]`, which takes each row for itself, a piece of the rows at a time."""
    num_rows, width = count_rows(x), x.shape[-1]
    if x.numel() <= num_rows * width:
        return compute(x)
    return torch.cat([compute(piece) for piece in torch.split(x.reshape(-1, width), num_rows)]).view(x.shape)


def count_rows(x: Tensor) -> int:
    """Return how many rows of `x` `[..., d]` are worked on at a time: all, unless on a CPU with its caches."""
    width = x.shape[-1]
    return max(1, PIECE // width if x.device.type == "cpu" else x.numel() // width)


def pull_back(rows: Tensor, gradient: Tensor, gain: Tensor, means: Tensor, epsilon: float) -> Tensor:
    """Return the gradient of `rows` `[n, d]` with the mean squares `means [n]`, from that of the norm's value.

    With `u = gradient * gain` it is `(u - x (u . x) / l^2) / rms` with `l = sqrt(d) rms`. With `l` in place of a row's
    length that is the gradient of weight normalisation (Salimans and Kingma 2016, equation 3), for which PyTorch has
    one kernel. It takes the factor `sqrt(d)` in the rows' type: what that lacks goes into the gain.
    """
    width = rows.shape[-1]
    factor, rest = split_root(width, rows.dtype)
    upstream = multiply(gradient, gain.to(means.dtype) * rest)
    lengths = torch.add(width * epsilon, means, alpha=width).sqrt_()
    factors = rows.new_full((len(rows), 1), factor)
    result: Tensor = torch.ops.aten._weight_norm_interface_backward(upstream, rows, factors, lengths[:, None], 0)[0]
    return result


def pull_back_wide(rows: Tensor, gradient: Tensor, weight: Tensor, offset: float, epsilon: float) -> Tensor:
    """Return the gradient of `rows` `[n, d]`, computed in float32 at least, a piece of them at a time."""
    wide, num_rows = torch.promote_types(rows.dtype, torch.float32), count_rows(rows)
    gain, parts = weight.to(wide) + offset, []
    for part, above in zip(*(torch.split(each, num_rows) for each in (rows, gradient)), strict=True):
        piece = part.to(wide)
        parts.append(pull_back(piece, above.to(wide), gain, average_squares(piece), epsilon).to(rows.dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@functools.cache
def split_root(width: int, dtype: torch.dtype) -> tuple[float, float]:
    """Return two factors of a width's root, the first of them exact in a type."""
    root = width**0.5
    factor = float(torch.tensor(root, dtype=dtype, device="cpu"))
    return factor, root / factor


class LeanNorm(nn.Module):
    """Mixed into the class of an RMS norm whose gain is `weight + offset`."""

    offset: float
    epsilon: float
    rounds_first: bool
    """Whether it computes what `norm_rows` does."""

    def forward(self, x: Tensor) -> Tensor:
        """Norm `x` `[..., d]`; where the gain is trained, or there are no rows, as the model's own class does."""
        norm: Any = self
        plain, weight = super().forward, norm.weight
        if weight.requires_grad or not x.numel():
            ordinary: Tensor = plain(x)
            return ordinary
        served = self.rounds_first and is_normalised_fast(x) and weight.dtype == x.dtype
        if not (torch.is_grad_enabled() and x.requires_grad):
            return norm_rows(x, weight, self.epsilon)[0] if served else compute_in_pieces(plain, x)
        compute = None if served else plain
        normed: Tensor = NormRows.apply(x, weight, self.offset, self.epsilon, compute)  # type: ignore[no-untyped-call]
        return normed


def refine_norms(model: nn.Module) -> None:
    """Give the RMS norms of a frozen model the lean backward pass; a norm that is not exactly one stays as it is."""
    for module in model.modules():
        if isinstance(module, LeanNorm) or not type(module).__name__.endswith("RMSNorm"):
            continue
        offset = find_offset(module)
        if offset is not None:
            lean: Any = module
            lean.offset, lean.epsilon, lean.rounds_first = offset, read_epsilon(module), find_rounding(module)
            mix_in(module, LeanNorm)


def release_norms(model: nn.Module) -> None:
    """Give the norms their own class back."""
    for module in model.modules():
        if isinstance(module, LeanNorm):
            take_out(module)
            del module.offset, module.epsilon, module.rounds_first


def find_offset(norm: nn.Module) -> float | None:
    """Return what a norm adds to its weight to get its gain, found by trying it; None where it is no plain RMS norm."""
    parameters = dict(norm.named_parameters())
    epsilon = read_epsilon(norm)
    if set(parameters) != {"weight"} or any(norm.children()) or epsilon is None:
        return None
    if len(inspect.signature(norm.forward).parameters) != 1 or parameters["weight"].dim() != 1:
        return None
    x, weight, found = try_norm(norm, torch.float32)
    normed = x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return next((each for each in (0.0, 1.0) if torch.allclose(found, normed * (weight + each), atol=1e-5)), None)


def find_rounding(norm: nn.Module) -> bool:
    """Return whether a plain RMS norm's values are those of `norm_rows`, to the bit, found by trying it."""
    epsilon: Any = read_epsilon(norm)
    x, weight, found = try_norm(norm, torch.bfloat16)
    return torch.equal(norm_rows(x, weight, epsilon)[0], found)


@torch.no_grad()
def try_norm(norm: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return random rows `[3, d]`, a random weight `[d]` and what a norm makes of them."""
    (weight,) = norm.parameters()
    generator = torch.Generator().manual_seed(0)
    x, drawn = (torch.randn(*shape, len(weight), generator=generator).to(dtype) for shape in ((3,), ()))
    return x, drawn, torch.func.functional_call(norm, {"weight": drawn}, (x,))


def read_epsilon(norm: nn.Module) -> float | None:
    """Return what a norm adds to the mean square, under the names that transformers has for it."""
    value = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return value if isinstance(value, float) else None
