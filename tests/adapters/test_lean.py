"""Lean IA3: its gradients against plain autograd, and the bytes it keeps against those of the frozen model."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from peft import IA3Config, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP

from benchmarks.kept import measure_layer
from koat.adapters.activations import find_kernels, rebuild
from koat.adapters.attach import attach_adapter
from koat.adapters.feed_forward import LeanFeedForward
from koat.adapters.lean import rescale, rescale_activated, rescale_output
from koat.adapters.methods import Ia3Settings
from koat.adapters.vector_products import multiply

IDS = torch.randint(3, 300, (2, 17), generator=torch.Generator().manual_seed(0))
WIDTH, LENGTH = 40, 64
ACTIVATIONS = ["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2"]
FORMS = {"keeps input": rescale, "keeps output": rescale_output}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def draw_vector() -> torch.Tensor:
    """Return a vector with zeros, negative, tiny and subnormal entries among usual ones."""
    vector = 1 + 0.3 * draw(WIDTH, seed=9)
    vector[:6] = torch.tensor([0.0, -0.0, 1e-3, -1e-3, 1e-30, 1e-42])
    return vector


def differentiate(function, inputs, upstream):
    """Return the value and the gradients of every input."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    value = function(*leaves)
    return value.detach(), torch.autograd.grad(value, leaves, upstream.to(value.dtype))


def assert_near(found, expected, tolerance) -> None:
    assert found.shape == expected.shape and expected.norm() > 0
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------ the functions


