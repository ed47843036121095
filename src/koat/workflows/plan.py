"""Plan a run from configurations alone: parameters, adapter size, memory. Reads no weights."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from koat.adapters.attach import attach_adapter, count_trainable
from koat.adapters.methods import check_combination
from koat.adapters.remarks import describe_remarks
from koat.core.config import Section
from koat.forest.score import unwrap
from koat.model import build_empty, count_parameters, load_config, pick_device, pick_dtype, settle_dtype
from koat.quantise.weights import count_model_bytes
from koat.workflows.config import PlanConfig

PROBE_LENGTHS = (128, 256)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will take; sizes in bytes."""

    base: str
    method: str
    dtype: str
    total_parameters: int
    trainable_parameters: int
    trainable_share: float
    adapter_bytes: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes_per_token: int
    activation_bytes: int
    head_bytes: int
    peak_bytes: int
    remarks: list[str]
    """What the method's targets do not do on this model family."""

    def to_mapping(self) -> dict[str, Any]:
        """Return a JSON-safe mapping."""
        return asdict(self)


def plan_run(config: PlanConfig) -> Plan:
    """Plan a run: exact counts, and an estimate of its memory while training."""
    check_combination(config.adapter, config.model, config.training)
    model_settings = settle_dtype(config.model, config.training)
    base_config = load_config(config.model)
    dtype = pick_dtype(model_settings.dtype, pick_device(model_settings.device), model_settings.quantisation)
    empty = build_empty(base_config)
    total = count_parameters(empty)
    weight_bytes = count_model_bytes(empty, model_settings.quantisation, dtype)
    trainable = count_trainable(attach_adapter(empty.requires_grad_(False), config.adapter))
    tokens = config.training.tokens_per_microbatch
    per_token = measure_activations(base_config, config.adapter, dtype, config.training.activation_checkpointing)
    vocabulary = int(base_config.vocab_size)
    # Logits of a chunk in the weights' type and in float32, their exponentials, and the gradient.
    head = min(tokens, (128 << 20) // (4 * vocabulary)) * vocabulary * (8 + dtype.itemsize)
    parts = {
        "weight_bytes": weight_bytes,
        "adapter_bytes": trainable * 4,
        "gradient_bytes": trainable * 4,
        "optimizer_bytes": trainable * 8,
        "activation_bytes": int(per_token * tokens),
        "head_bytes": head,
    }
    return Plan(
        base=config.model.base,
        method=config.adapter.method,
        dtype=str(dtype).removeprefix("torch."),
        total_parameters=total,
        trainable_parameters=trainable,
        trainable_share=trainable / total,
        activation_bytes_per_token=int(per_token),
        peak_bytes=sum(parts.values()),
        remarks=describe_remarks(config.adapter, base_config),
        **parts,
    )


def measure_activations(config: Any, adapter: Section, dtype: torch.dtype, checkpointing: bool) -> float:
    """Return the bytes per token that a training step keeps for its backward pass.

    One and two layers run on the meta device and every tensor that autograd keeps is counted. Two lengths
    tell what grows with the token from what grows with its keys; fused attention kernels keep only the first.
    """
    one, two = (linear_part(config, adapter, dtype, layers) for layers in (1, 2))
    layer, rest = two - one, 2 * one - two
    num_layers = int(config.num_hidden_layers)
    if not checkpointing:
        return rest + layer * num_layers
    hidden = int(getattr(config, "hidden_size", None) or config.n_embd)
    return rest + layer + hidden * dtype.itemsize * num_layers


def linear_part(config: Any, adapter: Section, dtype: torch.dtype, num_layers: int) -> float:
    """Return the kept bytes per token of a model with `num_layers`, without what grows with length."""
    short, long = (count_kept_bytes(config, adapter, dtype, num_layers, length) for length in PROBE_LENGTHS)
    slope = (long - short) / (PROBE_LENGTHS[1] - PROBE_LENGTHS[0])
    return short - slope * PROBE_LENGTHS[0]


def count_kept_bytes(config: Any, adapter: Section, dtype: torch.dtype, num_layers: int, length: int) -> float:
    """Return the bytes per token kept for backward by one row of `length` tokens, weights not counted."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]
    model = attach_adapter(build_empty(config).to(dtype).requires_grad_(False), adapter)
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run_empty(model, length)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / length


def run_empty(model: nn.Module, length: int) -> None:
    """Run one row through a model's layers on the meta device."""
    index = torch.arange(length, device="meta")
    unwrap(model).base_model(
        input_ids=index[None],
        position_ids=index[None],
        attention_mask=torch.ones(1, 1, length, length, dtype=torch.bool, device="meta"),
        use_cache=False,
    )
