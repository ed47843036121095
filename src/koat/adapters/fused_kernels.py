"""IA3 on a GPU: an activation function, its vector and both gradients in one pass each, as Triton kernels.

A GPU spends its time between two products on reading and writing activations. PyTorch's own kernels would pass over an
inner activation twice on the way out and five times on the way back. Here the vector rides along in the one pass each
way that the frozen model makes anyway: what is left of IA3's price is one over keys and values each way.

Numbers are float32 within a kernel, and rounded once. A column's sum over rows is taken in pieces of `ROWS` rows, and
the pieces are added up by a second kernel: the same bits every time. Between short products a GPU waits for the
processor to launch its kernels, so there are as few as can be: one on the way out, two on the way back.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 64
"""Rows of a program."""
STEP = 8
"""Rows of it at a time."""
COLUMNS = 256
"""Columns of a program: a warp reads 512 bytes of bfloat16 in a row."""
PIECES = 32
"""Sums that are added up at a time."""
TINY = tl.constexpr(2.0**-60)
"""What `koat.adapters.lean` adds to a vector that is divided by again."""


@triton.jit
def integrate_bell(x):
    """Return the standard normal distribution up to `x`, from the exponential that its density has as well.

    Abramowitz and Stegun, 7.1.26. Of an activation's numbers and slopes 1e-7 is lost, which is rounding.
    """
    t = 1 / (1 + 0.23164188829 * tl.abs(x))
    series = 0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
    tail = 0.5 * t * series * tl.exp(-0.5 * x * x)
    return tl.where(x < 0, tail, 1 - tail)


@triton.jit
def activate(x, KIND: tl.constexpr):
    """Return an activation function's values."""
    if KIND == "silu":
        return x * tl.sigmoid(x)
    elif KIND == "gelu":
        return x * integrate_bell(x)
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
        return integrate_bell(x) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif KIND == "gelu_tanh":
        share = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        return share + x * share * (1 - share) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    elif KIND == "relu":
        return tl.where(x > 0, 1.0, 0.0)
    else:
        return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def read_scale(vector, held, column, width, HELD: tl.constexpr, DIVIDES: tl.constexpr):
    """Return what some columns are multiplied by: one where held, and no zero where it must be divided by again."""
    scale = tl.load(vector + column, mask=column < width, other=1.0).to(tl.float32)
    if DIVIDES:
        scale += TINY
    if HELD:
        scale = tl.where(tl.load(held + column, mask=column < width, other=0) != 0, 1.0, scale)
    return scale


