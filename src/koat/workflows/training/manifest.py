"""What a run records about itself besides its settings: versions, hardware, fingerprints."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from koat.core.fingerprint import fingerprint_file

PACKAGES = (
    "koat",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "tokenizers",
    "safetensors",
    "bitsandbytes",
    "triton",
)


def describe_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that results depend on."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def describe_hardware(device: torch.device) -> dict[str, Any]:
    """Return what the run is computed on."""
    facts: dict[str, Any] = {
        "device": str(device),
        "processor": read_processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["gpu_bytes"] = torch.cuda.get_device_properties(device).total_memory
    return facts


def read_processor() -> str:
    """Return the processor's name."""
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def fingerprint_data(paths: list[str]) -> dict[str, Any]:
    """Return a fingerprint for each data file; a Hub id stands for itself."""
    return {path: dict(fingerprint_file(path)) if Path(path).is_file() else "not a file" for path in paths}
