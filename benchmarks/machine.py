"""The machine: what it is, how fast it multiplies matrices, and how much multiplying a piece of work takes."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "peft", "trl", "lm_eval", "accelerate")
SHAPES = ((1024, 512, 2048), (2048, 512, 1536), (2048, 2048, 512), (1024, 1024, 1024), (2048, 2048, 2048))
"""Matrix products `[m, k] @ [k, n]` that are tried: those of a model of width 512, and square ones."""


def describe_machine(device: torch.device) -> dict[str, str]:
    """Return what a reader needs to know about this machine and the versions on it, in words."""
    import psutil

    found = {
        "processor": _read_processor(),
        "cores": f"{os.cpu_count()} logical, PyTorch uses {torch.get_num_threads()} threads",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    versions = [f"{name} {_read_version(name)}" for name in PACKAGES]
    return {**found, "versions": ", ".join(versions)}


def _read_processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{name or platform.processor() or 'unknown'} ({', '.join(wide) or 'no vector flags read'})"


def _read_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def measure_matrix_rate(dtype: torch.dtype, device: torch.device, seconds: float = 0.4) -> float:
    """Return the best matrix-product rate (FLOPs per second) over `SHAPES`, about `seconds` spent on each."""
    best = 0.0
    for rows, inner, columns in SHAPES:
        left = torch.randn(rows, inner, dtype=torch.float32).to(dtype).to(device)
        right = torch.randn(columns, inner, dtype=torch.float32).to(dtype).to(device)
        stop = time.perf_counter() + seconds
        shortest = float("inf")
        while time.perf_counter() < stop or shortest == float("inf"):
            synchronise(device)
            began = time.perf_counter()
            torch.nn.functional.linear(left, right)
            synchronise(device)
            shortest = min(shortest, time.perf_counter() - began)
        best = max(best, 2.0 * rows * inner * columns / shortest)
    return best


def count_layer_parameters(model: torch.nn.Module) -> int:
    """Return the parameters of a causal model's linear layers, without embeddings, head and adapters."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    return sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if module is not head and type(module).__name__ in {"Linear", "Conv1D"} and ".lora_" not in name
    )


def count_flops(
    model: torch.nn.Module,
    *,
    num_tokens: int,
    num_keys: int,
    num_head_rows: int,
    trains: bool,
    num_adapter_weights: int = 0,
) -> float:
    """Return the FLOPs that a piece of work needs, however it is laid out.

    `num_tokens` counts distinct tokens, `num_keys` the keys that their queries see (summed over tokens),
    `num_head_rows` the rows of the head that some target needs. A frozen base takes 2 FLOPs per parameter
    forward and 2 for the activation's gradient; attention takes 4 per key and channel forward, 8 backward;
    adapter matrices (LoRA) take 2 and 4.
    """
    config: Any = model.config
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    width = int(config.hidden_size)
    per_parameter, per_key = (4, 12) if trains else (2, 4)
    layers = per_parameter * count_layer_parameters(model) * num_tokens
    attention = per_key * width * int(config.num_hidden_layers) * num_keys
    rows = per_parameter * head.weight.numel() * num_head_rows
    return float(layers + attention + rows + (6 if trains else 2) * num_adapter_weights * num_tokens)
