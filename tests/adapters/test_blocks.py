"""IA3 with the frozen layers around it as one function: the same as in parts, against plain autograd."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from koat.adapters import feed_forward, ia3
from koat.adapters.attach import attach_adapter
from koat.adapters.blocks import RescaleBlock, RescaleGatedBlock, RescaleProjection
from koat.adapters.feed_forward import apply_block
from koat.adapters.lean import rescale, rescale_activated, rescale_output
from koat.adapters.methods import Ia3Settings

WIDTH, INNER = 24, 40
IDS = torch.randint(3, 300, (2, 17), generator=torch.Generator().manual_seed(0))


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_layer(inputs: int, outputs: int, bias: bool, seed: int, dtype: torch.dtype = torch.float32) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias)
    layer.weight.data = draw(outputs, inputs, seed=seed) / inputs**0.5
    if bias:
        layer.bias.data = draw(outputs, seed=seed + 100)
    return layer.requires_grad_(False).to(dtype)


def draw_vector(width: int) -> torch.Tensor:
    """Return a vector as PEFT stores it, some of its entries zero or negative."""
    vector = 1 + 0.3 * draw(1, width, seed=9)
    vector[0, :3] = torch.tensor([0.0, -0.5, 1e-3])
    return vector


def differentiate(function: Any, inputs: list[torch.Tensor], wanted: list[bool]) -> list[torch.Tensor]:
    """Return the value and the gradients of the inputs that are wanted."""
    leaves = [tensor.detach().clone().requires_grad_(want) for tensor, want in zip(inputs, wanted, strict=True)]
    value = function(*leaves)
    upstream = draw(*value.shape, seed=7).to(value.dtype)
    asked = [leaf for leaf, want in zip(leaves, wanted, strict=True) if want]
    return [value.detach(), *torch.autograd.grad(value, asked, upstream)]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    assert len(found) == len(expected) > 1
    for mine, right in zip(found, expected, strict=True):
        assert mine.shape == right.shape and right.norm() > 0
        torch.testing.assert_close(mine.double(), right.double(), rtol=tolerance, atol=tolerance)


WANTED = [[True, True], [False, True], [True, False]]
"""Of which of input and vector a gradient is asked: the first layer's input has none."""


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("holds", [True, False])
def test_a_rescaled_projection_has_the_formulas_gradients(holds, bias, wanted) -> None:
    layer, held = make_layer(WIDTH, INNER, bias, 1), torch.arange(INNER) % 3 == 1 if holds else None
    exact = make_layer(WIDTH, INNER, bias, 1).double()

    def formula(x: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        free = vector if held is None else vector.masked_fill(held, 1.0)
        return exact(x.double()) * free.double().flatten()

    inputs = [draw(2, 9, WIDTH), draw_vector(INNER)]
    found = differentiate(lambda x, vector: RescaleProjection.apply(x, vector, held, layer), inputs, wanted)
    expected = differentiate(formula, inputs, wanted)
    if wanted[1] and held is not None:
        assert (found[-1][0][held] == 0).all()
    assert_same(found, expected, 3e-5)


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_a_block_has_the_formulas_gradients(gated, bias, wanted) -> None:
    sizes = [(WIDTH, INNER), (WIDTH, INNER), (INNER, WIDTH)]
    gate, up, inner = (make_layer(*size, bias, seed) for seed, size in enumerate(sizes))
    exact = [make_layer(*size, bias, seed).double() for seed, size in enumerate(sizes)]

    def whole(x: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        if gated:
            return RescaleGatedBlock.apply(x, vector, gate, up, inner, F.silu)
        return RescaleBlock.apply(x, vector, gate, inner, F.silu)

    def formula(x: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        x = x.double()
        return exact[2](F.silu(exact[0](x)) * (exact[1](x) if gated else 1) * vector.double())

    inputs = [draw(2, 9, WIDTH), draw_vector(INNER)]
    assert_same(differentiate(whole, inputs, wanted), differentiate(formula, inputs, wanted), 3e-5)


def test_in_bfloat16_a_projection_is_what_its_parts_are() -> None:
    layer = make_layer(WIDTH, INNER, True, 1, torch.bfloat16)
    inputs = [draw(2, WIDTH, 9, dtype=torch.bfloat16).transpose(1, 2), draw_vector(INNER)]
    whole = differentiate(lambda x, v: RescaleProjection.apply(x, v, None, layer), inputs, [True, True])
    parts = differentiate(lambda x, v: rescale_output(layer(x), v), inputs, [True, True])
    assert len(whole) == 3 and all(torch.equal(mine, right) for mine, right in zip(whole, parts, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["projection", "block", "gated block", "parts"])
def test_no_rows_have_no_gradients(form, dtype) -> None:
    """A micro-batch in which nothing is predicted has them: some kernels end the process on no rows."""
    gate, up = (make_layer(WIDTH, INNER, True, seed, dtype) for seed in (0, 1))
    inner, vector = make_layer(INNER, WIDTH, True, 2, dtype), draw_vector(INNER).requires_grad_()
    x = torch.zeros(2, 0, WIDTH, dtype=dtype, requires_grad=True)
    compute = {
        "projection": lambda: RescaleProjection.apply(x, vector, None, gate),
        "block": lambda: RescaleBlock.apply(x, vector, gate, inner, F.silu),
        "gated block": lambda: RescaleGatedBlock.apply(x, vector, gate, up, inner, F.silu),
        "parts": lambda: inner(
            rescale(rescale_activated(rescale_output(gate(x), vector), up(x), vector, F.silu), vector)
        ),
    }[form]
    compute().sum().backward()
    assert x.grad.shape == x.shape and torch.equal(vector.grad, torch.zeros_like(vector))


@pytest.mark.parametrize("gated", [True, False])
def test_in_bfloat16_a_block_is_what_its_parts_are(monkeypatch, gated) -> None:
    sizes = [(WIDTH, INNER), *([(WIDTH, INNER)] if gated else []), (INNER, WIDTH)]
    *first, inner = (make_layer(*size, True, seed, torch.bfloat16) for seed, size in enumerate(sizes))
    inputs = [draw(2, 9, WIDTH, dtype=torch.bfloat16), draw_vector(INNER)]
    results = []
    for whole in (True, False):
        monkeypatch.setattr(feed_forward, "is_plain", lambda layer, x, whole=whole: whole)
        results.append(differentiate(lambda x, v: apply_block(x, v, first, inner, F.silu), inputs, [True, True]))
    (value, for_x, for_vector), (expected, exact, summed) = results
    assert torch.equal(value, expected) and torch.equal(for_vector, summed)
    # The gradients of a gated block's halves are added up before they are rounded here, after it there.
    torch.testing.assert_close(for_x, exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_models_compute_what_they_do_in_parts(make_model, monkeypatch, family, dtype) -> None:
    results = []
    for whole in (True, False):
        if not whole:
            for module in (feed_forward, ia3):
                monkeypatch.setattr(module, "is_plain", lambda layer, x: False)
        model = attach_adapter(make_model(family).to(dtype), Ia3Settings())
        logits = model(input_ids=IDS).logits
        logits.float().square().mean().backward()
        results.append([logits.detach()] + [p.grad for p in model.parameters() if p.requires_grad])
        names = list_nodes(logits.grad_fn)
        assert any(name.startswith("RescaleProjection") for name in names) == whole
        assert any("Block" in name for name in names) == whole
    if dtype == torch.float32:
        assert_same(*results, tolerance=1e-5)
    else:
        assert torch.equal(results[0][0], results[1][0])


def list_nodes(root: Any) -> set[str]:
    """Return the names of all functions that a gradient passes through."""
    found, waiting = set(), [root]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [each for each, _ in node.next_functions]
    return {type(node).__name__ for node in found}


WAYS = [
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
    "own forward",
    "global",
]


@pytest.mark.parametrize("place", ["query_key_value", "dense_h_to_4h", "dense_4h_to_h"])
@pytest.mark.parametrize("way", WAYS)
def test_a_layer_that_others_look_at_is_called(make_model, place, way) -> None:
    model = attach_adapter(make_model("gpt_neox"), Ia3Settings())
    *_, layer = (  # the first layer's input has no gradient
        getattr(module, "base_layer", module) for name, module in model.named_modules() if name.endswith(f".{place}")
    )
    seen: list[Any] = []
    plain = layer.forward

    def look(*given: Any) -> None:
        seen.append(given)

    expected = attach_adapter(make_model("gpt_neox"), Ia3Settings())(input_ids=IDS).logits
    with contextlib.ExitStack() as stack:
        if way == "own forward":  # as accelerate moves a layer's weights
            layer.forward = lambda x: look(x) or plain(x)
        elif way == "global":
            watch = nn.modules.module.register_module_forward_hook(
                lambda module, *more: look() if module is layer else None
            )
            stack.callback(watch.remove)
        else:
            getattr(layer, way)(look)
        logits = model(input_ids=IDS).logits
        logits.sum().backward()
    assert torch.allclose(logits, expected, atol=1e-6)
    assert len(seen) == 1


def test_autocast_and_other_types_are_computed_in_parts() -> None:
    layer, vector = make_layer(WIDTH, INNER, True, 1), draw_vector(INNER)
    x = draw(3, WIDTH)
    assert ia3.is_plain(layer, x)
    assert not ia3.is_plain(layer, x.bfloat16()) and not ia3.is_plain(layer.half(), x.half())
    with torch.autocast("cpu", torch.bfloat16):
        assert not ia3.is_plain(layer.float(), x)
    assert not ia3.is_plain(make_layer(WIDTH, INNER, True, 1).requires_grad_(), x)
    assert not ia3.is_plain(make_layer(WIDTH, INNER, True, 1).to("meta"), x.to("meta"))
    whole = RescaleProjection.apply(x, vector, None, layer.float())
    torch.testing.assert_close(whole, rescale_output(layer(x), vector), rtol=0, atol=0)
