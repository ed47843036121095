"""LoRA (Hu et al. 2021): targets, PEFT configuration, and a forward pass in the activation's own type.

File format, merging and saving are PEFT's. PEFT casts every activation to the adapter's float32; koat casts
the two small matrices to the activation's type instead. In float32 both are the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

from koat.adapters.architectures import find_architecture, is_transposed
from koat.adapters.refine import is_refinable, mix_in
from koat.adapters.targets import read_peft_default, resolve_roles
from koat.core.errors import AdapterError

if TYPE_CHECKING:
    from peft import LoraConfig

    from koat.adapters.settings import LowRankSettings


def resolve_lora_targets(settings: LowRankSettings, config: Any) -> list[str]:
    """Return the names of the linear layers that get an update."""
    if isinstance(settings.targets, list):
        return settings.targets
    if settings.targets == "peft":
        return read_peft_default("TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING", config)
    if settings.targets == "paper":
        architecture = find_architecture(config)
        return list(dict.fromkeys((architecture.query, architecture.value)))
    return resolve_roles(settings.targets, config)


def make_lora_config(settings: LowRankSettings, config: Any) -> LoraConfig:
    """Return PEFT's configuration for these settings on this model."""
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=resolve_lora_targets(settings, config),
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        fan_in_fan_out=is_transposed(config),
    )


class LoraLinear(nn.Module, LoraLayer):
    """Mixed into PEFT's LoRA layers: updates are computed in the type of `x`, variants (DoRA ...) left to PEFT."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base layer's output for `x` `[..., in]` plus `scaling * B A x` of every active adapter."""
        if self.disable_adapters or self.merged or self.lora_variant or "adapter_names" in kwargs:
            plain: Tensor = super().forward(x, *args, **kwargs)
            return plain
        result: Tensor = self.base_layer(x, *args, **kwargs)
        for name in self.active_adapters:
            if name in self.lora_A:
                down: Any = self.lora_A[name].weight
                up: Any = self.lora_B[name].weight
                inner = F.linear(self.lora_dropout[name](x), down.to(x.dtype)) * self.scaling[name]
                result = add_product(result, inner, up.to(x.dtype))
        return result


def add_product(result: Tensor, inner: Tensor, up: Tensor) -> Tensor:
    """Return `result [..., out] + inner [..., r] @ up [out, r].T`, in one pass where all have one type."""
    if not result.dtype == inner.dtype == up.dtype:
        return result + F.linear(inner, up)
    return torch.addmm(result.flatten(0, -2), inner.flatten(0, -2), up.t()).view(result.shape)


def refine_lora_layers(model: nn.Module) -> None:
    """Give PEFT's LoRA layers koat's forward pass; names, parameters and files stay PEFT's.

    Layers whose update has a bias (`lora_bias`, from an adapter that PEFT trained) keep PEFT's. Raises
    AdapterError for DoRA on an 8-bit base: on a CPU, PEFT loses the layers' scales when it reads their weights.
    """
    for module in model.modules():
        if not is_refinable(module, "lora"):
            continue
        layer: Any = module
        if type(module).__name__ == "Linear8bitLt" and layer.lora_variant:
            raise AdapterError(
                "This LoRA has a variant (DoRA) that PEFT cannot compute on an 8-bit base. "
                "Set model.quantisation=nf4 or none."
            )
        if not any(layer.lora_bias.values()):
            mix_in(module, LoraLinear)
