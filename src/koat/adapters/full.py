"""Full fine-tuning: every weight of the base is trained, in float32, and kept as a plain Hugging Face model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import GenerationConfig

from koat.adapters.files import compare_states
from koat.core.errors import AdapterError
from koat.quantise.weights import list_quantised


class FullModel(nn.Module):
    """A transformers model of which all is trained, behind those of PEFT's methods that koat calls."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    def get_base_model(self) -> nn.Module:
        """Return the transformers model."""
        return self.model

    def merge_and_unload(self) -> nn.Module:
        """Return the transformers model: there is nothing to merge."""
        return self.model

    def save_pretrained(self, folder: str, **options: Any) -> None:
        """Write a model folder that `AutoModelForCausalLM` opens; tied weights are saved once."""
        write_model_folder(self.model, Path(folder), **options)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the transformers model."""
        return self.model(*args, **kwargs)


def write_model_folder(model: Any, folder: Path, **options: Any) -> None:
    """Write a model folder; settings of generation that transformers loads but does not save go along as they came.

    It refuses a temperature where nothing is sampled, for one, and published bases have such.
    """
    own = model.generation_config
    try:
        own.validate(strict=True)
    except ValueError:
        model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
        try:
            model.save_pretrained(str(folder), **options)
        finally:
            model.generation_config = own
        own.to_json_file(str(folder / "generation_config.json"))
    else:
        model.save_pretrained(str(folder), **options)


def train_whole(model: nn.Module) -> FullModel:
    """Make every weight of a model trainable, held in float32, tied ones once. Raises AdapterError if quantised."""
    if list_quantised(model):
        raise AdapterError("Full fine-tuning needs a base that is not quantised. Set model.quantisation=none.")
    return FullModel(model.float().requires_grad_(True))


def read_weights(model: FullModel) -> dict[str, Tensor]:
    """Return all weights under the names that they have in the model, tied ones once."""
    return dict(model.model.named_parameters())


@torch.no_grad()
def write_weights(model: FullModel, state: dict[str, Tensor]) -> None:
    """Put back what `read_weights` returned, rounded to the type that the model is held in."""
    for name, weight in model.model.named_parameters():
        weight.copy_(state[name])


def restore_whole(model: nn.Module, folder: Path, trainable: bool = False) -> FullModel:
    """Give a base model the weights of a saved one of its shape. Raises AdapterError when they do not fit."""
    kind: Any = type(model)
    try:
        loaded, report = kind.from_pretrained(
            str(folder), dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise AdapterError(f"The model in {folder} cannot be loaded ({error}). Copy or train it again.") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise AdapterError(f"The model in {folder} is not whole: {missing[0]} is missing. Copy or train it again.")
    whole, state = train_whole(model) if trainable else FullModel(model), read_weights(FullModel(loaded))
    compare_states(read_weights(whole), state, str(folder))
    write_weights(whole, state)
    return whole
