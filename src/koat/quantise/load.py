"""How a base model is asked for: onto which GPU, and quantised by bitsandbytes, kept off the kernels that are wrong."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from koat.core.errors import KoatError, ModelError
from koat.quantise.weights import BLOCK, dequantise_4bit, list_quantised, read_linear_shapes

log = logging.getLogger(__name__)


def import_bitsandbytes(wanted: str, instead: str, error_type: type[KoatError] = ModelError) -> Any:
    """Import and return bitsandbytes for the setting `wanted`. Raises `error_type`, saying how to install it."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise error_type(
            f"{wanted} needs bitsandbytes, which cannot be imported ({error}). "
            f"Install it with pip install 'koat[quant]', or set {instead}."
        ) from error
    return bitsandbytes


def make_loading_options(
    quantisation: str, dtype: torch.dtype, device: torch.device, build_empty: Callable[[], nn.Module]
) -> dict[str, Any]:
    """Return what transformers' `from_pretrained` needs to quantise while it loads, and to load onto a GPU at once.

    The output head stays as it is, and so do layers that bitsandbytes would compute wrongly on this processor;
    `build_empty` builds the model without weights to look for them. Raises ModelError without bitsandbytes, and
    when no layer is left to quantise.
    """
    if quantisation == "none":
        return {} if device.type == "cpu" else {"device_map": {"": number_gpu(device)}}
    import_bitsandbytes(f"model.quantisation={quantisation}", "model.quantisation=none")
    from transformers import BitsAndBytesConfig

    options: dict[str, Any] = {"load_in_8bit": True}
    if quantisation != "8bit":
        options = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": quantisation == "nf4-double",
            "bnb_4bit_compute_dtype": dtype,
        }
        if device.type == "cpu" and not blocks_cross_rows():
            options["llm_int8_skip_modules"] = list_unsafe_layers(build_empty(), quantisation)
    config = BitsAndBytesConfig(**options)  # type: ignore[no-untyped-call]
    return {"quantization_config": config, "device_map": {"": number_gpu(device)}}


def number_gpu(device: torch.device) -> torch.device:
    """Return a device with its number: weights are read in threads, for each of which `cuda` is the first GPU."""
    is_open = device.type == "cuda" and device.index is None
    return torch.device("cuda", torch.cuda.current_device()) if is_open else device


@functools.cache
def blocks_cross_rows() -> bool:
    """Whether this processor's 4-bit kernel dequantises a weight rightly whose rows are no whole blocks.

    Blocks of 64 run on from row to row; the AVX-512 kernel of bitsandbytes 0.50.2 begins anew at each row.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.linspace(-1, 1, 6 * BLOCK).view(4, -1) * torch.arange(1, 5)[:, None]
    packed, state = quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    found: Tensor = dequantize_4bit(packed, state)
    return torch.allclose(found, dequantise_4bit(packed, state), rtol=1e-4, atol=1e-5)


def list_unsafe_layers(empty: nn.Module, quantisation: str) -> list[str]:
    """Return names of layers not to quantise in 4 bit here: rows that are no whole blocks, and the head."""
    shapes = read_linear_shapes(empty)
    unsafe = [name for name, (inputs, _) in shapes.items() if inputs % BLOCK]
    why = f"rows that are no multiple of {BLOCK} come out wrong from bitsandbytes' 4-bit kernel on this processor"
    if len(unsafe) == len(shapes):
        raise ModelError(
            f"model.quantisation={quantisation}: no layer of this model can be quantised here; {why}. "
            "Set model.quantisation=8bit or none, or use a GPU."
        )
    if unsafe:
        log.warning("%d of %d linear layers stay unquantised: %s.", len(unsafe), len(shapes), why)
    head: Any = getattr(empty, "get_output_embeddings", lambda: None)()
    return unsafe + [name for name, module in empty.named_modules() if module is head]


def settle_kernels(model: nn.Module) -> None:
    """Keep 4-bit layers to the one kernel that computes in the model's type and has a backward pass.

    On processors with AVX512-BF16, bitsandbytes 0.50 repacks a layer's weight at its first pass without
    gradients. From then on it computes in bfloat16 whatever the type, and has no backward pass any more.
    """
    for layer in list_quantised(model).values():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
