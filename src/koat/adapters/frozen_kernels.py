"""What stays frozen around an adapter, on a GPU: the gradient of an RMS norm and the rotation of queries and keys, as
Triton kernels of one pass.

Numbers are float32 within a kernel, and rounded where the model rounds them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

NUMBERS = 2048
"""Numbers of a program that norms rows, unless one row has more: short rows, those of heads, come by the 100,000."""
TOKENS = 32
"""Tokens of a program that turns one head."""


@triton.jit(do_not_specialize=("num_rows",))
def norm_kernel(
    x, gradient, weight, out, num_rows, epsilon, offset, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr
):
    """Write the gradient of `ROWS` rows `x [d]` of an RMS norm: `(u - x (u . x) / l^2) / rms`, `u` gradient times gain.

    `l^2` is `d rms^2`, as in `koat.adapters.norms.pull_back`.
    """
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, PADDED)
    there = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
    place = row[:, None].to(tl.int64) * WIDTH + column[None, :]
    number = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    above = tl.load(gradient + place, mask=there, other=0.0).to(tl.float32)
    above *= (tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32) + offset)[None, :]
    length = tl.sum(number * number, axis=1) + WIDTH * epsilon
    inner = tl.sum(above * number, axis=1) / length
    found = (above - number * inner[:, None]) * tl.rsqrt(length / WIDTH)[:, None]
    tl.store(out + place, found.to(out.dtype.element_ty), mask=there)


@triton.jit
def round_to(number, out):
    """Return float32 numbers rounded to the type that `out` points to."""
    return number.to(out.dtype.element_ty).to(tl.float32)


@triton.jit(do_not_specialize=("length",))
def turn_kernel(
    heads, cos, sin, out, length, num_heads, row_stride, head_stride, token_stride, angle_stride,
    WIDTH: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr, REST: tl.constexpr, BACK: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """Turn the first `2 HALF` of the `WIDTH` numbers of one head in `TOKENS` tokens of one row; copy the others."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    here, far = (token < length)[:, None], token[:, None].to(tl.int64)
    source = heads + row * row_stride + head * head_stride + far * token_stride
    target = out + ((row * length + far) * num_heads + head) * WIDTH
    half = tl.arange(0, PADDED)[None, :]
    there, angle = here & (half < HALF), row * angle_stride + far * (2 * HALF) + half
    first = tl.load(source + half, mask=there, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + half, mask=there, other=0.0).to(tl.float32)
    upper, lower = tl.load(sin + angle, mask=there, other=0.0), tl.load(sin + angle + HALF, mask=there, other=0.0)
    if BACK:
        crossed, other = second * lower.to(tl.float32), -(first * upper.to(tl.float32))
    else:
        crossed, other = -(second * upper.to(tl.float32)), first * lower.to(tl.float32)
    first *= tl.load(cos + angle, mask=there, other=0.0).to(tl.float32)
    second *= tl.load(cos + angle + HALF, mask=there, other=0.0).to(tl.float32)
    first = round_to(first, out) + round_to(crossed, out)
    second = round_to(second, out) + round_to(other, out)
    tl.store(target + half, first.to(out.dtype.element_ty), mask=there)
    tl.store(target + HALF + half, second.to(out.dtype.element_ty), mask=there)
    if WIDTH > 2 * HALF:
        rest = 2 * HALF + tl.arange(0, REST)[None, :]
        there = here & (rest < WIDTH)
        tl.store(target + rest, tl.load(source + rest, mask=there), mask=there)


def pull_back_norm(gradient: Tensor, x: Tensor, weight: Tensor, offset: float, epsilon: float) -> Tensor:
    """Return the gradient of `x` `[..., d]` from that of an RMS norm with the gain `weight + offset` `[d]`."""
    x, gradient = x.contiguous(), gradient.contiguous()
    out, width = torch.empty_like(x), x.shape[-1]
    padded, num_rows = triton.next_power_of_2(width), x.numel() // width
    rows = max(1, NUMBERS // padded)
    with torch.cuda.device_of(x):
        norm_kernel[(triton.cdiv(num_rows, rows),)](
            x, gradient, weight, out, num_rows, epsilon, offset, width, padded, rows,
            num_warps=count_warps(padded * rows),
        )  # fmt: skip
    return out


def count_warps(padded: int) -> int:
    """Return the warps that share `padded` numbers."""
    return min(16, max(1, padded // 512))


def turn(heads: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    """Turn heads `[B, H, T, d]` by `cos` and `sin` `[1 or B, T, n]`, as `koat.adapters.rotary.turn` does."""
    heads = heads if heads.stride(-1) == 1 else heads.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    (num_rows, num_heads, length, width), turned = heads.shape, cos.shape[-1]
    out = torch.empty(num_rows, length, num_heads, width, dtype=heads.dtype, device=heads.device)
    row_stride, head_stride, token_stride, _ = heads.stride()
    angle_stride = cos.stride(0) if len(cos) > 1 else 0
    with torch.cuda.device_of(heads):
        turn_kernel[triton.cdiv(length, TOKENS), num_heads, num_rows](
            heads, cos, sin, out, length, num_heads, row_stride, head_stride, token_stride, angle_stride,
            width, turned // 2, triton.next_power_of_2(turned // 2), triton.next_power_of_2(max(1, width - turned)),
            back, TOKENS,
        )  # fmt: skip
    return out.transpose(1, 2)
