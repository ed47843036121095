"""Attention over a forest on a GPU, as Triton kernels: flash attention that skips every block nobody may see.

Dao 2023, "FlashAttention-2", algorithms 1 and 2, with the forest's rule for a mask: query `q` sees key `k` when
`k <= q < subtree_end[k]`. What blocks of queries and keys have to do with one another is listed beforehand
(`koat.forest.tree`), once for all layers. The kernels are compiled once for a type and a width of heads, whatever
the lengths of rows.

Numbers are float32 but for the operands of products, which have the type of the input. Nothing is added atomically:
the same bits every time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

LENGTHS = ("num_queries", "num_keys", "most", "window")
"""What differs from row to row: a kernel is not compiled anew for one that 16 divides."""
LOG2_E = 1.4426950408889634
LOWEST = tl.constexpr(-1e30)
"""Below every score, and finite: the difference of two of them is no NaN."""


class Shape(NamedTuple):
    """How a kernel is cut: queries and keys of a block, warps, and loads that are under way at once."""

    num_queries: int
    num_keys: int
    num_warps: int
    num_stages: int


@triton.jit
def take(base, token, step, width, mask):
    """Return the numbers `[T, D]` of some tokens of one head, zero where the mask says no."""
    return tl.load(base + token[:, None].to(tl.int64) * step + width[None, :], mask=mask, other=0.0)


@triton.jit
def find_visible(end, position, num_keys, query, key, window, WINDOWED: tl.constexpr):
    """Return which of some keys `[N]` some queries `[M]` see, `[M, N]`; `end` and `position` are one row's."""
    there = key < num_keys
    until = tl.load(end + key, mask=there, other=0)
    visible = (key[None, :] <= query[:, None]) & (query[:, None] < until[None, :])
    if WINDOWED:
        asked = tl.load(position + query, mask=query < num_keys, other=0)
        seen = tl.load(position + key, mask=there, other=0)
        visible &= asked[:, None] - seen[None, :] < window
    return visible


