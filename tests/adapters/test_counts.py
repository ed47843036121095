"""Trainable parameters that are known from elsewhere, on real configurations without weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig

from koat.adapters.attach import attach_adapter, count_trainable
from koat.adapters.methods import Ia3Settings, LoraSettings
from koat.model import build_empty, count_parameters

MODELS = Path(__file__).resolve().parents[3] / "shared" / "models"
KVQ = ["k_proj", "v_proj", "q_proj", "down_proj"]
KNOWN = [
    ("polyglot-ko-5.8b", Ia3Settings(targets="peft"), 802_816),
    ("polyglot-ko-5.8b", Ia3Settings(targets="paper"), 688_128),
    ("polyglot-ko-5.8b", LoraSettings(r=8, targets=["query_key_value"]), 3_670_016),
    ("polyglot-ko-5.8b", LoraSettings(r=8, targets="peft"), 3_670_016),
    ("llama-2-13b", Ia3Settings(targets="peft"), 962_560),
    ("llama-2-13b", Ia3Settings(targets="paper"), 962_560),
    ("llama-2-13b", Ia3Settings(targets=KVQ, feedforward=["down_proj"]), 1_167_360),
    # From the shapes: 32 layers, keys and values of 8 heads x 128, inner width 14,336.
    ("llama-3-8b", Ia3Settings(targets="paper"), 32 * (2 * 1_024 + 14_336)),
]


@pytest.mark.parametrize(("folder", "settings", "expected"), KNOWN)
def test_trainable_parameters(folder, settings, expected) -> None:
    if not (MODELS / folder / "config.json").is_file():
        pytest.skip(f"the configuration {folder} is not beside the repository")
    model = build_empty(AutoConfig.from_pretrained(str(MODELS / folder)))
    size = count_parameters(model)
    wrapped = attach_adapter(model, settings)
    assert count_trainable(wrapped) == expected
    assert {weight.device.type for weight in wrapped.parameters()} == {"meta"}
    assert 5e9 < size < 14e9


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "gpt2"])
def test_a_model_without_weights_counts_like_one_with(make_model, make_config, family) -> None:
    for settings in (Ia3Settings(), Ia3Settings(targets="all-linear"), LoraSettings(r=3)):
        empty = build_empty(make_config(family))
        assert count_parameters(empty) == sum({id(p): p.numel() for p in make_model(family).parameters()}.values())
        assert count_trainable(attach_adapter(empty, settings)) == count_trainable(
            attach_adapter(make_model(family), settings)
        )
