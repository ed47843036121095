"""A GPU's kernels for IA3 against autograd of the formula in float64: on a GPU, else as Triton interprets them."""

from __future__ import annotations

import functools
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from koat.adapters import fused, lean, norms, rotary
from tests.triton_kernels import load_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "identity": "linear"}
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    """Return the module of kernels; without a GPU Triton interprets them (conftest.py)."""
    return load_kernels("koat.adapters.fused_kernels")


@pytest.fixture(scope="module")
def frozen(kernels) -> ModuleType:
    """Return the kernels of what stays frozen."""
    return load_kernels("koat.adapters.frozen_kernels")


@pytest.fixture
def served(kernels, monkeypatch) -> ModuleType:
    """Let `koat.adapters.lean` take the kernels, wherever activations lie."""
    monkeypatch.setattr(lean, "find_fused", lambda activation: kernels)
    return kernels


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def differentiate(function, inputs, upstream):
    """Return the value and the gradients of every input."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    value = function(*leaves)
    return value.detach(), torch.autograd.grad(value, leaves, upstream.to(value.dtype))


def measure_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("kind", NAMES)
def test_values_and_gradients_are_the_formulas(kernels, kind, gated, dtype) -> None:
    # Neither rows nor columns fill a program, and there are several of them either way.
    shape = (3, 43, 300)
    inputs = [draw(*shape, seed=0, dtype=dtype), draw(*shape, seed=1, dtype=dtype), 1 + 0.3 * draw(300, seed=2)]
    inputs = inputs if gated else [inputs[0], inputs[2]]
    upstream, activate = draw(*shape, seed=3, dtype=dtype), ACT2FN[NAMES[kind]]

    def compute(gate, *others):
        return kernels.RescaleActivated.apply(gate, others[0] if gated else None, others[-1], kind)

    def formula(gate, *others):
        return activate(gate) * (others[0] if gated else 1) * others[-1]

    value, gradients = differentiate(compute, inputs, upstream)
    expected, exact = differentiate(formula, [tensor.double() for tensor in inputs], upstream)
    assert value.dtype == dtype and gradients[-1].dtype == torch.float32
    assert measure_error(value, expected) < TOLERANCES[dtype]
    for found, wanted in zip(gradients[:-1], exact[:-1], strict=True):
        assert measure_error(found, wanted) < TOLERANCES[dtype]
    # Whatever the activations' type, a vector's gradient is summed in float32.
    assert measure_error(gradients[-1], exact[-1]) < 2e-6


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("width", "offset"), [(40, 0.0), (512, 1.0), (2500, 0.0)])
def test_a_norms_gradient_is_the_formulas(frozen, width, offset, dtype) -> None:
    # Rows do not fill the last program: one has 32, 4 and 1 of them.
    x, upstream = draw(7, 5, width, seed=0, dtype=dtype), draw(7, 5, width, seed=1, dtype=dtype)
    weight = 1 - offset + 0.3 * draw(width, seed=2, dtype=dtype)
    found = frozen.pull_back_norm(upstream, x, weight, offset, 1e-3)
    wide = x.double().requires_grad_()
    normed = wide * (wide.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * (weight.double() + offset)
    (expected,) = torch.autograd.grad(normed, wide, upstream.double())
    assert found.dtype == dtype
    assert measure_error(found, expected) < TOLERANCES[dtype]


def test_norms_take_the_kernel(frozen, monkeypatch) -> None:
    monkeypatch.setattr(norms, "find_frozen", lambda activation: frozen)
    model = torch.nn.Sequential(LlamaRMSNorm(40).requires_grad_(False)).to(DEVICE)
    x, upstream = draw(2, 7, 40, seed=0), draw(2, 7, 40, seed=1)
    (expected,) = differentiate(model, [x], upstream)[1]
    norms.refine_norms(model)
    (found,) = differentiate(model, [x], upstream)[1]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("form", ["own angles", "shared angles", "part of a head", "cut out of one projection"])
def test_heads_are_turned_as_pytorch_turns_them(frozen, form, back, dtype) -> None:
    rows, heads, length, width = 2, 3, 37, 24  # neither tokens nor numbers fill a program
    turned = 12 if form == "part of a head" else width
    angles = [draw(1 if form == "shared angles" else rows, length, turned, seed=seed, dtype=dtype) for seed in (1, 2)]
    whole = draw(rows, length, heads, 3 * width if form == "cut out of one projection" else width, seed=0, dtype=dtype)
    given = whole[..., width : 2 * width] if form == "cut out of one projection" else whole
    found = frozen.turn(given.transpose(1, 2), *angles, back)
    (expected,) = rotary.turn([given.transpose(1, 2).cpu()], *(each.cpu() for each in angles), back)
    assert found.dtype == dtype and found.shape == expected.shape
    if dtype == torch.float32:  # a product and a sum may be one operation
        torch.testing.assert_close(found.cpu(), expected)
    elif dtype == torch.bfloat16 and DEVICE == "cpu":  # Triton's interpreter cuts bfloat16 off where a GPU rounds
        torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-6)
    else:
        assert torch.equal(found.cpu(), expected)


def test_numbers_far_from_zero_stay_finite(kernels) -> None:
    gate = torch.tensor([[-1e4, -90.0, 0.0, 90.0, 1e4]], device=DEVICE).repeat(4, 1)
    for kind in ("silu", "gelu", "gelu_tanh", "relu"):
        for_gate, _, for_vector = kernels.pull_back(torch.ones_like(gate), gate, torch.ones(5, device=DEVICE), kind)
        assert for_gate.isfinite().all() and for_vector.isfinite().all()
        assert for_gate[0, 0] == 0 and for_gate[0, 4] == 1, kind


@pytest.mark.parametrize(("least", "most"), [(-30.0, 30.0), (-3.0, 3.0), (-1.0, 0.0)])
def test_gelu_and_its_slope_are_exact_but_for_rounding(kernels, least, most) -> None:
    gate = torch.linspace(least, most, 64 * 256, device=DEVICE).view(64, 256)
    ones = torch.ones(256, device=DEVICE)
    value, (slope, _, _) = (
        kernels.rescale(gate, ones, "gelu"),
        kernels.pull_back(torch.ones_like(gate), gate, ones, "gelu"),
    )
    expected, (exact,) = differentiate(torch.nn.functional.gelu, [gate.double()], torch.ones_like(gate))
    for found, wanted in ((value, expected), (slope, exact)):
        assert measure_error(found, wanted) < 5e-7
        assert float(((found.double() - wanted).abs() / wanted.abs().clamp(min=1)).max()) < 5e-7


def test_gelu_keeps_its_tail(kernels) -> None:
    """One and an error function near minus one leave no digit of it."""
    gate = torch.linspace(-6, -4, 256, device=DEVICE)[None]
    found = kernels.rescale(gate, torch.ones(256, device=DEVICE), "gelu").double()
    torch.testing.assert_close(found, torch.nn.functional.gelu(gate.double()), rtol=0.01, atol=0)


@pytest.mark.parametrize("form", ["keeps input", "keeps output", "held"])
def test_rescaling_takes_the_kernels(served, form) -> None:
    held = torch.arange(40, device=DEVICE) % 3 == 0 if form == "held" else None
    activation, vector = draw(2, 1075, 40, seed=0), 1 + 0.3 * draw(40, 1, seed=1)
    vector[:4, 0] = torch.tensor([0.0, -0.0, 1e-30, -1e-3])
    upstream = draw(2, 1075, 40, seed=2)

    def compute(activation, vector):
        if form == "keeps input":
            return lean.rescale(activation, vector)
        return lean.rescale_output(activation, vector, held)

    def formula(activation, vector):
        return activation * (vector if held is None else vector.masked_fill(held[:, None], 1.0)).flatten()

    value, gradients = differentiate(compute, (activation, vector), upstream)
    expected, exact = differentiate(formula, (activation.double(), vector.double()), upstream)
    assert measure_error(value, expected) < 2e-6
    for found, wanted in zip(gradients, exact, strict=True):
        assert measure_error(found, wanted) < 2e-6
    if held is not None:
        assert not gradients[1][held].any() and gradients[1][~held].all()


@pytest.mark.parametrize("gated", [True, False])
def test_blocks_keep_what_the_activation_took_and_no_product(served, gated) -> None:
    gate, up, vector = draw(2, 9, 40, seed=0), draw(2, 9, 40, seed=1), draw(40, seed=2)
    leaves = [tensor.requires_grad_() for tensor in (gate, up, vector)]
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        lean.rescale_activated(gate, up if gated else None, vector, torch.nn.SiLU())
    assert set(kept) == {tensor.data_ptr() for tensor in (leaves if gated else (gate, vector))}


@pytest.mark.parametrize("form", ["keeps input", "keeps output"])
def test_nothing_is_kept_for_a_vector_that_is_not_trained(served, form) -> None:
    activation, vector = draw(2, 9, 40, seed=0).requires_grad_(), 1 + 0.3 * draw(40, 1, seed=1)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        scaled = (lean.rescale if form == "keeps input" else lean.rescale_output)(activation, vector)
    assert set(kept) == {40}
    scaled.sum().backward()
    torch.testing.assert_close(activation.grad, vector.flatten().expand(2, 9, 40))


@pytest.mark.parametrize(("wrong", "said"), [(-1.0, "2"), (float("nan"), "inf")])
@pytest.mark.parametrize("spoilt", [0, 2])
def test_kernels_are_tried_before_they_serve(kernels, frozen, monkeypatch, caplog, spoilt, wrong, said) -> None:
    device = torch.device(DEVICE)
    for dtype in TOLERANCES:
        assert fused.measure_kernels(kernels, frozen, device, dtype) < fused.TOLERANCE / 3
    fused._load_kernels.cache_clear()
    right = kernels.pull_back

    def spoil(*given):
        return tuple(wrong * each if number == spoilt else each for number, each in enumerate(right(*given)))

    monkeypatch.setattr(kernels, "pull_back", spoil)
    assert fused._load_kernels(device, torch.float32) == (None, None)
    assert "those compiled here are off by " + said in caplog.text
    fused._load_kernels.cache_clear()
    monkeypatch.undo()
    assert fused._load_kernels(device, torch.float32) == (kernels, frozen)


def compute_by_formula(spoilt: int = -1) -> SimpleNamespace:
    """Return functions in the kernels' place that compute their formulas, one of the results without a number."""

    def spoil(number: int, found: torch.Tensor) -> torch.Tensor:
        return found.fill_(float("nan")) if number == spoilt else found

    def compute(gate, vector, kind, up=None):
        return ACT2FN[NAMES[kind]](gate) * (1 if up is None else up) * vector

    def rescale(gate, vector, kind, up=None):
        return spoil(0 if kind == "silu" else 7, compute(gate, vector, kind, up))

    def pull_back(gradient, gate, vector, kind, up=None):
        given = (gate, vector) if up is None else (gate, up, vector)
        with torch.enable_grad():
            found = differentiate(
                lambda gate, *rest: compute(gate, rest[-1], kind, None if up is None else rest[0]), given, gradient
            )[1]
        return tuple(spoil((1 if up is not None else 8) + number, each) for number, each in enumerate(found))

    def pull_back_norm(gradient, x, weight, offset, eps):
        normed = lambda x: x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight  # noqa: E731
        with torch.enable_grad():
            return spoil(4, differentiate(normed, (x,), gradient)[1][0])

    def turn(heads, cos, sin, back=False):
        return spoil(6 if back else 5, next(rotary.turn([heads], cos, sin, back)))

    return SimpleNamespace(rescale=rescale, pull_back=pull_back, pull_back_norm=pull_back_norm, turn=turn)


