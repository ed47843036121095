"""Merging: every mergeable method on every family says what its adapter said, rounded once at most."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from koat.adapters.attach import attach_adapter, restore_adapter, save_adapter
from koat.adapters.merge import check_mergeable, merge_adapter, round_weights
from koat.adapters.methods import Ia3Settings, LoraSettings
from koat.core.config import Section
from koat.core.errors import AdapterError
from tests.family_models import FAMILIES, make_family

METHODS: dict[str, Section] = {
    "ia3-paper": Ia3Settings(targets="paper"),
    "ia3-attention": Ia3Settings(targets="attention"),
    "ia3-all-linear": Ia3Settings(targets="all-linear"),
    "ia3-whole": Ia3Settings(targets="attention", reach="whole"),
    "lora": LoraSettings(r=4),
    "lora-rslora": LoraSettings(r=4, rslora=True),
    "lora-dora": LoraSettings(r=4, dora=True),
}
REFUSED = {("qwen3_moe-some-dense", "lora-dora")}
"""PEFT has no DoRA for experts in 3-D parameters: there is no adapter to merge."""
IDS = torch.randint(3, 300, (2, 13), generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


@torch.no_grad()
def ask(model) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits.float()


def attach(family: str, settings: Section, randomise: Callable[..., None]):
    model = attach_adapter(make_family(family), settings).eval()
    randomise(model, spread=0.2)
    return model


def gap(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_merging_moves_no_logit_and_rounds_once(family: str, randomise) -> None:
    """float32: 1e-4 at most. bfloat16: at most twice what rounding the float32 merge, done here anew, explains."""
    for name, settings in METHODS.items():
        if (family, name) in REFUSED:
            with pytest.raises(AdapterError, match="use_dora"):
                attach(family, settings, randomise)
            continue
        model = attach(family, settings, randomise)
        expected = ask(model)
        assert gap(expected, ask(make_family(family))) > 0.01, name
        merged = merge_adapter(model)
        exact = ask(merged)
        assert gap(exact, expected) <= 1e-4, name
        plain = {key: value for key, value in merged.state_dict().items() if "base_layer" not in key}
        assert plain.keys() == make_family(family).state_dict().keys(), name

        rounded = make_family(family)
        rounded.load_state_dict({key: value.bfloat16().float() for key, value in plain.items()})
        explained = gap(ask(rounded), exact)
        round_weights(merged, torch.bfloat16)
        assert 0 < gap(ask(merged), expected) <= 2 * explained + 1e-5, name
        assert all(torch.equal(value, value.bfloat16().float()) for value in merged.state_dict().values())


def test_rounding_spares_what_is_not_saved(make_model) -> None:
    """The rotary frequencies are made anew when a model is opened."""
    model = make_model("llama")
    before = model.model.rotary_emb.inv_freq.clone()
    round_weights(model, torch.bfloat16)
    assert torch.equal(model.model.rotary_emb.inv_freq, before)
    assert not torch.equal(before, before.bfloat16().float())


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "qwen2", "falcon-grouped"])
def test_transformers_opens_what_was_merged(family: str, randomise, tmp_path: Path) -> None:
    model = attach(family, Ia3Settings(targets="all-linear"), randomise)
    expected = ask(model)
    merge_adapter(model).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert gap(ask(again), expected) <= 1e-4


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "falcon-grouped"])
def test_held_queries_are_one_in_the_merged_weight(family: str, randomise) -> None:
    """Whatever stands in the entries: an optimizer, or another program, may have written there."""
    base, model = make_family(family), attach(family, Ia3Settings(targets="paper"), randomise)
    held = {
        name.removeprefix("base_model.model."): module.held.clone()
        for name, module in model.named_modules()
        if getattr(module, "held", None) is not None
    }
    merged = merge_adapter(model)
    assert len(held) == 2
    for name, mark in held.items():
        before, after = (each.get_submodule(name).weight for each in (base, merged))
        if family == "gpt2":
            before, after = before.t(), after.t()
        assert torch.equal(before[mark], after[mark])
        assert not torch.equal(before[~mark], after[~mark])


def test_rounded_weights_are_not_merged_into(make_model, randomise) -> None:
    model = attach_adapter(make_model("llama").bfloat16(), Ia3Settings())
    with pytest.raises(AdapterError, match="dtype=float32"):
        merge_adapter(model)


def test_a_prefix_cannot_be_merged(make_model, tmp_path: Path) -> None:
    model = get_peft_model(make_model("llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    stored = {key: getattr(value, "value", value) for key, value in model.peft_config["default"].to_dict().items()}
    with pytest.raises(AdapterError, match=r"PREFIX_TUNING.*cannot be merged"):
        check_mergeable(stored, "here")
    with pytest.raises(AdapterError, match="koat merges IA3 and LoRA"):
        check_mergeable({"peft_type": "LOHA"}, "here")
    check_mergeable({"peft_type": "LORA", "bias": "none"}, "here")
    for more in ({"bias": "all"}, {"modules_to_save": ["lm_head"]}):
        with pytest.raises(AdapterError, match="merge_and_unload"):
            check_mergeable({"peft_type": "LORA", **more}, "here")


def test_a_restored_adapter_merges_to_the_same_weights(randomise, tmp_path: Path) -> None:
    model = attach("llama", LoraSettings(r=4), randomise)
    save_adapter(model, tmp_path)
    again = merge_adapter(restore_adapter(make_family("llama"), tmp_path))
    for name, weight in merge_adapter(model).state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)
