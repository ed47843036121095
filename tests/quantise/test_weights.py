"""What quantised layers stand for and take, against the weights they were made from."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from koat.core.settings import ModelSettings
from koat.model import build_empty, count_parameters, load_config
from koat.quantise.weights import count_model_bytes, count_weight_bytes, dequantise, list_quantised
from tests.quantised_base import load_quantised, write_wide

bitsandbytes = pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")
ERRORS = {"nf4": 0.11, "nf4-double": 0.11, "8bit": 0.015}
"""Relative error of rounding normal numbers: NF4's mean cell is 0.09 wide, 8 bits are 127 steps to three sigmas."""


def make_layer(inputs: int, outputs: int, quantisation: str):
    """Return (weight, quantised layer)."""
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(inputs))
    if quantisation == "8bit":
        layer = bitsandbytes.nn.Linear8bitLt(inputs, outputs, bias=False, has_fp16_weights=False, threshold=6.0)
        layer.weight = bitsandbytes.nn.Int8Params(weight.clone(), requires_grad=False)
    else:
        layer = bitsandbytes.nn.Linear4bit(inputs, outputs, bias=False, quant_type="nf4")
        nested = quantisation == "nf4-double"
        layer.weight = bitsandbytes.nn.Params4bit(
            weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=nested, module=layer
        )
    return weight, layer.to("cpu")


def list_stored(layer) -> list[torch.Tensor]:
    """Return every tensor that a quantised layer keeps for its weight."""
    weight = layer.weight
    if weight.dtype == torch.int8:
        return [weight.data, weight.SCB]
    state = weight.quant_state
    outer = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
    return [weight.data, state.absmax, state.code, *outer]


@pytest.mark.parametrize("quantisation", ERRORS)
@pytest.mark.parametrize(("inputs", "outputs"), [(128, 96), (96, 50), (320, 33), (65, 7)])
def test_a_weight_comes_back_with_its_rounding_error(inputs: int, outputs: int, quantisation: str) -> None:
    weight, layer = make_layer(inputs, outputs, quantisation)
    found = dequantise(layer)
    assert found.dtype == torch.float32
    error = float((found - weight).norm() / weight.norm())
    assert 1e-3 < error < ERRORS[quantisation]


@pytest.mark.parametrize("quantisation", ["nf4", "nf4-double"])
def test_whole_blocks_come_back_as_the_library_has_them(quantisation: str) -> None:
    _, layer = make_layer(192, 40, quantisation)
    expected = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    torch.testing.assert_close(dequantise(layer), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("quantisation", ERRORS)
@pytest.mark.parametrize(("inputs", "outputs"), [(128, 96), (96, 50), (320, 512), (65, 7)])
def test_bytes_of_a_layer_are_those_it_keeps(inputs: int, outputs: int, quantisation: str) -> None:
    _, layer = make_layer(inputs, outputs, quantisation)
    assert count_weight_bytes(inputs, outputs, quantisation) == sum(kept.nbytes for kept in list_stored(layer))


def test_bits_per_weight_are_the_papers() -> None:
    """QLoRA, section 3: scales cost 0.5 bit an entry, 0.127 when they are quantised."""
    entries = 4096 * 4096
    bits = {kind: 8 * count_weight_bytes(4096, 4096, kind) / entries for kind in ("nf4", "nf4-double")}
    assert bits["nf4"] == pytest.approx(4.5, abs=1e-3)
    assert bits["nf4-double"] == pytest.approx(4.127, abs=1e-3)


@pytest.mark.parametrize("quantisation", ["none", *ERRORS])
@pytest.mark.parametrize("family", ["gpt_neox", "llama", "qwen2", "gpt2"])
def test_bytes_of_a_model_are_known_before_it_is_loaded(make_model, tmp_path, family, quantisation) -> None:
    path = write_wide(tmp_path, make_model, family)
    empty = build_empty(load_config(ModelSettings(base=str(path))))
    model = load_quantised(path, quantisation, "bfloat16")
    layers = list_quantised(model)
    inside = {id(layer.weight) for layer in layers.values()}
    expected = sum(kept.nbytes for layer in layers.values() for kept in list_stored(layer))
    expected += sum(weight.nbytes for weight in model.parameters() if id(weight) not in inside)
    assert count_model_bytes(empty, quantisation, torch.bfloat16) == expected
    assert count_parameters(model) == count_parameters(empty)
    linears = [m for m in empty.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    assert len(layers) == (0 if quantisation == "none" else len(linears) - 1)
    assert not math.isnan(float(model.get_output_embeddings().weight.float().norm()))
