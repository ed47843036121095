"""Every setting of a base model, its data and its training: name, type, default, help. One home each.

A method's own settings live with the method, in `koat.adapters.methods`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from koat.core.config import Section

SPELT_OUT = re.compile(r"\\n(?![a-zA-Z])")
"""A line break as a shell leaves it; `\\nabla` and `C:\\new` are none."""
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Quantisation = Literal["none", "8bit", "nf4", "nf4-double"]


class ModelSettings(Section):
    """The base model and how it is loaded."""

    base: str = Field(description="Folder or Hub id of the base model; `nano` is the small one that ships.")
    revision: str | None = Field(None, description="Branch, tag or commit on the Hub.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Type of the frozen weights; `auto` takes bfloat16 on CUDA or when quantised, float32 elsewhere. "
        "Full fine-tuning brings float32.",
    )
    quantisation: Quantisation = Field(
        "none",
        description="Linear layers in 8 bit (LLM.int8()), 4 bit (NF4), or 4 bit with their scales quantised too; "
        "they compute in `dtype`. QLoRA brings nf4-double.",
    )
    device: str = Field("auto", description="`auto`, `cpu`, `cuda` or `cuda:N`.")
    layout: Literal["auto", "forest", "padded"] = Field(
        "auto",
        description="`forest` shares prefixes; `padded` runs one sequence a row; `auto` verifies, then chooses.",
    )
    attention: Literal["auto", "sdpa", "flex", "eager"] = Field(
        "auto",
        description="Attention kernel; `auto` takes koat's own, which skips what nobody may see (on CUDA by Triton, on "
        "a CPU sdpa called tree by tree), where it proves exact, else sdpa; `sdpa` keeps to dense masks.",
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the model. Only for publishers you trust."
    )


class TemplateSettings(Section):
    """A prompt template of one's own: `{field}` is replaced by that field of a record."""

    prompt: str = Field(
        description="What is given, in double quotes so that \\n is a line break: "
        'prompt: "### 질문: {instruction}\\n\\n### 답변:" in a file, '
        """data.template.prompt='"### 질문: {instruction}\\n\\n### 답변:"' in a shell."""
    )
    response: str = Field("{output}", description="What is supervised.")
    name: str = Field("custom", description="A name for tables and model cards.")

    @field_validator("prompt", "response")
    @classmethod
    def _refuse_spelt_line_breaks(cls, text: str) -> str:
        if "\n" not in text and SPELT_OUT.search(text):
            raise ValueError(
                "it holds a backslash and the letter n where a line break is meant. In a file put the text in double "
                'quotes ("...\\n...") or below `|`; in a shell put single quotes around the double ones '
                """(data.template.prompt='"...\\n..."')"""
            )
        return text


Template = str | TemplateSettings


class DataSettings(Section):
    """Training and validation data, and how rows become token sequences."""

    train: list[str] = Field(description="Files, folders or Hub ids to train on.", min_length=1)
    validation: list[str] = Field(
        default_factory=list, description="Files to validate on; none: see validation_fraction."
    )
    validation_fraction: Fraction = Field(
        0.0, description="Share of the training groups (articles, or rows) held out when `validation` is empty."
    )
    splits: Path | None = Field(
        None,
        description="TSV with columns `title` and `split` that divides groups into parts; "
        "`train` and `validation` are then read from the training files.",
    )
    limit: Positive | None = Field(None, description="Use only this many training rows, drawn with the run's seed.")
    validation_limit: Positive | None = Field(
        None, description="Use only this many validation rows; none: with `limit`, held-out rows shrink alike."
    )
    format: Literal["auto", "alpaca", "prompt-completion", "chat", "squad", "table", "datasets"] = Field(
        "auto", description="What the files hold; `auto` looks at their content."
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Field of the template: column of the file, for example instruction: question.",
    )
    values: dict[str, dict[str, str]] = Field(
        default_factory=dict, description="Words for coded values, for example label: {0: 부정, 1: 긍정}."
    )
    clean: dict[str, Literal["hangul", "strip"]] = Field(
        default_factory=dict, description="Cleaning per field: `hangul` keeps Hangul and white space only."
    )
    template: Template | list[Template] = Field(
        "koalpaca", description="Prompt template by name, one of your own, or several (each row is used in each)."
    )
    loss_on: Literal["response", "all"] = Field("response", description="Which tokens are supervised.")
    max_length: Positive | None = Field(None, description="Longest sequence in tokens; none: the model's own limit.")
    overflow: Literal["error", "drop", "truncate_context"] = Field(
        "error", description="What happens to a longer sequence; whatever happens is counted and reported."
    )
    on_bad_row: Literal["error", "skip"] = Field("error", description="Stop at a broken row, or skip and list it.")

    def list_files(self) -> list[str]:
        """Return everything that rows come from, and what divides them."""
        return [*self.train, *self.validation, *([str(self.splits)] if self.splits else [])]


