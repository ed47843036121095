"""Tiny random base models on disk, loaded quantised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

WIDE = {"intermediate_size": 128}
"""Rows of whole blocks of 64: others stay unquantised where bitsandbytes' CPU kernel is wrong."""
SHAPES: dict[str, dict[str, Any]] = {
    "gpt_neox": WIDE,
    "llama": WIDE,
    "qwen2": WIDE,
    "gpt2": {},
    "mistral": WIDE,
    "qwen2-window": WIDE,
    "qwen3": WIDE,
    "gemma2": WIDE,
    "opt": {"ffn_dim": 128},
    "gptj": {},
}
"""Llama has no biases, Qwen 2 some, GPT-NeoX and GPT-2 one everywhere; GPT-2 keeps its weights transposed."""


def write_wide(folder: Path, make_model: Callable[..., Any], family: str) -> Path:
    """Write a tiny random model whose layers can all be quantised; return its folder."""
    path = folder / family
    if not path.exists():
        make_model(family, **SHAPES[family]).save_pretrained(path)
    return path


def load_quantised(path: Path | str, quantisation: str, dtype: str = "float32") -> Any:
    """Load a base model quantised, on the CPU."""
    from koat.core.settings import ModelSettings
    from koat.model import load_model

    return load_model(ModelSettings(base=str(path), quantisation=quantisation, dtype=dtype, device="cpu"))