@triton.jit(do_not_specialize=LENGTHS)
def attend_kernel(
    query, key, value, output, log_sum, end, position, counts, blocks,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token,
    num_heads, group, num_queries, num_keys, most, window, scale,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Answer a block of queries of one head: output `[R, L, H, D]` and log-sum `[R, H, L]` (base 2)."""
    block, row, head = tl.program_id(0), tl.program_id(2).to(tl.int64), tl.program_id(1)
    width, asked = tl.arange(0, PADDED), block * M + tl.arange(0, M)
    wide, asking = (width < WIDTH)[None, :], (asked < num_queries)[:, None]
    line, offset = row * tl.num_programs(0) + block, num_keys - num_queries
    q = take(query + row * q_row + head * q_head, asked, q_token, width, asking & wide)
    key += row * k_row + head // group * k_head
    value += row * v_row + head // group * v_head
    highest, total = tl.full([M], LOWEST, tl.float32), tl.zeros([M], tl.float32)
    answer = tl.zeros([M, PADDED], tl.float32)
    for number in range(0, tl.load(counts + line)):
        seen = tl.load(blocks + line * most + number) * N + tl.arange(0, N)
        there = (seen < num_keys)[:, None] & wide
        k, v = take(key, seen, k_token, width, there), take(value, seen, v_token, width, there)
        visible = find_visible(
            end + row * num_keys, position + row * num_keys, num_keys, asked + offset, seen, window, WINDOWED
        )
        score = tl.where(visible, tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale, LOWEST)
        higher = tl.maximum(highest, tl.max(score, 1))
        weight = tl.where(visible, tl.exp2(score - higher[:, None]), 0.0)
        fade = tl.exp2(highest - higher)
        total = total * fade + tl.sum(weight, 1)
        answer = answer * fade[:, None] + tl.dot(weight.to(v.dtype), v, input_precision=PRECISION)
        highest = higher
    total = tl.where(total > 0, total, 1.0)
    place = ((row * num_queries + asked[:, None]) * num_heads + head) * WIDTH + width[None, :]
    tl.store(output + place, (answer / total[:, None]).to(output.dtype.element_ty), mask=asking & wide)
    log_sum += (row * num_heads + head) * num_queries
    tl.store(log_sum + asked, highest + tl.log2(total), mask=asked < num_queries)


@triton.jit(do_not_specialize=LENGTHS)
def pull_back_queries_kernel(
    query, key, value, gradient, log_sum, delta, output, for_query, end, position, counts, blocks,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token,
    num_heads, group, num_queries, num_keys, most, window, scale, factor,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradient of a block of queries of one head, `[R, H, L, D]`, and its products with the output.

    Their sums `delta [R, H, L]` are what the kernel of the keys reads.
    """
    block, row, head = tl.program_id(0), tl.program_id(2).to(tl.int64), tl.program_id(1)
    width, asked = tl.arange(0, PADDED), block * M + tl.arange(0, M)
    wide, asking = (width < WIDTH)[None, :], asked < num_queries
    line, place = row * tl.num_programs(0) + block, (row * num_heads + head) * num_queries + asked
    q = take(query + row * q_row + head * q_head, asked, q_token, width, asking[:, None] & wide)
    start, step = (row * num_queries * num_heads + head) * WIDTH, num_heads * WIDTH
    above = take(gradient + start, asked, step, width, asking[:, None] & wide)
    answer = take(output + start, asked, step, width, asking[:, None] & wide)
    sums, mean = tl.load(log_sum + place, mask=asking, other=0.0), tl.sum(above.to(tl.float32) * answer, 1)
    tl.store(delta + place, mean, mask=asking)
    key += row * k_row + head // group * k_head
    value += row * v_row + head // group * v_head
    found, offset = tl.zeros([M, PADDED], tl.float32), num_keys - num_queries
    for number in range(0, tl.load(counts + line)):
        seen = tl.load(blocks + line * most + number) * N + tl.arange(0, N)
        there = (seen < num_keys)[:, None] & wide
        k, v = take(key, seen, k_token, width, there), take(value, seen, v_token, width, there)
        visible = find_visible(
            end + row * num_keys, position + row * num_keys, num_keys, asked + offset, seen, window, WINDOWED
        )
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        weight = tl.where(visible, tl.exp2(score - sums[:, None]), 0.0)
        slope = weight * (tl.dot(above, tl.trans(v), input_precision=PRECISION) - mean[:, None])
        found += tl.dot(slope.to(k.dtype), k, input_precision=PRECISION)
    tl.store(
        for_query + place[:, None] * WIDTH + width[None, :], (found * factor).to(for_query.dtype.element_ty),
        mask=asking[:, None] & wide,
    )  # fmt: skip


@triton.jit(do_not_specialize=LENGTHS)
def pull_back_keys_kernel(
    query, key, value, gradient, log_sum, delta, for_key, for_value, end, position, counts, blocks,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token,
    num_heads, group, num_queries, num_keys, most, window, scale, factor,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a block of keys and values, `[R, G, L, D]`, from all heads that share them."""
    block, row, shared = tl.program_id(0), tl.program_id(2).to(tl.int64), tl.program_id(1)
    width, seen = tl.arange(0, PADDED), block * N + tl.arange(0, N)
    wide, line = (width < WIDTH)[None, :], row * tl.num_programs(0) + block
    there = (seen < num_keys)[:, None] & wide
    k = take(key + row * k_row + shared * k_head, seen, k_token, width, there)
    v = take(value + row * v_row + shared * v_head, seen, v_token, width, there)
    found_key, found_value = tl.zeros([N, PADDED], tl.float32), tl.zeros([N, PADDED], tl.float32)
    num_blocks, offset = tl.load(counts + line), num_keys - num_queries
    for turn in range(0, num_blocks * group):
        head = shared * group + turn // num_blocks
        asked = tl.load(blocks + line * most + turn % num_blocks) * M + tl.arange(0, M)
        asking, place = asked < num_queries, (row * num_heads + head) * num_queries + asked
        q = take(query + row * q_row + head * q_head, asked, q_token, width, asking[:, None] & wide)
        start = gradient + (row * num_queries * num_heads + head) * WIDTH
        above = take(start, asked, num_heads * WIDTH, width, asking[:, None] & wide)
        sums, mean = tl.load(log_sum + place, mask=asking, other=0.0), tl.load(delta + place, mask=asking, other=0.0)
        visible = asking[:, None] & find_visible(
            end + row * num_keys, position + row * num_keys, num_keys, asked + offset, seen, window, WINDOWED
        )
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        weight = tl.where(visible, tl.exp2(score - sums[:, None]), 0.0)
        found_value += tl.dot(tl.trans(weight).to(above.dtype), above, input_precision=PRECISION)
        slope = weight * (tl.dot(above, tl.trans(v), input_precision=PRECISION) - mean[:, None])
        found_key += tl.dot(tl.trans(slope).to(q.dtype), q, input_precision=PRECISION)
    place = ((row * tl.num_programs(1) + shared) * num_keys + seen[:, None]) * WIDTH + width[None, :]
    tl.store(for_key + place, (found_key * factor).to(for_key.dtype.element_ty), mask=there)
    tl.store(for_value + place, found_value.to(for_value.dtype.element_ty), mask=there)


def pick_shape(width: int, dtype: torch.dtype) -> Shape:
    """Return how kernels are cut for heads of a width.

    A block keeps to the 99 KB of shared memory that a processor of a 24 GB card has (compute capability 8.6, 8.9), and
    next to nothing spills from its registers: read off what Triton 3.6 compiles for them. Raises NotImplementedError
    for wider heads and other types.
    """
    if width > 256 or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise NotImplementedError(f"tree attention knows no heads of {width} numbers in {dtype}")
    if dtype == torch.float32:
        return Shape(32, 32, 8, 1) if width <= 128 else Shape(16, 16, 8, 1)
    if width <= 128:
        return Shape(64, 64, 4 if width <= 64 else 8, 2)
    return Shape(32, 32, 4, 1)


class TreeAttention(torch.autograd.Function):
    """Attention of `query [R, H, L, D]` to `key`, `value` `[R, G, K, D]` (H a multiple of G), as `[R, L, H, D]`.

    The last L of the K tokens ask; the others' keys and values come from a cache.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, tree: Any, window: int | None, scaling: float
    ) -> Tensor:
        """`tree` is a `koat.forest.tree.Tree`. Raises NotImplementedError for values as wide as no query."""
        if value.shape[-1] != query.shape[-1]:
            raise NotImplementedError(
                f"tree attention knows no values of {value.shape[-1]} for {query.shape[-1]} numbers"
            )
        query, key, value = (heads if heads.stride(-1) == 1 else heads.contiguous() for heads in (query, key, value))
        num_rows, num_heads, length, width = query.shape
        shape = pick_shape(width, query.dtype)
        blocks = tree.list_blocks(window, shape.num_queries, shape.num_keys)
        output = query.new_empty(num_rows, length, num_heads, width)
        log_sum = query.new_empty(num_rows, num_heads, length, dtype=torch.float32)
        with torch.cuda.device_of(query):
            attend_kernel[blocks.keys.shape[1], num_heads, num_rows](
                query, key, value, output, log_sum, tree.subtree_end, tree.position, blocks.num_keys, blocks.keys,
                *_describe(query, key, value, blocks.keys, window, scaling),
                **_specialise(query, shape, window),
            )  # fmt: skip
        ctx.save_for_backward(query, key, value, output, log_sum)
        ctx.tree, ctx.window, ctx.scaling = tree, window, scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of queries, keys and values."""
        query, key, value, output, log_sum = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        delta = torch.empty_like(log_sum)
        for_query, for_key, for_value = (torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
                                         for heads in (query, key, value))  # fmt: skip
        shape = pick_shape(query.shape[-1], query.dtype)
        blocks = ctx.tree.list_blocks(ctx.window, shape.num_queries, shape.num_keys)
        marks = ctx.tree.subtree_end, ctx.tree.position
        # Queries first: their kernel writes the delta that the keys' reads.
        given, options = (query, key, value, gradient, log_sum, delta), _specialise(query, shape, ctx.window)
        with torch.cuda.device_of(query):
            pull_back_queries_kernel[blocks.keys.shape[1], query.shape[1], len(query)](
                *given, output, for_query, *marks, blocks.num_keys, blocks.keys,
                *_describe(query, key, value, blocks.keys, ctx.window, ctx.scaling), ctx.scaling, **options,
            )  # fmt: skip
            pull_back_keys_kernel[blocks.queries.shape[1], key.shape[1], len(query)](
                *given, for_key, for_value, *marks, blocks.num_queries, blocks.queries,
                *_describe(query, key, value, blocks.queries, ctx.window, ctx.scaling), ctx.scaling, **options,
            )  # fmt: skip
        return for_query, for_key, for_value, None, None, None


def _describe(
    query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, window: int | None, scaling: float
) -> tuple[int | float, ...]:
    """Return strides, counts, window and scale in the order that the kernels take."""
    strides = (stride for heads in (query, key, value) for stride in heads.stride()[:3])
    counts = (query.shape[1], query.shape[1] // key.shape[1], query.shape[2], key.shape[2], blocks.shape[2])
    return (*strides, *counts, window or 0, scaling * LOG2_E)


def _specialise(query: Tensor, shape: Shape, window: int | None) -> dict[str, Any]:
    """Return what a kernel is compiled for."""
    width = query.shape[-1]
    return {
        "WIDTH": width,
        "PADDED": max(16, triton.next_power_of_2(width)),
        "M": shape.num_queries,
        "N": shape.num_keys,
        "WINDOWED": window is not None,
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
        "num_warps": shape.num_warps,
        "num_stages": shape.num_stages,
    }
