"""Rows times a vector and back: short activations, a float32 vector, one rounding.

On a CPU the fast kernels for that are those of batch normalisation, with mean 0 and variance 1.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def multiply(activation: Tensor, vector: Tensor, out: Tensor | None = None) -> Tensor:
    """Multiply by a float32 vector and round once, into the activation's type; into `out` where given.

    Rounding the vector first would move it: near one, bfloat16 knows steps of 1/128 only. On a CPU the one fast
    kernel that takes a short activation and a float32 vector is that of batch normalisation; with mean 0 and
    variance 1 it is this product, bit for bit, at a third of `torch.mul`'s time.
    """
    if not is_normalised_fast(activation):
        return torch.mul(activation, vector, out=make_room(activation) if out is None else out)
    width = len(vector)
    mean, variance, none = _make_neutral(width)
    rows, weight = activation.reshape(-1, width), vector.float()
    if out is None:
        product = torch.native_batch_norm(rows, weight, None, mean, variance, False, 0.0, 0.0)[0]
        return product.view(activation.shape)
    torch.native_batch_norm(rows, weight, None, mean, variance, False, 0.0, 0.0, out=(out.view(-1, width), none, none))
    return out


def is_normalised_fast(activation: Tensor) -> bool:
    """Whether batch normalisation's kernels are the fast ones for an activation."""
    return activation.dtype == torch.bfloat16 and activation.device.type == "cpu"


@functools.cache
@torch.inference_mode(False)
def _make_neutral(width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean 0, the variance 1 and the place for statistics of a normalisation that changes nothing."""
    return torch.zeros(width, device="cpu"), torch.ones(width, device="cpu"), torch.empty(0, device="cpu")


def sum_products(gradient: Tensor, activation: Tensor, vector: Tensor) -> Tensor:
    """Return the gradient `[d]` of a vector that multiplied `activation` `[n, d]`, from that of the product.

    On a CPU it is the weight's in the backward pass of that normalisation, which keeps no products and adds those of
    bfloat16 up in float32.
    """
    if is_summed_fast(activation):
        return _pull_back_fast(gradient, activation, vector, False)[1]
    wide = torch.promote_types(activation.dtype, torch.float32)
    if activation.is_meta:
        return gradient.sum(0, dtype=wide)  # of the right shape, and no products either
    return (gradient * activation).sum(0, dtype=wide)


def pull_back_product(gradient: Tensor, activation: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `activation` `[n, d]` and of the vector that multiplied it, on a CPU in one pass."""
    if is_summed_fast(activation):
        return _pull_back_fast(gradient, activation, vector, True)
    return multiply(gradient, vector), sum_products(gradient, activation, vector)


def is_summed_fast(activation: Tensor) -> bool:
    """Whether the backward pass of a normalisation is the fast way to a vector's gradient; no rows would end it."""
    on_cpu, short = activation.device.type == "cpu", activation.dtype in (torch.bfloat16, torch.float32)
    return on_cpu and short and len(activation) > 0


def _pull_back_fast(gradient: Tensor, activation: Tensor, vector: Tensor, both: bool) -> tuple[Tensor, Tensor]:
    mean, variance, none = _make_neutral(len(vector))
    for_activation, for_vector, _ = torch.ops.aten.native_batch_norm_backward.default(
        gradient, activation, vector.float(), mean, variance, none, none, False, 0.0, [both, True, False]
    )
    return for_activation, for_vector


def to_rows(activation: Tensor) -> Tensor:
    """Return an activation `[..., d]` as rows `[n, d]`, one after the other in memory."""
    return activation.reshape(-1, activation.shape[-1]).contiguous()


def make_room(activation: Tensor) -> Tensor:
    """Return memory for numbers of an activation's shape and type, row after row."""
    return torch.empty_like(activation, memory_format=torch.contiguous_format)
