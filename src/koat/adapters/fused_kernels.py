"""IA3 on a GPU: an activation function, its vector and both gradients in one pass each, as Triton kernels; and the
gradient of a frozen RMS norm.

A GPU spends its time between two products on reading and writing activations. PyTorch's own kernels would read an
inner activation once to activate and once to rescale it, and five times on the way back. Here the vector rides along
in passes that the frozen model makes anyway: what is left of IA3's price is one pass over keys and values each way.

Numbers are float32 within a kernel, and rounded once. A column's sum over rows is taken in pieces of `ROWS` rows, and
the pieces are summed by PyTorch: the same bits every time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 64
"""Rows of a program."""
STEP = 8
"""Rows of it at a time."""
COLUMNS = 256
"""Columns of a program: a warp reads 512 bytes of bfloat16 in a row."""


@triton.jit
def activate(x, KIND: tl.constexpr):
    """Return an activation function's values."""
    if KIND == "silu":
        return x * tl.sigmoid(x)
    elif KIND == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif KIND == "relu":
        return tl.maximum(x, 0.0)
    else:
        return x


@triton.jit
def differentiate(x, KIND: tl.constexpr):
    """Return an activation function's slopes."""
    if KIND == "silu":
        share = tl.sigmoid(x)
        return share * (1 + x * (1 - share))
    elif KIND == "gelu":
        return 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif KIND == "gelu_tanh":
        share = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        return share + x * share * (1 - share) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    elif KIND == "relu":
        return tl.where(x > 0, 1.0, 0.0)
    else:
        return tl.full(x.shape, 1.0, tl.float32)


