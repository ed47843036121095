"""Soft prompts: prefix tuning (Li and Liang 2021), prompt tuning (Lester et al. 2021), P-tuning (Liu et al. 2021).

Prompts, files and names are PEFT's; `koat.forest.root` puts them below the trees.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from torch import Tensor, nn

from koat.core.errors import AdapterError

if TYPE_CHECKING:
    from peft import PeftConfig

    from koat.adapters.settings import PrefixSettings, PromptSettings, PTuningSettings
    from koat.core.config import Section

ENCODER = "prompt_encoder."
EMBEDDING = f"{ENCODER}embedding.weight"
FINISHED = "prompt_embeddings"
"""PEFT's name for what a file holds: the prompt itself, whatever made it."""


def count_virtual_tokens(settings: Section) -> int:
    """Return how many tokens of the context a method takes for its prompt; 0 for methods without one."""
    return int(getattr(settings, "num_virtual_tokens", 0))


def make_prefix_config(settings: PrefixSettings) -> PeftConfig:
    """Return PEFT's configuration for keys and values before every sequence."""
    from peft import PrefixTuningConfig

    return PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=settings.num_virtual_tokens,
        prefix_projection=settings.projection_size > 0,
        encoder_hidden_size=settings.projection_size or None,  # type: ignore[arg-type]  # PEFT's own default is None
    )


def make_prompt_config(settings: PromptSettings) -> PeftConfig:
    """Return PEFT's configuration for embeddings before every sequence, drawn from the vocabulary's."""
    from peft import PromptTuningConfig, PromptTuningInit

    return PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=settings.num_virtual_tokens,
        prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB,
    )


def make_p_tuning_config(settings: PTuningSettings) -> PeftConfig:
    """Return PEFT's configuration for embeddings that a small network makes."""
    from peft import PromptEncoderConfig

    return PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=settings.num_virtual_tokens,
        encoder_hidden_size=settings.encoder_size,
        encoder_num_layers=2,
    )


def find_encoder(model: PeftModel) -> Any:
    """Return the module that makes the prompt."""
    return model.prompt_encoder[model.active_adapter]


def read_soft_state(model: PeftModel) -> dict[str, Tensor]:
    """Return all that makes the prompt, network included: PEFT's file keeps the finished prompt alone."""
    return {f"{ENCODER}{name}": tensor for name, tensor in find_encoder(model).state_dict().items()}


def write_soft_state(model: PeftModel, state: dict[str, Tensor]) -> None:
    """Put back what `read_soft_state` returned."""
    find_encoder(model).load_state_dict({name.removeprefix(ENCODER): tensor for name, tensor in state.items()})


@contextmanager
def finished(model: nn.Module) -> Iterator[None]:
    """Within the block, a prefix's configuration says what its file holds: keys and values, and no network.

    A file that named the network, which is not in it, could not be trained any further.
    """
    config: Any = getattr(model, "active_peft_config", None)
    was_made = getattr(config, "prefix_projection", False)
    if was_made:
        config.prefix_projection = False
    try:
        yield
    finally:
        if was_made:
            config.prefix_projection = True


def name_finished(model: PeftModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a file's finished prompt under the name that it is trained by.

    Raises AdapterError where a network makes the prompt while it is trained: no file holds that.
    """
    if set(read_soft_state(model)) != {EMBEDDING}:
        raise AdapterError(
            "adapter.start cannot give a prompt to the network that makes it: a finished adapter holds the prompt "
            "alone. Set adapter.projection_size=0 to go on training the prompt itself."
        )
    return {EMBEDDING if name == FINISHED else name: tensor for name, tensor in state.items()}
