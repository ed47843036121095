"""Full fine-tuning against plain training of the same model, and its folder opened without koat."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from koat.adapters.attach import (
    attach_adapter,
    count_trainable,
    read_adapter_state,
    restore_adapter,
    save_adapter,
    write_adapter_state,
)
from koat.adapters.merge import merge_adapter
from koat.adapters.methods import FullSettings, check_combination, default_values
from koat.core.errors import AdapterError
from koat.core.settings import ModelSettings, TrainingSettings
from koat.forest.score import cut_sequences, token_logprobs
from koat.forest.verify import verify_layout
from tests.family_models import FAMILIES, make_family

QUICK = ("llama", "gpt_neox", "gpt2", "gemma2", "mixtral", "bloom")
IDS = torch.tensor([[5, 9, 17, 3, 88, 41]])


def list_families() -> list[Any]:
    return [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.soak]) for name in FAMILIES]


def attach(name: str) -> Any:
    return attach_adapter(make_family(name), FullSettings())


@pytest.mark.parametrize("name", list_families())
def test_gradients_are_those_of_one_sequence_at_a_time(name: str, make_sequences: Any, score_singly: Any) -> None:
    sequences = make_sequences("mixed")
    plain = make_family(name).requires_grad_(True)
    singly = zip(score_singly(plain, sequences), sequences, strict=True)
    sum((each * torch.tensor(sequence.supervised)).sum() for each, sequence in singly).backward()
    expected = {path: weight.grad for path, weight in plain.named_parameters()}

    model = attach(name)
    layout, _ = verify_layout(model)
    for batch in cut_sequences(sequences, layout, 100):
        token_logprobs(model, batch, layout).sum().backward()
    found = {path: weight.grad for path, weight in model.get_base_model().named_parameters()}
    assert found.keys() == expected.keys()
    scale = max(float(gradient.norm()) for gradient in expected.values() if gradient is not None)
    for path, gradient in expected.items():
        one, other = (torch.zeros(()) if each is None else each for each in (gradient, found[path]))
        assert torch.allclose(other, one, rtol=1e-4, atol=1e-6 * scale), path


@pytest.mark.parametrize("name", list_families())
def test_the_folder_opens_in_plain_transformers_and_back(name: str, tmp_path: Path, randomise: Any) -> None:
    model = attach(name).eval()
    randomise(model, spread=0.05)
    save_adapter(model, tmp_path)
    assert not list(tmp_path.glob("adapter*")) and not list(tmp_path.glob("koat*"))
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        assert torch.equal(plain(input_ids=IDS).logits, expected)
        restored = restore_adapter(make_family(name), tmp_path).eval()
        assert torch.equal(restored(input_ids=IDS).logits, expected)
        assert torch.equal(merge_adapter(restored)(input_ids=IDS).logits, expected)
    assert count_trainable(restored) == 0
    assert count_trainable(restore_adapter(make_family(name), tmp_path, trainable=True)) == count_trainable(model)


def test_tied_weights_are_trained_and_kept_once() -> None:
    base = make_family("gpt2")
    assert base.lm_head.weight is base.transformer.wte.weight
    model = attach_adapter(copy.deepcopy(base), FullSettings())
    assert count_trainable(model) == sum(weight.numel() for weight in base.parameters())
    state = {name: tensor + 1 for name, tensor in read_adapter_state(model).items()}
    assert "lm_head.weight" not in state
    write_adapter_state(model, state)
    assert torch.equal(model.get_base_model().lm_head.weight, base.lm_head.weight + 1)


def test_a_short_base_is_trained_in_float32() -> None:
    model = attach_adapter(make_family("llama").bfloat16(), FullSettings())
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_what_does_not_fit_is_refused(tmp_path: Path, make_model: Any) -> None:
    save_adapter(attach_adapter(make_model("llama"), FullSettings()), tmp_path)
    with pytest.raises(AdapterError, match="does not fit this base model"):
        restore_adapter(make_model("llama", intermediate_size=128), tmp_path)
    with pytest.raises(AdapterError, match="is not whole"):
        restore_adapter(make_family("mixtral"), tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(AdapterError, match="cannot be loaded"):
        restore_adapter(make_model("llama"), tmp_path)


def test_settings_that_would_round_weights_are_refused() -> None:
    brought = default_values("full")
    assert brought["model"] == {"dtype": "float32"} and brought["training"]["learning_rate"] == 2e-5
    check_combination(FullSettings(), ModelSettings(base="none", dtype="float32"), TrainingSettings())
    for dtype, quantisation in (("float32", "nf4"), ("float32", "8bit"), ("bfloat16", "none"), ("auto", "none")):
        model = ModelSettings(base="none", dtype=dtype, quantisation=quantisation)  # type: ignore[arg-type]
        with pytest.raises(AdapterError, match=r"model\.quantisation=none|training\.precision=bfloat16"):
            check_combination(FullSettings(), model, TrainingSettings())
