"""Frozen linear layers: PyTorch's own bits where another kernel adds the bias, and nothing changed where it may not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from koat.adapters import projections
from koat.adapters.attach import attach_adapter
from koat.adapters.merge import merge_adapter
from koat.adapters.methods import Ia3Settings, LoraSettings
from koat.adapters.projections import LeanLinear, project, refine_projections, release_projections

INPUTS, OUTPUTS = 64, 48
FORMS = ["rows", "one row", "no row", "cut out", "rows for columns"]
needs_kernel = pytest.mark.skipif(not projections._has_kernel(), reason="oneDNN has no bfloat16 kernel here")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def draw_input(form: str, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return {
        "rows": draw(3, 5, INPUTS, dtype=dtype),
        "one row": draw(1, INPUTS, dtype=dtype),
        "no row": draw(2, 0, INPUTS, dtype=dtype),
        "cut out": draw(3, 5, 3 * INPUTS, dtype=dtype)[..., INPUTS : 2 * INPUTS],
        "rows for columns": draw(3, INPUTS, 5, dtype=dtype).transpose(1, 2),
    }[form]


def make_pair(dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Linear, nn.Linear]:
    """Return a frozen layer twice, the second one refined."""
    torch.manual_seed(0)
    plain, lean = nn.Linear(INPUTS, OUTPUTS), nn.Linear(INPUTS, OUTPUTS)
    lean.load_state_dict(plain.state_dict())
    holder = nn.ModuleList([lean]).to(dtype).requires_grad_(False)
    refine_projections(holder)
    assert isinstance(lean, LeanLinear)
    return plain.to(dtype).requires_grad_(False), lean


def differentiate(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.detach().requires_grad_()
    value = layer(x)
    (gradient,) = torch.autograd.grad(value, x, draw(*value.shape, seed=3, dtype=value.dtype))
    return value.detach(), gradient


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("has_bias", [True, False])
def test_projections_are_pytorchs_to_the_bit(has_bias, form, dtype) -> None:
    x, weight = draw_input(form, dtype), draw(OUTPUTS, INPUTS, seed=1, dtype=dtype)
    bias = draw(OUTPUTS, seed=2, dtype=dtype) if has_bias else None
    found, expected = project(x, weight, bias), F.linear(x, weight, bias)
    assert found.shape == expected.shape == (*x.shape[:-1], OUTPUTS)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_a_layer_has_its_own_values_and_gradients(monkeypatch, form, large) -> None:
    monkeypatch.setattr(projections, "LARGE", 0 if large else 1 << 30)
    plain, lean = make_pair()
    x = draw_input(form)
    (expected, exact), (value, gradient) = (differentiate(layer, x) for layer in (plain, lean))
    assert torch.equal(value, expected) and torch.equal(gradient, exact)
    with torch.no_grad():
        assert torch.equal(lean(x), plain(x))


@needs_kernel
def test_the_kernel_that_adds_the_bias_is_used_for_many_numbers_alone(monkeypatch) -> None:
    _, lean = make_pair()
    x = draw(128, INPUTS).requires_grad_()
    assert type(lean(x).grad_fn).__name__ == "AddmmBackward0"
    monkeypatch.setattr(projections, "LARGE", 128 * OUTPUTS)
    assert type(lean(x).grad_fn).__name__ == "ProjectBackward"


@needs_kernel
def test_the_kernel_is_tried_as_it_is_whatever_is_cast_around_it() -> None:
    projections._has_kernel.cache_clear()
    with torch.autocast("cpu", torch.float16):
        assert projections._has_kernel()


@pytest.mark.parametrize("reason", ["its type", "it is trained", "autocast", "no kernel"])
def test_what_is_not_served_is_pytorchs(monkeypatch, reason) -> None:
    monkeypatch.setattr(projections, "LARGE", 0)
    plain, lean = make_pair(torch.float32 if reason == "its type" else torch.bfloat16)
    if reason == "it is trained":
        lean.requires_grad_()
    if reason == "no kernel":
        monkeypatch.setattr(projections, "_has_kernel", lambda: False)
    x = draw(7, INPUTS, dtype=plain.weight.dtype).requires_grad_()
    with torch.autocast("cpu", torch.float16, enabled=reason == "autocast"):
        value, expected = lean(x), plain(x)
    assert type(value.grad_fn).__name__ != "ProjectBackward"
    assert value.dtype == expected.dtype and torch.equal(value, expected)
    value.sum().backward()
    assert (lean.weight.grad is not None) == (reason == "it is trained")


@pytest.mark.parametrize("settings", [LoraSettings(), Ia3Settings()])
def test_layers_with_a_bias_are_refined_and_merged_models_are_plain(make_model, settings) -> None:
    model = attach_adapter(make_model("gpt_neox"), settings)
    biased = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and getattr(module, "bias", None) is not None
    ]
    assert biased and all(isinstance(module, LeanLinear) for module in biased)
    merged = merge_adapter(model)
    linears = [module for module in merged.modules() if isinstance(module, nn.Linear)]
    assert linears and {type(module) for module in linears} == {nn.Linear}


def test_refining_twice_is_refining_once() -> None:
    plain, lean = make_pair()
    holder = nn.ModuleList([lean])
    refine_projections(holder)
    release_projections(holder)
    assert type(lean) is type(plain) is nn.Linear
