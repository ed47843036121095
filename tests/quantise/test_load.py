"""Loading a quantised base: what is quantised, in which type, and what is refused."""

from __future__ import annotations

import sys

import pytest
import torch

from koat.core.errors import ModelError
from koat.core.settings import ModelSettings
from koat.model import load_model, pick_dtype
from koat.quantise import load as loading
from koat.quantise.check import check_quantised_layers
from koat.quantise.weights import list_quantised, read_linear_shapes
from tests.quantised_base import load_quantised, write_wide

QUANTISATIONS = ["8bit", "nf4", "nf4-double"]


@pytest.mark.parametrize("quantisation", QUANTISATIONS)
def test_without_bitsandbytes_it_says_what_to_install(make_model, tmp_path, monkeypatch, quantisation) -> None:
    path = write_wide(tmp_path, make_model, "llama")
    (path / "model.safetensors").write_bytes(b"broken")  # no weight is read before
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match=rf"model.quantisation={quantisation} .*pip install 'koat\[quant\]'"):
        load_model(ModelSettings(base=str(path), quantisation=quantisation))


def test_quantised_models_compute_in_bfloat16_unless_told() -> None:
    cpu = torch.device("cpu")
    assert pick_dtype("auto", cpu, "nf4") == pick_dtype("auto", cpu, "8bit") == torch.bfloat16
    assert pick_dtype("float32", cpu, "nf4") == torch.float32
    assert pick_dtype("auto", cpu) == torch.float32


@pytest.mark.parametrize("quantisation", QUANTISATIONS)
def test_the_shipped_model_keeps_its_tied_head(quantisation) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")
    model = load_quantised("nano", quantisation, "auto")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is embedding.weight
    assert head.weight.dtype == torch.bfloat16
    assert not any(weight.requires_grad for weight in model.parameters())
    assert check_quantised_layers(model) is not None
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = load_quantised("nano", "none")(input_ids=ids).logits.log_softmax(-1)
        found = model(input_ids=ids).logits.float().log_softmax(-1)
    drift = float((found.exp() * (found - expected)).sum(-1).mean())
    assert 0 < drift < 0.1, f"the next token's distribution is {drift:.3f} nats away"


def test_layers_that_would_come_out_wrong_stay_as_they_are(make_model, tmp_path, monkeypatch, caplog) -> None:
    """An intermediate size of 96 is no multiple of a block: one kernel of bitsandbytes is wrong by a quarter."""
    pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(loading, "blocks_cross_rows", lambda: False)
    found = load_quantised(tmp_path, "nf4")
    quantised = set(list_quantised(found))
    assert set(read_linear_shapes(model)) - quantised == {f"model.layers.{depth}.mlp.down_proj" for depth in range(3)}
    assert torch.equal(found.model.layers[1].mlp.down_proj.weight, model.model.layers[1].mlp.down_proj.weight)
    assert type(found.lm_head).__name__ == "Linear"
    assert "3 of 21 linear layers stay unquantised" in caplog.text
    assert set(list_quantised(load_quantised(tmp_path, "8bit"))) == set(read_linear_shapes(model))


def test_a_model_of_which_nothing_can_be_quantised_is_refused(make_model, tmp_path, monkeypatch) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")
    make_model("gpt_neox", hidden_size=48, intermediate_size=96).save_pretrained(tmp_path)
    monkeypatch.setattr(loading, "blocks_cross_rows", lambda: False)
    with pytest.raises(ModelError, match=r"no layer of this model can be quantised here.*8bit or none"):
        load_quantised(tmp_path, "nf4-double")
