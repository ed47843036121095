"""Soft prompts: prefix tuning (Li and Liang 2021), prompt tuning (Lester et al. 2021), P-tuning (Liu et al. 2021).

Prompts, files and names are PEFT's; `koat.forest.root` puts them below the trees.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft import PeftModel
from torch import Tensor, nn

if TYPE_CHECKING:
    from peft import PeftConfig

    from koat.adapters.settings import PrefixSettings, PromptSettings, PTuningSettings

ENCODER = "prompt_encoder."


def make_prefix_config(settings: PrefixSettings) -> PeftConfig:
    """Return PEFT's configuration for keys and values before every sequence."""
    from peft import PrefixTuningConfig

    return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=settings.num_virtual_tokens)


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


def is_soft(model: nn.Module) -> bool:
    """Whether a `PeftModel` carries a soft prompt."""
    config: Any = getattr(model, "active_peft_config", None)
    return bool(getattr(config, "is_prompt_learning", False))


def find_encoder(model: PeftModel) -> Any:
    """Return the module that makes the prompt."""
    return model.prompt_encoder[model.active_adapter]


def read_soft_state(model: PeftModel) -> dict[str, Tensor]:
    """Return all that makes the prompt, network included: PEFT's file keeps the finished prompt alone."""
    return {f"{ENCODER}{name}": tensor for name, tensor in find_encoder(model).state_dict().items()}


def write_soft_state(model: PeftModel, state: dict[str, Tensor]) -> None:
    """Put back what `read_soft_state` returned."""
    find_encoder(model).load_state_dict({name.removeprefix(ENCODER): tensor for name, tensor in state.items()})
