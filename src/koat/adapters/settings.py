"""Each method's own settings. Imports no PyTorch, so that `--help` and configuration are quick."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from koat.core.config import Section

Targets = Literal["paper", "peft", "attention", "all-linear"] | list[str]
START = "Folder of an adapter, koat's or PEFT's, to go on from; none: a fresh one."


class Ia3Settings(Section):
    """IA3 (Liu et al. 2022, T-Few): learned vectors rescale keys, values and the inner activation."""

    method: Literal["ia3"] = "ia3"
    targets: Targets = Field(
        "paper",
        description="`paper`: keys, values, inner activation. `attention`: also queries and attention output. "
        "`all-linear`: every linear layer's output, the inner activation once. `peft`: PEFT's default. Or names.",
    )
    feedforward: list[str] = Field(
        default_factory=list,
        description="With named targets: those whose input is scaled instead of their output.",
    )
    reach: Literal["peft", "whole"] = Field(
        "peft",
        description="`whole`: for the projections that targets name, also after the norm that follows them, which "
        "otherwise cancels a common scale (Qwen3, Gemma 3, OLMo 2, EXAONE 4), and, with a preset, inside experts "
        "(Mixtral, Qwen3-MoE; slower on GPUs). Plain PEFT passes these vectors over in silence: merge first.",
    )
    start: str | None = Field(None, description=START)


class LowRankSettings(Section):
    """A low-rank update beside each chosen linear layer."""

    method: str
    targets: Targets = Field(
        "all-linear",
        description="`attention`: queries, keys, values, attention output. `all-linear`: every linear layer. "
        "`paper`: queries and values. `peft`: PEFT's default. Or names.",
    )
    r: Annotated[int, Field(gt=0)] = Field(8, description="Rank of the update.")
    alpha: float = Field(16.0, gt=0, description="The update is scaled by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the update's input.")
    rslora: bool = Field(False, description="Scale by alpha / sqrt(r) instead (rank-stabilised LoRA).")
    dora: bool = Field(False, description="Train each output's magnitude apart from its direction (DoRA).")
    start: str | None = Field(None, description=START)


class LoraSettings(LowRankSettings):
    """LoRA (Hu et al. 2021): a low-rank update beside each chosen linear layer; rsLoRA and DoRA as settings."""

    method: Literal["lora"] = "lora"


class QloraSettings(LowRankSettings):
    """QLoRA (Dettmers et al. 2023): LoRA on a base model in 4 bit."""

    method: Literal["qlora"] = "qlora"


class SoftPromptSettings(Section):
    """Tokens that stand before every sequence and are trained instead of the model."""

    method: str
    num_virtual_tokens: Annotated[int, Field(gt=0)] = Field(20, description="Length of the soft prompt in tokens.")


class PrefixSettings(SoftPromptSettings):
    """Prefix tuning (Li and Liang 2021): keys and values before every sequence, in every layer."""

    method: Literal["prefix"] = "prefix"
    projection_size: Annotated[int, Field(ge=0)] = Field(
        0,
        description="Width of a network that makes the keys and values while training (the paper's section 4.3), and "
        "is not kept; 0: they are trained themselves.",
    )
    start: str | None = Field(None, description=START)


class PromptSettings(SoftPromptSettings):
    """Prompt tuning (Lester et al. 2021): embeddings before every sequence."""

    method: Literal["prompt"] = "prompt"
    start: str | None = Field(None, description=START)


class PTuningSettings(SoftPromptSettings):
    """P-tuning (Liu et al. 2021): embeddings before every sequence, made by a small network while training."""

    method: Literal["p_tuning"] = "p_tuning"
    encoder_size: Annotated[int, Field(gt=0)] = Field(128, description="Width of the network that makes the prompt.")


class FullSettings(Section):
    """Full fine-tuning: every weight of the base is trained; what comes out is a plain model folder."""

    method: Literal["full"] = "full"


AdapterSettings = Annotated[
    Ia3Settings | LoraSettings | QloraSettings | PrefixSettings | PromptSettings | PTuningSettings | FullSettings,
    Field(discriminator="method"),
]
