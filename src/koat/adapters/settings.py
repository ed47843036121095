"""Each method's own settings. Imports no PyTorch, so that `--help` and configuration are quick."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from koat.core.config import Section

Targets = Literal["paper", "peft", "attention", "all-linear"] | list[str]


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


class LoraSettings(Section):
    """LoRA (Hu et al. 2021): a low-rank update beside each chosen linear layer."""

    method: Literal["lora"] = "lora"
    targets: Targets = Field(
        "all-linear",
        description="`attention`: queries, keys, values, attention output. `all-linear`: every linear layer. "
        "`paper`: queries and values. `peft`: PEFT's default. Or names.",
    )
    r: Annotated[int, Field(gt=0)] = Field(8, description="Rank of the update.")
    alpha: float = Field(16.0, gt=0, description="The update is scaled by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the update's input.")
    rslora: bool = Field(False, description="Scale by alpha / sqrt(r) instead (rank-stabilised LoRA).")


AdapterSettings = Annotated[Ia3Settings | LoraSettings, Field(discriminator="method")]
