"""Frozen linear layers on a CPU: the bias added by the kernel that multiplies.

PyTorch writes the bias into the result first and lets the kernel add its product to it. oneDNN's own kernel adds the
bias on the way out, a pass less, to the same bits wherever that was tried.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from koat.adapters.refine import mix_in, take_out

LARGE = 1 << 18
"""From how many numbers of a result on a pass less outweighs a function in Python, where gradients follow."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
TYPES = (torch.bfloat16, torch.float32)
"""Types that layers compute with here."""


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `x [..., in]` times `weight [out, in]`, plus `bias [out]`, as `[..., out]`; without a graph."""
    if bias is None or not _adds_bias(x):
        return F.linear(x, weight, bias)
    projected: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return projected


def pull_back_projection(gradient: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient `[..., in]` of what `weight [out, in]` projected, from that of the result."""
    return gradient.reshape(-1, gradient.shape[-1]).mm(weight).view(*gradient.shape[:-1], weight.shape[-1])


def _adds_bias(x: Tensor) -> bool:
    """Whether oneDNN's kernel serves `x`: it takes rows that lie one after the other."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.is_contiguous() and _has_kernel()


@functools.cache
def _has_kernel() -> bool:
    """Whether oneDNN's kernel computes what PyTorch's does, found by trying it."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=generator, device="cpu").bfloat16() for shape in ((2, 64, 512), (256, 512), (256,))
    )
    try:
        with torch.autocast("cpu", enabled=False):
            found = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
            return torch.equal(found, F.linear(x, weight, bias))
    except (AttributeError, RuntimeError):  # a PyTorch or a processor without it
        return False


class Project(torch.autograd.Function):
    """A frozen linear layer; keeps nothing but its weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """`x` is `[..., in]`, `weight` `[out, in]`, `bias` `[out]`."""
        ctx.save_for_backward(weight)
        return project(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of `x`."""
        return pull_back_projection(gradients[0], *ctx.saved_tensors), None, None


class LeanLinear(nn.Module):
    """Mixed into the class of a linear layer with a bias."""

    def forward(self, input: Tensor) -> Tensor:  # as PyTorch names it
        """Project `input` `[..., in]`, as the layer's own class does unless another kernel serves, and pays."""
        layer: Any = self
        if _adds_bias(input) and is_frozen(layer, input):
            weight, bias = layer.weight, layer.bias
            if not (torch.is_grad_enabled() and input.requires_grad):
                return project(input, weight, bias)
            if input.numel() // input.shape[-1] * len(weight) >= LARGE:
                projected: Tensor = Project.apply(input, weight, bias)  # type: ignore[no-untyped-call]
                return projected
        plain: Tensor = super().forward(input)
        return plain


def is_frozen(layer: nn.Module, x: Tensor) -> bool:
    """Whether a linear layer projects `x` `[..., in]` as it is: its weights are not trained, nor is anything cast."""
    own: Any = layer
    weight, bias = own.weight, own.bias
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    usual = type(weight) in (Tensor, nn.Parameter) and weight.dtype == x.dtype and weight.is_contiguous()
    return usual and not trained and not torch.is_autocast_enabled(x.device.type)


def is_plain(layer: nn.Module, x: Tensor) -> bool:
    """Whether a layer on a CPU does nothing to `x` but to project it, so that a function may do it in its place."""
    if x.device.type != "cpu" or x.dtype not in TYPES:
        return False
    own: Any = vars(layer)
    is_linear = type(layer) is nn.Linear or isinstance(layer, LeanLinear)
    watches_all: Any = nn.modules.module._has_any_global_hook
    is_watched = "forward" in own or any(own[name] for name in HOOKS) or watches_all()
    return is_linear and not is_watched and is_frozen(layer, x)


def refine_projections(model: nn.Module) -> None:
    """Let a model's linear layers with a bias, of PyTorch's own class, be computed here."""
    for module in model.modules():
        if type(module) is nn.Linear and module.bias is not None:
            mix_in(module, LeanLinear)


def release_projections(model: nn.Module) -> None:
    """Give the layers their own class back."""
    for module in model.modules():
        if isinstance(module, LeanLinear):
            take_out(module)