class TrainingSettings(Section):
    """The training loop."""

    batch_size: Positive = Field(16, description="Examples per optimizer step, over all processes.")
    epochs: float = Field(1.0, gt=0, description="Passes over the training data; ignored when max_steps is set.")
    max_steps: Positive | None = Field(None, description="Optimizer steps; overrides epochs.")
    learning_rate: float = Field(
        1e-3,
        gt=0,
        description="Peak learning rate. The defaults: ia3 5e-3, lora and qlora 2e-4, prefix and prompt 1e-2, p_tuning "
        "1e-3, full 2e-5. They suit a billion parameters and more; small models want about ten times that.",
        json_schema_extra={"shown": "(by method)"},
    )
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="Shape after the warm-up.")
    warmup: Fraction = Field(0.05, description="Share of the steps over which the learning rate rises.")
    optimizer: Literal["adamw", "adamw-8bit", "adamw-paged"] = Field(
        "adamw",
        description="`adamw-8bit` keeps its moments in 8 bits; `adamw-paged` moves them to the CPU when a GPU is full.",
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay.")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="AdamW's moment decay rates.")
    max_grad_norm: float = Field(1.0, ge=0, description="Clip the gradient to this norm; 0 leaves it alone.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Type of the computation; `auto` takes bfloat16 on CUDA, float32 elsewhere."
    )
    activation_checkpointing: bool = Field(
        False, description="Recompute each layer in the backward pass: less memory, about a third more time."
    )
    activation_offload: bool = Field(
        False,
        description="Move what activation checkpointing keeps from the GPU to the CPU's memory until it is needed.",
    )
    tokens_per_microbatch: Positive = Field(
        4096, description="Tokens (after sharing) that go through the model at once; lower it when memory runs out."
    )
    max_row_length: Positive | None = Field(
        None, description="Longest forest row in tokens; none: chosen from the model's shape."
    )
    sampler: Literal["shuffled", "grouped"] = Field(
        "grouped",
        description="`grouped` keeps rows with one context (an article's questions) in one step; `shuffled` mixes all.",
    )
    noise: float = Field(0.0, ge=0, description="NEFTune's alpha: uniform noise on the embeddings; 0 is none.")
    unlikelihood: float = Field(
        0.0, ge=0, description="Weight of T-Few's unlikelihood loss on wrong choices, the other words of data.values."
    )
    choice_loss: float = Field(
        0.0, ge=0, description="Weight of T-Few's length-normalised loss of the right choice against the wrong ones."
    )
    validate_every: Positive | None = Field(None, description="Steps between validations; none: ten a run.")
    save_every: Positive | None = Field(None, description="Steps between checkpoints; none: with each validation.")
    keep_checkpoints: Positive = Field(2, description="How many checkpoints stay on disk.")
    keep: Literal["best", "last"] = Field("best", description="Which adapter the run ends with, by validation loss.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seeds data order, adapter initialisation and dropout.")

    @property
    def wants_choices(self) -> bool:
        """Whether training looks at wrong answers too."""
        return bool(self.unlikelihood or self.choice_loss)
