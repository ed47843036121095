"""The start-up check: it passes what works, and finds every kind of wrong kernel."""

from __future__ import annotations

import pytest
import torch

from koat.core.errors import ModelError
from koat.quantise.check import check_quantised_layers, choose_layers
from koat.quantise.weights import list_quantised
from tests.quantised_base import load_quantised, write_wide

pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")
QUANTISATIONS = ["8bit", "nf4", "nf4-double"]


@pytest.fixture(scope="module")
def load(make_model, tmp_path_factory):
    """`load(family, quantisation, dtype)`: a tiny quantised model."""
    folder = tmp_path_factory.mktemp("bases")
    return lambda family, *how: load_quantised(write_wide(folder, make_model, family), *how)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("quantisation", QUANTISATIONS)
@pytest.mark.parametrize("family", ["gpt_neox", "llama", "qwen2", "gpt2"])
def test_layers_that_work_pass(load, family, quantisation, dtype) -> None:
    model = load(family, quantisation, dtype)
    check = check_quantised_layers(model)
    assert check is not None
    assert 0 <= check.difference <= check.allowed < 0.1
    roles = {name.split(".", 3)[-1] for name in list_quantised(model)}
    assert {name.split(".", 3)[-1] for name in check.layers} == roles
    kernels = {"training": "MatMul8bitFp", "evaluation": "MatMul8bitLt"}
    assert check.kernels == (kernels if quantisation == "8bit" else dict.fromkeys(kernels, "MatMul4Bit"))
    assert check.library.startswith("libbitsandbytes")
    assert check.versions.keys() == {"bitsandbytes", "torch", "transformers"}
    if dtype == "float32" and quantisation != "8bit":
        assert check.allowed < 1e-5


def test_a_model_that_is_not_quantised_has_nothing_to_check(make_model) -> None:
    assert check_quantised_layers(make_model("llama")) is None


def test_it_leaves_the_model_as_it_was(load) -> None:
    model = load("gpt_neox", "8bit", "float32")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        check_quantised_layers(model)
        assert torch.equal(model(input_ids=ids).logits, before)
    assert not any(module.training for module in model.modules())


def scale(run, x):
    return run(x) * 1.06


def forget_gradient(run, x):
    return run(x).detach() + 0 * x.sum()


def lose_outliers(run, x):
    return run(x.masked_fill(x.abs() >= 6, 0.0))


def fail_when_training(run, x):
    return run(x) + (0.1 * run(x).detach() if x.requires_grad else 0)


@pytest.mark.parametrize("fault", [scale, forget_gradient, lose_outliers, fail_when_training])
@pytest.mark.parametrize("quantisation", QUANTISATIONS)
def test_a_wrong_layer_is_named_with_what_is_wrong(load, quantisation, fault) -> None:
    model = load("llama", quantisation, "bfloat16")
    name = next(name for name in choose_layers(list(list_quantised(model))) if name.endswith("v_proj"))
    layer = model.get_submodule(name)
    run = layer.forward
    layer.forward = lambda x: fault(run, x)
    with pytest.raises(ModelError) as caught:
        check_quantised_layers(model)
    text = str(caught.value)
    assert name in text and "libbitsandbytes" in text and "model.quantisation=none" in text
    assert ("gradient" if fault is forget_gradient else "output") in text


def test_a_kernel_that_changes_after_the_first_pass_is_found(load) -> None:
    """bitsandbytes repacks 4-bit weights at the first pass without gradients, and loses the backward pass."""
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("this processor has no AVX512-BF16, so bitsandbytes does not repack")
    model = load("llama", "nf4", "float32")
    for layer in list_quantised(model).values():
        assert layer.support_avx512bf16_for_cpu is False
        layer.support_avx512bf16_for_cpu = True
    with pytest.raises(ModelError, match=r"in evaluation without gradients|gradient"):
        check_quantised_layers(model)


def test_one_layer_of_each_name_from_all_depths() -> None:
    names = [f"model.layers.{depth}.{role}" for depth in range(8) for role in ("q", "k", "v", "o")]
    assert choose_layers(names) == [
        f"model.layers.{depth}.{role}" for depth, role in zip((0, 2, 4, 6), "qkvo", strict=True)
    ]
    assert choose_layers([]) == []
