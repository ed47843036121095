"""Compile koat's Triton kernels for a GPU that need not be here; print each one's name and bytes of shared memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from koat.adapters import frozen_kernels, fused_kernels
from koat.forest import tree_kernels

NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
FLOATS = {"vector", "sums", "log_sum", "delta"}
INTEGERS = {"end": "i32", "position": "i32", "counts": "i32", "blocks": "i32", "held": "i1"}
SCALARS = {"scale", "factor", "epsilon", "offset"}


def describe(kernel: Any, dtype: torch.dtype, constants: dict[str, Any]) -> ASTSource:
    """Return a kernel with the types of its arguments; pointers and strides are multiples of 16, as in models."""
    signature, attributes, fixed = {}, {}, {}
    for number, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], fixed[name] = "constexpr", constants[name]
        elif name in SCALARS:
            signature[name] = "fp32"
        elif name.startswith("num_") or name in {"group", "length", "most", "window", "width"}:
            signature[name] = "i32"
        else:
            strides = name.endswith(("_row", "_head", "_token", "_stride"))
            kind = "fp32" if name in FLOATS else INTEGERS.get(name, NAMES[dtype])
            signature[name] = "i32" if strides else f"*{kind}"
            attributes[(number,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, fixed, attributes)


def list_sources() -> Iterator[tuple[str, ASTSource, dict[str, int]]]:
    """Yield every kernel in the forms that models call."""
    cut = {
        "PIECES": fused_kernels.PIECES,
        "ROWS": fused_kernels.ROWS,
        "STEP": fused_kernels.STEP,
        "COLUMNS": fused_kernels.COLUMNS,
    }
    for kind, gated in (("silu", True), ("gelu", False), ("gelu_tanh", True), ("relu", False), ("identity", False)):
        for kernel in (fused_kernels.rescale_kernel, fused_kernels.pull_back_kernel):
            held = kind == "identity"
            constants = {"KIND": kind, "GATED": gated, "HELD": held, "DIVIDES": held, **cut}
            yield f"{kernel.__name__} {kind}", describe(kernel, torch.bfloat16, constants), {}
    constants = {"HELD": True, "DIVIDES": True, **cut}
    yield "add_up_kernel", describe(fused_kernels.add_up_kernel, torch.float32, constants), {}
    yield from list_frozen()
    for dtype in NAMES:
        for width in (64, 128, 256):
            yield from list_attention(dtype, width, windowed=width == 64)
    yield from list_attention(torch.bfloat16, 80, windowed=True)


def list_frozen() -> Iterator[tuple[str, ASTSource, dict[str, int]]]:
    """Yield the kernels of norms, of heads and of whole rows, and of rotations, of whole heads and of parts."""
    for width in (128, 2048, 8192):
        rows = max(1, frozen_kernels.NUMBERS // width)
        constants = {"WIDTH": width, "PADDED": width, "ROWS": rows}
        options = {"num_warps": frozen_kernels.count_warps(width * rows)}
        yield f"norm_kernel {width}", describe(frozen_kernels.norm_kernel, torch.bfloat16, constants), options
    for half, rest in ((64, 1), (16, 128)):
        constants = {"WIDTH": 128, "HALF": half, "PADDED": half, "REST": rest, "TOKENS": frozen_kernels.TOKENS}
        constants |= {"BACK": True}
        yield f"turn_kernel {half}", describe(frozen_kernels.turn_kernel, torch.bfloat16, constants), {}


def list_attention(dtype: torch.dtype, width: int, windowed: bool) -> Iterator[tuple[str, ASTSource, dict[str, int]]]:
    """Yield the three kernels of attention for a type and a width of heads."""
    shape = tree_kernels.pick_shape(width, dtype)
    padded = triton.next_power_of_2(width)
    constants = {"WIDTH": width, "PADDED": padded, "M": shape.num_queries, "N": shape.num_keys}
    constants |= {"WINDOWED": windowed, "PRECISION": "ieee" if dtype == torch.float32 else "tf32"}
    options = {"num_warps": shape.num_warps, "num_stages": shape.num_stages}
    for name in ("attend_kernel", "pull_back_queries_kernel", "pull_back_keys_kernel"):
        yield f"{name} {dtype} {width}", describe(getattr(tree_kernels, name), dtype, constants), options


if __name__ == "__main__":
    for label, source, options in list_sources():
        compiled = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=options)
        print(label, compiled.metadata.shared)