@pytest.fixture(params=[8, 150])
def rows(request) -> int:
    """Return a number of rows."""
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", FORMS)
def test_rescaling_has_the_products_gradients(rows, form, dtype) -> None:
    vector = draw_vector()
    inputs, upstream = (draw(2, rows // 2, WIDTH, dtype=dtype), vector), draw(2, rows // 2, WIDTH, seed=1, dtype=dtype)
    value, gradients = differentiate(FORMS[form], inputs, upstream)
    expected, exact = differentiate(torch.mul, [tensor.double() for tensor in inputs], upstream)
    assert value.dtype == dtype and gradients[1].dtype == torch.float32
    assert_near(value, expected, 1e-6)
    assert_near(gradients[0], exact[0], 1e-6)
    assert_near(gradients[1], exact[1], 3e-5)
    assert (gradients[1][:6] != 0).all()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_rebuilt_activations_have_the_formulas_gradients(rows, name, gated) -> None:
    activate = ACT2FN[name]
    shape = (2, rows // 2, WIDTH)
    inputs = [draw(*shape), *([draw(*shape, seed=2)] if gated else []), draw_vector()]
    upstream = draw(*shape, seed=1)

    def ours(gate, *others):
        return rescale_activated(gate, others[0] if gated else None, others[-1], activate)

    def formula(gate, *others):
        return functools.reduce(torch.mul, others, activate(gate))

    value, gradients = differentiate(ours, inputs, upstream)
    expected, exact = differentiate(formula, [tensor.double() for tensor in inputs], upstream)
    assert_near(value, expected, 1e-5)
    for found, wanted in zip(gradients, exact, strict=True):
        assert_near(found, wanted, 3e-5)


@pytest.mark.parametrize("shape", [(1, WIDTH), (3, 1, 5, WIDTH), (64, WIDTH)])
def test_short_numbers_are_multiplied_in_float32_and_rounded_once(shape) -> None:
    activation, vector = draw(*shape, dtype=torch.bfloat16), draw_vector()
    for each in (activation, activation.transpose(0, -2)):
        assert torch.equal(multiply(each, vector), (each.float() * vector).bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert multiply(activation, vector).dtype == torch.bfloat16
        assert multiply(activation.float(), vector).dtype == torch.float32


@pytest.mark.parametrize("form", [*FORMS, "gated", "plain"])
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_bfloat16_gradients_of_vectors_are_float32_sums(form, mean) -> None:
    """As near to the exact sum over the same bfloat16 numbers as rounding each product a few times explains."""
    count, step = 1000, torch.finfo(torch.bfloat16).eps
    left, right = ((mean + draw(count, WIDTH, seed=seed)).bfloat16() for seed in (0, 2))
    upstream, vector = (mean + draw(count, WIDTH, seed=1)).bfloat16(), draw_vector()
    up = [right] if form == "gated" else []
    value, gradients = differentiate(
        FORMS.get(form, lambda gate, *others: rescale_activated(gate, up[0] if up else None, others[-1], F.silu)),
        (left, vector),
        upstream,
    )
    assert value.dtype == gradients[0].dtype == torch.bfloat16 and gradients[1].dtype == torch.float32
    products = upstream.double() * (left.double() if form in FORMS else F.silu(left.double()))
    products = products * (right.double() if up else 1)
    # Independent rounding errors of the factors add up like a random walk; the sums themselves round nothing.
    walk = 3 * step * products.norm(dim=0)
    assert ((gradients[1].double() - products.sum(0)).abs() <= walk).all()


def test_sums_of_many_bfloat16_products_are_exact_to_float32() -> None:
    """Both factors are short numbers, so float32 holds each product exactly."""
    left, right = (1 + draw(5000, WIDTH, seed=0)).bfloat16(), (1 + draw(5000, WIDTH, seed=1)).bfloat16()
    _, gradients = differentiate(rescale, (left, draw_vector()), right)
    exact = (left.double() * right.double()).sum(0)
    assert_near(gradients[1], exact, 2e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_usual_activations_use_their_own_kernels_and_only_where_they_compute_the_same(name) -> None:
    kernels = find_kernels(ACT2FN[name])
    assert (kernels is None) == (name in ("gelu_new", "relu2"))
    gate, upstream = draw(9, WIDTH), draw(9, WIDTH, seed=1)
    found = torch.empty_like(gate)
    pull_back = rebuild(ACT2FN[name], gate, found)
    value = found.clone()
    pull_back(upstream, found)
    expected, (exact,) = differentiate(ACT2FN[name], [gate], upstream)
    assert torch.equal(value, expected) and torch.equal(found, exact)
    assert not found.requires_grad


@pytest.mark.parametrize("form", FORMS)
def test_float16_keeps_gradients_of_entries_at_zero(form) -> None:
    activation, vector = draw(9, WIDTH, dtype=torch.float16), draw_vector()
    upstream = draw(9, WIDTH, seed=1, dtype=torch.float16)
    value, gradients = differentiate(FORMS[form], (activation, vector), upstream)
    assert (value[:, :2] == 0).all()
    expected = (activation.double() * upstream.double()).sum(0)
    assert_near(gradients[1], expected, 5e-3)


# ------------------------------------------------------------------------------------------------ in a model


def attach(model, targets="paper", **others):
    return attach_adapter(model, Ia3Settings(targets=targets, **others))


def list_vectors(model) -> dict[str, torch.Tensor]:
    return {name: vector for name, vector in model.named_parameters() if "ia3_l" in name}


def run(model):
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=IDS, use_cache=False).logits
    (logits.log_softmax(-1) * draw(*logits.shape, seed=3)).sum().backward()
    return logits.detach(), {name: vector.grad for name, vector in list_vectors(model).items()}


def list_lean(model) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, LeanFeedForward)]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt_neox", "gpt2", "gptj"])
def test_known_blocks_are_lean_and_equal_pefts(make_model, randomise, family) -> None:
    """Zeros in the vectors, two adapters active at once, and vectors that were switched off."""
    names = {"gpt_neox": ["mlp.dense_4h_to_h"], "gpt2": ["mlp.c_proj"], "gptj": ["fc_out"]}.get(family, ["down_proj"])
    out = {"gpt_neox": ["query_key_value"], "gpt2": ["attn.c_attn"]}.get(family, ["k_proj", "v_proj"])
    ours = attach(make_model(family), [*names, *out], feedforward=names)
    assert len(list_lean(ours)) == 3
    theirs = get_peft_model(make_model(family), copy.deepcopy(ours.peft_config["default"]))
    for model in (ours, theirs):
        model.add_adapter("second", copy.deepcopy(ours.peft_config["default"]))
        model.base_model.set_adapter(["default", "second"])
        randomise(model)
        for vector in list_vectors(model).values():
            vector.data.view(-1)[:2] = 0
    (logits, gradients), (expected, exact) = run(ours), run(theirs)
    assert_near(logits, expected, 1e-4)
    assert len(exact) == 6 * (len(names) + len(out))
    for name, wanted in exact.items():
        assert (gradients[name] - wanted).norm() <= 1e-5 * wanted.norm()
    with ours.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits)
    # Merged, and with no IA3 layer left, blocks are the model's own again.
    with torch.no_grad():
        ours.base_model.set_adapter("default")
        before = ours(input_ids=IDS).logits
    assert_near(ours.merge_and_unload()(input_ids=IDS).logits.detach(), before, 1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
def test_activation_checkpointing_changes_no_gradient(make_model, randomise, family) -> None:
    model = attach(make_model(family)).train()
    randomise(model)
    expected, exact = run(model)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    logits, gradients = run(model)
    assert torch.equal(logits, expected)
    for name, wanted in exact.items():
        assert wanted.norm() > 0
        assert torch.equal(gradients[name], wanted)


def test_only_the_inner_activation_of_the_first_layer_is_trained(make_model, randomise) -> None:
    """What it rescales has no gradient to pass on: nothing below is trained."""
    ours = attach(make_model("llama"), ["layers.0.mlp.down_proj"], feedforward=["layers.0.mlp.down_proj"])
    config = copy.deepcopy(ours.peft_config["default"])
    theirs = get_peft_model(make_model("llama"), config)
    randomise(ours)
    randomise(theirs)
    ((_, gradients), (_, exact)) = run(ours), run(theirs)
    assert len(list_lean(ours)) == len(exact) == 1
    for name, wanted in exact.items():
        assert (gradients[name] - wanted).norm() <= 1e-5 * wanted.norm()


class Sparse(LlamaMLP):
    """Has a Llama block's parts and computes something else."""

    def forward(self, x):
        return self.down_proj(F.relu(self.act_fn(self.gate_proj(x))) * self.up_proj(x))


class Noisy(LlamaMLP):
    """Differs while training only."""

    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


@pytest.mark.parametrize("kind", [Sparse, Noisy])
def test_blocks_that_only_look_alike_are_left_alone(make_model, randomise, kind) -> None:
    base = make_model("llama")
    for layer in base.model.layers:
        layer.mlp.__class__ = kind
    ours, theirs = attach(copy.deepcopy(base)), copy.deepcopy(base)
    assert not list_lean(ours)
    assert {type(layer.mlp) for layer in ours.get_base_model().model.layers} == {kind}
    assert not any(module.training for module in ours.get_base_model().model.layers[0].mlp.modules())
    theirs = get_peft_model(theirs, copy.deepcopy(ours.peft_config["default"]))
    randomise(ours)
    randomise(theirs)
    (logits, gradients), (expected, exact) = run(ours.eval()), run(theirs.eval())
    assert_near(logits, expected, 1e-4)
    for name, wanted in exact.items():
        assert (gradients[name] - wanted).norm() <= 1e-5 * wanted.norm()


def test_random_numbers_are_as_before_after_attaching(make_model) -> None:
    model = make_model("gpt2", resid_pdrop=0.1)
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    assert len(list_lean(attach(model))) == 3
    assert torch.equal(torch.randn(4), expected)


# ------------------------------------------------------------------------------------------- what it keeps

GATED = {"hidden_size": 128, "intermediate_size": 344, "num_attention_heads": 8}
SHAPES = {
    "llama, 8 key-value heads": ("llama", GATED | {"num_key_value_heads": 8}),
    "llama, 2 key-value heads": ("llama", GATED | {"num_key_value_heads": 2}),
    "qwen3, 2 key-value heads": ("qwen3", GATED | {"num_key_value_heads": 2, "head_dim": 16}),
    "gpt_neox": ("gpt_neox", GATED | {"intermediate_size": 512}),
}
"""Ratios of the real models, small."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", SHAPES)
def test_next_to_nothing_is_kept_beyond_the_frozen_model(make_model, name, dtype) -> None:
    family, shape = SHAPES[name]

    def build(wrap, depth):
        return wrap(make_model(family, **shape, num_hidden_layers=depth).to(dtype))

    def wrap_with_peft(model):
        config = attach(copy.deepcopy(model)).peft_config["default"]
        return get_peft_model(model, IA3Config(**{key: getattr(config, key) for key in KEYS}))

    floor, ours, theirs = (
        measure_layer(functools.partial(build, wrap), LENGTH) for wrap in (lambda model: model, attach, wrap_with_peft)
    )
    assert ours <= (1.10 if family == "gpt_neox" else 1.05) * floor
    assert theirs > 1.2 * floor
    assert ours - floor <= (theirs - floor) / 3
    if family == "llama":
        # For each token the keys more, the gate's activation less, and two norms' float32 inputs less; three vectors
        # for all tokens. A bfloat16 norm keeps its rows' mean squares, a float32 one computes them again.
        keys, scale = 16 * shape["num_key_value_heads"], 4 if dtype == torch.float32 else 0
        norms = 2 * (shape["hidden_size"] * (4 - dtype.itemsize) + scale)
        assert ours - floor == (keys - 344) * dtype.itemsize - norms + (2 * keys + 344) * 4 / LENGTH


KEYS = ("task_type", "target_modules", "feedforward_modules")