@triton.jit(do_not_specialize=("num_rows",))
def rescale_kernel(
    gate, up, vector, out, num_rows, width,
    KIND: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write `activate(gate) * up * vector` for `ROWS` rows of `COLUMNS` columns."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    scale = tl.load(vector + column, mask=column < width, other=0.0).to(tl.float32)
    for start in range(0, ROWS, STEP):
        row = tl.program_id(1) * ROWS + start + tl.arange(0, STEP)
        place = row[:, None].to(tl.int64) * width + column[None, :]
        there = (row < num_rows)[:, None] & (column < width)[None, :]
        value = activate(tl.load(gate + place, mask=there, other=0.0).to(tl.float32), KIND)
        if GATED:
            value *= tl.load(up + place, mask=there, other=0.0).to(tl.float32)
        tl.store(out + place, (value * scale[None, :]).to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=("num_rows",))
def pull_back_kernel(
    gradient, gate, up, vector, for_gate, for_up, sums, num_rows, width,
    KIND: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the gradients of gate and up for `ROWS` rows of `COLUMNS` columns, and this piece of the vector's."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    scale = tl.load(vector + column, mask=column < width, other=0.0).to(tl.float32)
    total = tl.zeros([STEP, COLUMNS], tl.float32)
    for start in range(0, ROWS, STEP):
        row = tl.program_id(1) * ROWS + start + tl.arange(0, STEP)
        place = row[:, None].to(tl.int64) * width + column[None, :]
        there = (row < num_rows)[:, None] & (column < width)[None, :]
        above = tl.load(gradient + place, mask=there, other=0.0).to(tl.float32)
        x = tl.load(gate + place, mask=there, other=0.0).to(tl.float32)
        value = activate(x, KIND)
        scaled = above * scale[None, :]
        if GATED:
            beside = tl.load(up + place, mask=there, other=0.0).to(tl.float32)
            tl.store(for_up + place, (scaled * value).to(for_up.dtype.element_ty), mask=there)
            value *= beside
            scaled *= beside
        total += above * value
        tl.store(for_gate + place, (scaled * differentiate(x, KIND)).to(for_gate.dtype.element_ty), mask=there)
    piece = tl.program_id(1).to(tl.int64) * width
    tl.store(sums + piece + column, tl.sum(total, axis=0), mask=column < width)


@triton.jit
def norm_kernel(x, gradient, weight, out, epsilon, offset, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Write the gradient of one row `x [d]` of an RMS norm: `(u - x (u . x) / l^2) / rms`, `u` the gradient times gain.

    `l^2` is `d rms^2`, as in `koat.adapters.norms.pull_back`.
    """
    column = tl.arange(0, PADDED)
    there = column < WIDTH
    place = tl.program_id(0).to(tl.int64) * WIDTH + column
    number = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    above = tl.load(gradient + place, mask=there, other=0.0).to(tl.float32)
    above *= tl.load(weight + column, mask=there, other=0.0).to(tl.float32) + offset
    length = tl.sum(number * number, axis=0) + WIDTH * epsilon
    inner = tl.sum(above * number, axis=0) / length
    found = (above - number * inner) * tl.rsqrt(length / WIDTH)
    tl.store(out + place, found.to(out.dtype.element_ty), mask=there)


def rescale(gate: Tensor, vector: Tensor, kind: str = "identity", up: Tensor | None = None) -> Tensor:
    """Return `activate(gate) * up * vector` in the type of `gate`.

    `gate`, `up`: `[..., d]`, row after row; `vector`: d numbers in float32.
    """
    out = torch.empty_like(gate)
    width = gate.shape[-1]
    num_rows = gate.numel() // width
    with torch.cuda.device_of(gate):
        rescale_kernel[_cut(num_rows, width)](
            gate, gate if up is None else up, vector, out, num_rows, width, kind, up is not None, ROWS, STEP, COLUMNS
        )
    return out


def pull_back(
    gradient: Tensor, gate: Tensor, vector: Tensor, kind: str = "identity", up: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the gradients of gate and up, and of the vector `[d]` in float32, from that `[..., d]` of the product."""
    width = gate.shape[-1]
    num_rows = gate.numel() // width
    for_gate, for_up = torch.empty_like(gate), None if up is None else torch.empty_like(up)
    grid = _cut(num_rows, width)
    sums = torch.empty(grid[1], width, dtype=torch.float32, device=gate.device)
    with torch.cuda.device_of(gate):
        pull_back_kernel[grid](
            gradient, gate, gate if up is None else up, vector, for_gate, for_gate if for_up is None else for_up, sums,
            num_rows, width, kind, up is not None, ROWS, STEP, COLUMNS,
        )  # fmt: skip
    return for_gate, for_up, sums.sum(0)


def pull_back_norm(gradient: Tensor, x: Tensor, weight: Tensor, offset: float, epsilon: float) -> Tensor:
    """Return the gradient of `x` `[..., d]` from that of an RMS norm with the gain `weight + offset` `[d]`."""
    x, gradient = x.contiguous(), gradient.contiguous()
    out, width = torch.empty_like(x), x.shape[-1]
    padded = triton.next_power_of_2(width)
    with torch.cuda.device_of(x):
        norm_kernel[(x.numel() // width,)](
            x, gradient, weight, out, epsilon, offset, width, padded, num_warps=min(16, max(1, padded // 512))
        )
    return out


class RescaleActivated(torch.autograd.Function):
    """`activate(gate) * up * vector`; keeps `gate` and `up`, which the frozen model keeps too, and no product."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, vector: Tensor, kind: str) -> Tensor:
        """`gate` and `up` are `[..., d]`, `vector` has `d` numbers."""
        gate, up = gate.contiguous(), None if up is None else up.contiguous()
        ctx.save_for_backward(gate, up, vector)
        ctx.kind = kind
        return rescale(gate, vector.flatten(), kind, up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of gate, up and the vector."""
        gate, up, vector = ctx.saved_tensors
        for_gate, for_up, for_vector = pull_back(gradients[0].contiguous(), gate, vector.flatten(), ctx.kind, up)
        return for_gate, for_up, for_vector.to(vector.dtype).view(vector.shape), None


def _cut(num_rows: int, width: int) -> tuple[int, int]:
    """Return how many programs stand side by side and below one another."""
    return triton.cdiv(width, COLUMNS), triton.cdiv(num_rows, ROWS)