@triton.jit(do_not_specialize=("num_rows",))
def rescale_kernel(
    gate, up, vector, held, out, num_rows, width,
    KIND: tl.constexpr, GATED: tl.constexpr, HELD: tl.constexpr, DIVIDES: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write `activate(gate) * up * scale` for `ROWS` rows of `COLUMNS` columns."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    scale = read_scale(vector, held, column, width, HELD, DIVIDES)
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
    gradient, gate, up, vector, held, for_gate, for_up, sums, num_rows, width,
    KIND: tl.constexpr, GATED: tl.constexpr, HELD: tl.constexpr, DIVIDES: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the gradients of gate and up for `ROWS` rows of `COLUMNS` columns, and this piece of the vector's sums."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    scale = read_scale(vector, held, column, width, HELD, DIVIDES)
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


@triton.jit(do_not_specialize=("num_pieces",))
def add_up_kernel(
    sums, vector, held, out, num_pieces, width,
    HELD: tl.constexpr, DIVIDES: tl.constexpr, PIECES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the vector's gradient: the pieces' sum, over the scale where products were summed, zero where held."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([PIECES, COLUMNS], tl.float32)
    for start in range(0, num_pieces, PIECES):
        piece = start + tl.arange(0, PIECES)
        there = (piece < num_pieces)[:, None] & (column < width)[None, :]
        total += tl.load(sums + piece[:, None].to(tl.int64) * width + column[None, :], mask=there, other=0.0)
    found = tl.sum(total, axis=0)
    if DIVIDES:
        found = found / read_scale(vector, held, column, width, HELD, DIVIDES)
    if HELD:
        found = tl.where(tl.load(held + column, mask=column < width, other=0) != 0, 0.0, found)
    tl.store(out + column, found.to(out.dtype.element_ty), mask=column < width)


def rescale(
    gate: Tensor,
    vector: Tensor,
    kind: str = "identity",
    up: Tensor | None = None,
    held: Tensor | None = None,
    divides: bool = False,
) -> Tensor:
    """Return `activate(gate) * up * vector` in the type of `gate`.

    `gate`, `up`: `[..., d]`, row after row; `vector`: d numbers. Those that `held` `[d]` marks count as one; with
    `divides` a zero counts as `TINY`.
    """
    out, (num_rows, width), grid = torch.empty_like(gate), *_cut(gate)
    with torch.cuda.device_of(gate):
        rescale_kernel[grid](
            gate, gate if up is None else up, vector, vector if held is None else held, out, num_rows, width,
            kind, up is not None, held is not None, divides, ROWS, STEP, COLUMNS,
        )  # fmt: skip
    return out


def pull_back(
    gradient: Tensor,
    gate: Tensor,
    vector: Tensor,
    kind: str = "identity",
    up: Tensor | None = None,
    held: Tensor | None = None,
    divides: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the gradients of gate, up and the vector, from that `[..., d]` of the product.

    With `divides` the product itself is given as `gate`.
    """
    for_gate, for_up = torch.empty_like(gate), None if up is None else torch.empty_like(up)
    (num_rows, width), grid = _cut(gate)
    sums, for_vector = torch.empty(grid[1], width, dtype=torch.float32, device=gate.device), torch.empty_like(vector)
    marks, forms = vector if held is None else held, (held is not None, divides)
    with torch.cuda.device_of(gate):
        pull_back_kernel[grid](
            gradient, gate, gate if up is None else up, vector, marks, for_gate, for_gate if for_up is None else for_up,
            sums, num_rows, width, kind, up is not None, *forms, ROWS, STEP, COLUMNS,
        )  # fmt: skip
        add_up_kernel[grid[:1]](sums, vector, marks, for_vector, grid[1], width, *forms, PIECES, COLUMNS)
    return for_gate, for_up, for_vector


class RescaleActivated(torch.autograd.Function):
    """`activate(gate) * up * vector`; keeps `gate` and `up`, which the frozen model keeps too, and no product."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, vector: Tensor, kind: str) -> Tensor:
        """`gate` and `up` are `[..., d]`, `vector` has `d` numbers in any shape."""
        gate, up = gate.contiguous(), None if up is None else up.contiguous()
        is_plain = kind == "identity" and up is None and not vector.requires_grad
        ctx.save_for_backward(None if is_plain else gate, up, vector)
        ctx.kind = kind
        return rescale(gate, vector, kind, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of gate, up and the vector."""
        gate, up, vector = ctx.saved_tensors
        if gate is None:
            return rescale(gradients[0].contiguous(), vector), None, None, None
        return *pull_back(gradients[0].contiguous(), gate, vector, ctx.kind, up), None


class RescaleOutput(torch.autograd.Function):
    """`activation * vector`; keeps the product and gets the activation back by division."""

    @staticmethod
    def forward(ctx: Any, activation: Tensor, vector: Tensor, held: Tensor | None) -> Tensor:
        """`activation` is `[..., d]`, `vector` has `d` numbers in any shape; those that `held` marks count as one."""
        product = rescale(activation.contiguous(), vector, held=held, divides=True)
        ctx.save_for_backward(product if vector.requires_grad else None, vector)
        ctx.held = held
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the activation and of the vector."""
        product, vector = ctx.saved_tensors
        if product is None:
            return rescale(gradients[0].contiguous(), vector, held=ctx.held, divides=True), None, None
        found, _, for_vector = pull_back(gradients[0].contiguous(), product, vector, held=ctx.held, divides=True)
        return found, for_vector, None


def _cut(gate: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return an activation's rows and columns, and how many programs stand side by side and below one another."""
    width = gate.shape[-1]
    num_rows = gate.numel() // width
    return (num_rows, width), (triton.cdiv(width, COLUMNS), triton.cdiv(num_rows, ROWS))
