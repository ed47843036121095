"""Where each model family keeps its keys, values and inner feed-forward activation.

Names are the last parts of module names, as PEFT matches them. "Keys" are the key projection's output,
before any norm and rotation. The inner activation is the input of the feed-forward's last linear layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from koat.core.errors import AdapterError

Fusion = Literal["per-head", "concatenated"]


@dataclass(frozen=True, slots=True)
class Architecture:
    """The linear layers of a family by role.

    `fused` is set where queries, keys and values come from one projection: `per-head` lays them out as
    `[heads, (q, k, v), head_dim]` (GPT-NeoX), `concatenated` as `[q | k | v]` (GPT-2).
    """

    query: str
    key: str
    value: str
    attention_output: str
    inner: str
    """The linear layer that takes the inner activation."""
    up: tuple[str, ...]
    """The linear layers that make the inner activation."""
    fused: Fusion | None = None
    key_norm: bool = False
    """A norm follows the key projection and takes most of a key scale away again."""

    @property
    def linears(self) -> tuple[str, ...]:
        """All linear layers of a block, each once."""
        names = (self.query, self.key, self.value, self.attention_output, *self.up, self.inner)
        return tuple(dict.fromkeys(names))


_LLAMA = Architecture("q_proj", "k_proj", "v_proj", "o_proj", inner="down_proj", up=("gate_proj", "up_proj"))
_QWEN3 = Architecture(
    "q_proj", "k_proj", "v_proj", "o_proj", inner="down_proj", up=("gate_proj", "up_proj"), key_norm=True
)
_NEOX = "attention.query_key_value"

ARCHITECTURES: dict[str, Architecture] = {
    "gpt_neox": Architecture(
        _NEOX, _NEOX, _NEOX, "attention.dense", inner="mlp.dense_4h_to_h", up=("mlp.dense_h_to_4h",), fused="per-head"
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _QWEN3,
    "gpt2": Architecture(
        "attn.c_attn", "attn.c_attn", "attn.c_attn", "attn.c_proj",
        inner="mlp.c_proj", up=("mlp.c_fc",), fused="concatenated",
    ),
}  # fmt: skip


def find_architecture(config: Any) -> Architecture:
    """Return the architecture of a model configuration.

    Raises AdapterError for a family that is not in the table, with how to go on.
    """
    family = config.model_type
    if family not in ARCHITECTURES:
        raise AdapterError(
            f"Where the model family {family!r} keeps keys, values and inner activations is not known. "
            f"Known: {', '.join(sorted(ARCHITECTURES))}. Name the layers yourself, for example "
            "adapter.targets=[k_proj,v_proj,down_proj] adapter.feedforward=[down_proj]; "
            "adapter.targets=peft takes PEFT's own choice where it has one."
        )
    return ARCHITECTURES[family]


def mark_queries(architecture: Architecture, config: Any) -> Tensor:
    """Return a boolean mark per output of the fused projection: True where it is a query."""
    heads = int(config.num_attention_heads)
    hidden = int(config.hidden_size)
    kinds = torch.arange(3) == 0
    if architecture.fused == "per-head":
        return kinds[None, :, None].expand(heads, 3, hidden // heads).reshape(-1)
    return kinds[:, None].expand(3, hidden).reshape(-1)
