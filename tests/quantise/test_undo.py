"""A dequantised model is a plain one that computes what the quantised one computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from koat.model import build_empty
from koat.quantise.undo import dequantise_model, describe_quantised, requantise_weights
from koat.quantise.weights import dequantise, list_quantised
from tests.quantised_base import load_quantised, write_wide

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed; quantised bases need it")
FAMILIES = ["llama", "gpt2", "gpt_neox"]
KINDS = ["nf4", "nf4-double", "8bit"]
IDS = torch.randint(3, 300, (2, 17), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("undo")


@torch.no_grad()
def ask(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


def undo(path: Path, kind: str) -> tuple[Any, Any]:
    """Return a quantised model and the plain one made of another copy of it."""
    model = load_quantised(path, kind)
    layers = dequantise_model(model, build_empty(model.config))
    assert len(layers) > 6
    assert not list_quantised(model)
    return load_quantised(path, kind), model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_dequantised_model_is_saved_and_opened_as_a_plain_one(family, kind, make_model, place, tmp_path) -> None:
    path = write_wide(place, make_model, family)
    quantised, plain = undo(path, kind)
    plain.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(ask(again), ask(plain))
    original = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert {name: type(m) for name, m in again.named_modules()} == {n: type(m) for n, m in original.named_modules()}
    near = float((ask(plain) - ask(quantised)).norm())
    far = float((ask(original) - ask(quantised)).norm())
    # LLM.int8() rounds activations as well: its weights are not what differs most.
    assert near < (1.2 if kind == "8bit" else 1e-4) * far


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_quantising_again_gives_what_bitsandbytes_stores(family, kind, make_model, place) -> None:
    """On weights that were never quantised: the same codes as when such a model is loaded quantised."""
    path = write_wide(place, make_model, family)
    quantised = load_quantised(path, kind)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    requantise_weights(plain, describe_quantised(quantised))
    for name, layer in list_quantised(quantised).items():
        module = plain.get_submodule(name)
        found = module.weight if isinstance(module, torch.nn.Linear) else module.weight.t()
        wanted = dequantise(layer)
        # Nested scales are rounded over blocks of blocks; int8 rounds its codes in float16.
        step = float(wanted.abs().max()) / (127 if kind == "8bit" else 1e4)
        assert float((found - wanted).abs().max()) <= 1.01 * step, name


def test_a_plain_model_is_left_alone(make_model) -> None:
    model = make_model("llama")
    before = {name: id(module) for name, module in model.named_modules()}
    assert dequantise_model(model, make_model("llama")) == []
    assert {name: id(module) for name, module in model.named_modules()} == before
