"""A tiny random model of every family that koat's table knows, and what its modelling code says of its layers.

Nothing here is taken from koat's table: names, and how a fused projection is cut, are written down anew.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 300
HIDDEN, HEADS, GROUPS, WIDTH = 32, 4, 2, 8
"""Hidden size, heads, key-value heads where a family shares them, and width of a head."""
WINDOW = 6
_LLAMA = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "num_hidden_layers": 2,
}
_GPT2 = {"n_embd": HIDDEN, "n_head": HEADS, "n_layer": 2, "n_positions": 128}
_FALCON = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_hidden_layers": 2}
_WINDOWS = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_QWEN3_MOE = {**_LLAMA, "head_dim": WIDTH, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}

Cut = Callable[[Tensor], tuple[Tensor, ...]]
"""From the outputs of a fused projection `[d]` to those that are queries, keys and values."""


@dataclass(frozen=True)
class Family:
    """One family, or one form of it: its configuration, and what holds of it."""

    kind: str
    options: dict[str, Any]
    inner: str | None = "mlp.down_proj"
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    fused: str | None = None
    cut: Cut | None = None
    attention: str = "self_attn"
    output: str = "o_proj"
    key_norm: str | None = None
    """The module that norms keys."""
    shares: bool = True
    """Whether a forest is exact on it."""

    @property
    def roles(self) -> tuple[str, str, str]:
        """The projections of queries, keys and values, as they end."""
        names = (self.fused,) * 3 if self.fused else ("q_proj", "k_proj", "v_proj")
        return tuple(f"{self.attention}.{name}" for name in names)  # type: ignore[return-value]

    @property
    def linears(self) -> set[str]:
        """All linear layers of a block, as they end."""
        names = {*self.roles, f"{self.attention}.{self.output}", *self.up}
        return names | ({self.inner} if self.inner else set())


def _view(*shape: int) -> Cut:
    """GPT-NeoX, BLOOM, Falcon: queries of a group, then its key, then its value."""

    def cut(outputs: Tensor) -> tuple[Tensor, ...]:
        groups = outputs.view(*shape)
        return groups[..., :-2, :].flatten(), groups[..., -2, :].flatten(), groups[..., -1, :].flatten()

    return cut


def _chunk(outputs: Tensor) -> tuple[Tensor, ...]:
    """GPT-NeoX and GPT-BigCode without multi-query: each head's three parts side by side."""
    return tuple(part.flatten() for part in outputs.view(HEADS, 3 * WIDTH).chunk(3, dim=-1))


def _split(*sizes: int) -> Cut:
    return lambda outputs: outputs.split(sizes)


def _gpt(kind: str, cut: Cut, fused: str = "c_attn", **options: Any) -> Family:
    return Family(kind, {**_GPT2, **options}, "mlp.c_proj", ("mlp.c_fc",), fused, cut, "attn", "c_proj")


def _neox(kind: str, options: dict[str, Any], cut: Cut, shares: bool = True, attention: str = "self_attention"):
    names = ("mlp.dense_4h_to_h", ("mlp.dense_h_to_4h",), "query_key_value")
    return Family(kind, options, *names, cut, attention, "dense", shares=shares)


def _phi(**options: Any) -> Family:
    norm = "self_attn.k_layernorm" if options else None
    names = {"inner": "mlp.fc2", "up": ("mlp.fc1",), "output": "dense"}
    return Family("phi", {**_LLAMA, **options}, **names, key_norm=norm)  # type: ignore[arg-type]


