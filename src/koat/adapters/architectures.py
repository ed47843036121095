"""Where each model family keeps its keys, values and inner feed-forward activation.

Names are the last parts of module names, as PEFT matches them. "Keys" are the key projection's output,
before any norm and rotation. The inner activation is the input of the feed-forward's last linear layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from koat.core.errors import AdapterError

Fusion = Literal["grouped", "concatenated"]


@dataclass(frozen=True, slots=True)
class Architecture:
    """The linear layers of a family by role.

    `fused` is set where queries, keys and values come from one projection. `grouped` lays its outputs out as
    `[key-value heads, (q ... q, k, v), head_dim]`, each key-value head after the queries that share it (Falcon;
    in GPT-NeoX each has one query), `concatenated` as `[q | k | v]` (GPT-2, Phi-3).
    """

    query: str
    key: str
    value: str
    attention_output: str
    inner: str | None
    """The linear layer that takes the inner activation; None where that is inside experts."""
    up: tuple[str, ...]
    """The linear layers that make the inner activation."""
    fused: Fusion | None = None
    num_key_value_heads: int | None = None
    """Of a fused projection, where the configuration says otherwise."""
    query_norm: str | None = None
    """The norm that follows the query projection, where there is one."""
    key_norm: str | None = None
    """The norm that follows the key projection; it takes the common factor of a key scale away again."""
    experts: str | None = None
    """The module whose feed-forward weights are 3-D parameters, one for all experts, out of reach of PEFT's IA3."""
    transposed: bool = False
    """Linear layers are Conv1D, which keeps its weight as `[in, out]`; PEFT needs to be told."""

    @property
    def linears(self) -> tuple[str, ...]:
        """All linear layers of a block, each once."""
        inner = () if self.inner is None else (self.inner,)
        names = (self.query, self.key, self.value, self.attention_output, *self.up, *inner)
        return tuple(dict.fromkeys(names))


def _separate(output: str, up: tuple[str, ...], inner: str) -> Architecture:
    """Return the row of a family with a projection each for queries, keys and values."""
    return Architecture("q_proj", "k_proj", "v_proj", output, inner=inner, up=up)


def _fuse(projection: str, output: str, up: tuple[str, ...], inner: str, fused: Fusion) -> Architecture:
    """Return the row of a family with one projection for queries, keys and values."""
    return Architecture(projection, projection, projection, output, inner=inner, up=up, fused=fused)


def _describe_falcon(config: Any) -> Architecture:
    """Falcon 40B groups its heads; 7B has one head of keys and values for all queries; RW has one for each."""
    if config.new_decoder_architecture:
        return replace(_FALCON, num_key_value_heads=int(config.num_kv_heads))
    return replace(_FALCON, num_key_value_heads=1) if config.multi_query else _FALCON


def _describe_bigcode(config: Any) -> Architecture:
    return _BIGCODE if config.multi_query else replace(_BIGCODE, fused="grouped")


def _describe_phi(config: Any) -> Architecture:
    return replace(_PHI, query_norm="q_layernorm", key_norm="k_layernorm") if config.qk_layernorm else _PHI


_LLAMA = _separate("o_proj", ("gate_proj", "up_proj"), "down_proj")
_QWEN3 = replace(_LLAMA, query_norm="q_norm", key_norm="k_norm")
_MIXTRAL = replace(_LLAMA, inner=None, up=(), experts="mlp.experts")
_PHI = _separate("self_attn.dense", ("fc1",), "fc2")
_BLOOM = _fuse(
    "self_attention.query_key_value", "self_attention.dense", ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h", "grouped"
)
_FALCON = _BLOOM
_BIGCODE = _fuse("attn.c_attn", "attn.c_proj", ("mlp.c_fc",), "mlp.c_proj", "concatenated")

ARCHITECTURES: dict[str, Architecture | Callable[[Any], Architecture]] = {
    "bloom": _BLOOM,
    "exaone4": _QWEN3,
    "falcon": _describe_falcon,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _QWEN3,
    "gpt2": replace(_BIGCODE, transposed=True),
    "gpt_bigcode": _describe_bigcode,
    "gpt_neox": _fuse(
        "attention.query_key_value", "attention.dense", ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h", "grouped"
    ),
    "gptj": _separate("attn.out_proj", ("mlp.fc_in",), "mlp.fc_out"),
    "granite": _LLAMA,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _MIXTRAL,
    "olmo2": _QWEN3,
    "opt": _separate("self_attn.out_proj", ("fc1",), "fc2"),
    "phi": _describe_phi,
    "phi3": _fuse("qkv_proj", "o_proj", ("gate_up_proj",), "down_proj", "concatenated"),
    "qwen2": _LLAMA,
    "qwen3": _QWEN3,
    "qwen3_moe": replace(_MIXTRAL, query_norm="q_norm", key_norm="k_norm"),
    "starcoder2": _separate("o_proj", ("mlp.c_fc",), "mlp.c_proj"),
}
"""By `model_type`; a function where the layout depends on the configuration."""


class UnknownFamilyError(AdapterError):
    """A model family that is not in the table."""


def find_architecture(config: Any) -> Architecture:
    """Return the architecture of a model configuration.

    Raises UnknownFamilyError for a family that is not in the table, with how to go on.
    """
    family = config.model_type
    if family not in ARCHITECTURES:
        raise UnknownFamilyError(
            f"Where the model family {family!r} keeps keys, values and inner activations is not known. "
            f"Known: {', '.join(sorted(ARCHITECTURES))}. Name the layers yourself, for example "
            "adapter.targets=[k_proj,v_proj,down_proj] adapter.feedforward=[down_proj]; "
            "adapter.targets=peft takes PEFT's own choice where it has one."
        )
    row = ARCHITECTURES[family]
    return row if isinstance(row, Architecture) else row(config)


def is_transposed(config: Any) -> bool:
    """Whether a family's linear layers are Conv1D. PEFT itself finds out where the family is not in the table."""
    return config.model_type in ARCHITECTURES and find_architecture(config).transposed


def mark_queries(architecture: Architecture, config: Any) -> Tensor:
    """Return a boolean mark per output of the fused projection: True where it is a query."""
    heads = int(config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    groups = architecture.num_key_value_heads or int(getattr(config, "num_key_value_heads", None) or heads)
    if architecture.fused == "grouped":
        kinds = torch.arange(heads // groups + 2) < heads // groups
        return kinds[None, :, None].expand(groups, -1, width).reshape(-1)
    return torch.arange((heads + 2 * groups) * width) < heads * width