@pytest.mark.parametrize("spoilt", range(10))
def test_what_is_no_number_is_no_small_difference(spoilt) -> None:
    device = torch.device(DEVICE)
    right, wrong = compute_by_formula(), compute_by_formula(spoilt)
    assert fused.measure_kernels(right, right, device, torch.float32) < 1e-5
    assert fused.measure_kernels(wrong, wrong, device, torch.float32) == float("inf")


def test_kernels_may_be_tried_within_a_checkpointed_layer(monkeypatch) -> None:
    """A checkpoint takes note of what is kept while it runs; what the trial keeps is none of it."""
    formulas = compute_by_formula()
    monkeypatch.setattr(norms, "find_frozen", functools.cache(lambda x: try_kernels(formulas)))
    norm = torch.nn.Sequential(LlamaRMSNorm(40).requires_grad_(False))
    norms.refine_norms(norm)
    x = draw(2, 7, 40, seed=0).cpu().requires_grad_()
    checkpoint(norm, x, use_reentrant=False).square().sum().backward()
    (expected,) = torch.autograd.grad(LlamaRMSNorm(40)(x).square().sum(), x)
    torch.testing.assert_close(x.grad, expected)


def test_kernels_may_be_tried_in_inference_mode() -> None:
    formulas = compute_by_formula()
    with torch.inference_mode():
        assert fused.measure_kernels(formulas, formulas, torch.device("cpu"), torch.float32) < 1e-5


def try_kernels(formulas: SimpleNamespace) -> None:
    """Try kernels as a GPU does on the first call, and find none."""
    assert fused.measure_kernels(formulas, formulas, torch.device("cpu"), torch.float32) < 1e-5


def test_an_activation_function_without_a_kernel_is_computed_otherwise(served) -> None:
    gate, vector = draw(2, 9, 40, seed=0), draw(40, seed=2)
    activate = ACT2FN["relu2"]
    value, gradients = differentiate(
        lambda gate, vector: lean.rescale_activated(gate, None, vector, activate), (gate, vector), gate
    )
    expected, exact = differentiate(lambda gate, vector: activate(gate) * vector, (gate, vector), gate)
    torch.testing.assert_close([value, *gradients], [expected, *exact])


def test_a_processor_and_a_wide_type_have_pytorchs_own_kernels() -> None:
    assert fused.find_fused(torch.ones(2, 3)) is None
    assert fused.find_fused(torch.ones(2, 3, device=DEVICE, dtype=torch.float64)) is None
