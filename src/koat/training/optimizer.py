"""The optimizer of a run: PyTorch's AdamW, or bitsandbytes' with 8-bit moments or paged ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from koat.core.errors import TrainingError
from koat.core.settings import TrainingSettings
from koat.quantise.load import import_bitsandbytes

SMALLEST = 4096
"""Tensors with fewer entries keep 32-bit moments under `adamw-8bit`; bitsandbytes' own default."""


def check_optimizer(settings: TrainingSettings, device: torch.device) -> None:
    """Raise TrainingError for an optimizer that cannot run on `device` or whose library is missing."""
    if settings.optimizer == "adamw-paged" and device.type != "cuda":
        raise TrainingError(
            f"training.optimizer=adamw-paged needs a CUDA GPU to page from, and this run is on {device.type}. "
            "Set training.optimizer=adamw or adamw-8bit."
        )
    if settings.optimizer != "adamw":
        _import_optimizers(settings.optimizer)


def build_optimizer(parameters: list[nn.Parameter], settings: TrainingSettings) -> torch.optim.Optimizer:
    """Return the optimizer that `settings` name, for `parameters` on one device."""
    check_optimizer(settings, parameters[0].device)
    options: dict[str, Any] = {
        "lr": settings.learning_rate, "betas": settings.betas, "weight_decay": settings.weight_decay,
    }  # fmt: skip
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **options)
    library = _import_optimizers(settings.optimizer)
    if settings.optimizer == "adamw-paged":
        built: torch.optim.Optimizer = library.PagedAdamW(parameters, **options)
    else:
        built = library.AdamW8bit(parameters, min_8bit_size=SMALLEST, **options)
    return built


def _import_optimizers(name: str) -> Any:
    return import_bitsandbytes(f"training.optimizer={name}", "training.optimizer=adamw", TrainingError).optim


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return an optimizer's state as tensors under `<parameter number>.<name>`.

    bitsandbytes counts steps in plain numbers, which become int64, and hands its tensors out one level deeper.
    """
    flat = {}
    for number, entries in optimizer.state_dict()["state"].items():
        inner = [entry.items() for entry in entries.values() if isinstance(entry, dict)]
        for name, value in [*entries.items(), *(pair for pairs in inner for pair in pairs)]:
            if not isinstance(value, dict):
                flat[f"{number}.{name}"] = torch.as_tensor(value).detach().cpu().clone().contiguous()
    return flat


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put tensors from `flatten_optimizer` back."""
    state: dict[int, dict[str, Tensor | int]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        plain = value.dtype == torch.int64 and value.ndim == 0
        state.setdefault(int(number), {})[name] = int(value) if plain else value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    if getattr(optimizer, "is_paged", False):
        page_again(optimizer)


def page_again(optimizer: Any) -> None:
    """Move a paged optimizer's moments back into pages: bitsandbytes loads them as ordinary tensors on the GPU."""
    for parameter, entries in optimizer.state.items():
        for name in ("state1", "state2"):
            if name in entries:
                page = optimizer.get_state_buffer(parameter, dtype=entries[name].dtype)
                entries[name] = page.copy_(entries[name])