_K_NORM = "self_attn.k_norm"
FAMILIES: dict[str, Family] = {
    "bloom": _neox("bloom", {"hidden_size": HIDDEN, "n_head": HEADS, "n_layer": 2}, _view(HEADS, 3, WIDTH), False),
    "exaone4": Family("exaone4", {**_LLAMA, **_WINDOWS}, key_norm=_K_NORM),
    "falcon-grouped": _neox(
        "falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": GROUPS}, _view(GROUPS, 4, WIDTH)
    ),
    "falcon-multi-query": _neox("falcon", {**_FALCON, "multi_query": True}, _view(HEADS + 2, WIDTH)),
    "falcon-per-head": _neox(
        "falcon", {**_FALCON, "multi_query": False, "parallel_attn": False, "bias": True}, _view(HEADS, 3, WIDTH)
    ),
    "falcon-alibi": _neox(
        "falcon", {**_FALCON, "multi_query": False, "alibi": True, "bias": True}, _view(HEADS, 3, WIDTH), False
    ),
    "gemma": Family("gemma", {**_LLAMA, "head_dim": 12}),
    "gemma2": Family("gemma2", {**_LLAMA, **_WINDOWS, "head_dim": 12, "query_pre_attn_scalar": 12}),
    "gemma3_text": Family(
        "gemma3_text", {**_LLAMA, **_WINDOWS, "head_dim": 12, "query_pre_attn_scalar": 12}, key_norm=_K_NORM
    ),
    "gpt2": _gpt("gpt2", _split(HIDDEN, HIDDEN, HIDDEN)),
    "gpt_bigcode": _gpt("gpt_bigcode", _split(HIDDEN, WIDTH, WIDTH)),
    "gpt_bigcode-per-head": _gpt("gpt_bigcode", _chunk, multi_query=False),
    "gpt_neox": _neox(
        "gpt_neox",
        {"hidden_size": HIDDEN, "intermediate_size": 48, "num_attention_heads": HEADS, "num_hidden_layers": 2},
        _chunk,
        attention="attention",
    ),
    "gptj": Family(
        "gptj", {**_GPT2, "rotary_dim": 4}, "mlp.fc_out", ("mlp.fc_in",), attention="attn", output="out_proj"
    ),
    "granite": Family("granite", {**_LLAMA, "logits_scaling": 3.0, "residual_multiplier": 0.5}),
    "llama": Family("llama", _LLAMA),
    "mistral": Family("mistral", {**_LLAMA, "sliding_window": WINDOW}),
    "mixtral": Family("mixtral", {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}, None, ()),
    "olmo2": Family("olmo2", _LLAMA, key_norm=_K_NORM),
    "opt": Family(
        "opt",
        {"hidden_size": HIDDEN, "ffn_dim": 48, "num_attention_heads": HEADS, "num_hidden_layers": 2}
        | {"word_embed_proj_dim": 24, "max_position_embeddings": 128},
        *("fc2", ("fc1",)),
        output="out_proj",
    ),
    "phi": _phi(),
    "phi-key-norm": _phi(qk_layernorm=True),
    "phi3": Family(
        "phi3",
        {**_LLAMA, "head_dim": 12},
        up=("mlp.gate_up_proj",),
        fused="qkv_proj",
        cut=_split(HEADS * 12, GROUPS * 12, GROUPS * 12),
    ),
    "qwen2": Family("qwen2", _LLAMA),
    "qwen3": Family("qwen3", {**_LLAMA, "head_dim": 12}, key_norm=_K_NORM),
    "qwen3_moe": Family("qwen3_moe", _QWEN3_MOE, None, (), key_norm=_K_NORM),
    "starcoder2": Family("starcoder2", _LLAMA, "mlp.c_proj", ("mlp.c_fc",)),
}


def make_family_config(name: str) -> Any:
    """Return the configuration of a family's tiny model."""
    from transformers import AutoConfig

    family = FAMILIES[name]
    special = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    return AutoConfig.for_model(family.kind, vocab_size=VOCABULARY, **special, **copy.deepcopy(family.options))


@cache
def _build(name: str) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(make_family_config(name), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for path, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim > 1:
            weight.data = noise * (0.5 if "emb" in path or "wte" in path else 1.2 * weight.shape[-1] ** -0.5)
        else:
            weight.data += 0.1 * noise
    return model.requires_grad_(False).eval()


def make_family(name: str) -> Any:
    """Return a copy of a family's tiny frozen float32 model, in evaluation mode."""
    return copy.deepcopy(_build(name))
