"""LoRA: PEFT's layer in, PEFT's layer out, on the layers that were asked for."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer

from koat.adapters.attach import attach_adapter, count_trainable, restore_adapter, save_adapter
from koat.adapters.methods import LoraSettings

FAMILIES = ["gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gpt2"]
ALL = {
    "gpt_neox": ["query_key_value", "attention.dense", "dense_h_to_4h", "dense_4h_to_h"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}
SEPARATE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.randint(3, 300, (2, 17), generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


def list_weights(model) -> dict[str, torch.nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if "lora_" in name}


def run(model):
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=IDS).logits
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits.log_softmax(-1) * weight).sum().backward()
    return logits.detach(), {name: value.grad.clone() for name, value in list_weights(model).items()}


def assert_near(found, expected) -> None:
    assert expected.norm() > 0
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def wrap_with_peft(model, **others):
    names = ALL.get(model.config.model_type, SEPARATE)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=names, r=8, lora_alpha=16, **others)
    return get_peft_model(model, config).eval()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_equals_pefts_lora(make_model, randomise, family, rslora) -> None:
    base = make_model(family)
    ours = attach_adapter(copy.deepcopy(base), LoraSettings(rslora=rslora)).eval()
    theirs = wrap_with_peft(copy.deepcopy(base), use_rslora=rslora)
    randomise(theirs, spread=0.1)
    assert list_weights(ours).keys() == list_weights(theirs).keys()
    for name, weight in list_weights(theirs).items():
        list_weights(ours)[name].data.copy_(weight.data)
    expected, expected_gradients = run(theirs)
    found, gradients = run(ours)
    assert_near(found, expected)
    for name in expected_gradients:
        assert_near(gradients[name], expected_gradients[name])
    with torch.no_grad():
        assert (expected - base(input_ids=IDS).logits).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_files_load_in_both_directions(make_model, randomise, tmp_path, family) -> None:
    base = make_model(family)
    ours = attach_adapter(copy.deepcopy(base), LoraSettings(r=3, alpha=7.0)).eval()
    randomise(ours)
    save_adapter(ours, tmp_path)
    with torch.no_grad():
        logits = ours(input_ids=IDS).logits
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
        assert_near(theirs(input_ids=IDS).logits, logits)
        theirs.save_pretrained(str(tmp_path / "again"))
        back = restore_adapter(copy.deepcopy(base), tmp_path / "again").eval()
        assert torch.equal(back(input_ids=IDS).logits, logits)
        assert_near(back.merge_and_unload()(input_ids=IDS).logits, logits)


@pytest.mark.parametrize(
    "others",
    [{"lora_bias": True}, {"use_dora": True}, {"lora_dropout": 0.5}, {"target_modules": ["q_proj", "lm_head"]}],
)
def test_what_else_peft_trains_loads(make_model, randomise, tmp_path, others) -> None:
    """Kinds of LoRA that koat does not make itself come out right all the same."""
    base = make_model("llama")
    names = others.pop("target_modules", ["q_proj", "down_proj", "model.layers.1.self_attn.v_proj"])
    theirs = get_peft_model(
        copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", target_modules=names, r=4, **others)
    ).eval()
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path))
    ours = restore_adapter(copy.deepcopy(base), tmp_path).eval()
    with torch.no_grad():
        expected = theirs(input_ids=IDS).logits
        assert_near(ours(input_ids=IDS).logits, expected)
        assert (expected - base(input_ids=IDS).logits).norm() > 0.05 * expected.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_reach_the_layers_they_name(make_model, family) -> None:
    def names(targets) -> set[str]:
        model = attach_adapter(make_model(family), LoraSettings(targets=targets))
        return {name.rsplit(".", 1)[1] for name, module in model.named_modules() if isinstance(module, LoraLayer)}

    if family == "gpt_neox":
        attention, all_linear = (
            {"query_key_value", "dense"},
            {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
        )
        paper = {"query_key_value"}
    elif family == "gpt2":
        attention, all_linear, paper = {"c_attn", "c_proj"}, {"c_attn", "c_proj", "c_fc"}, {"c_attn"}
    else:
        attention, all_linear = {"q_proj", "k_proj", "v_proj", "o_proj"}, set(SEPARATE)
        paper = {"q_proj", "v_proj"}
    assert names("attention") == attention
    assert names("all-linear") == all_linear
    assert names("paper") == names("peft") == paper


def test_attention_targets_leave_gpt2s_feed_forward_alone(make_model) -> None:
    """Both its projections out are called c_proj."""
    model = attach_adapter(make_model("gpt2"), LoraSettings(targets="attention"))
    names = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    assert len(names) == 6
    assert all(".attn." in name for name in names)


def test_a_fresh_adapter_changes_nothing_and_its_seed_decides(make_model) -> None:
    base = make_model("llama")
    state = torch.random.get_rng_state()
    first, again, other = (attach_adapter(copy.deepcopy(base), LoraSettings(), seed).eval() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    with torch.no_grad():
        assert torch.equal(first(input_ids=IDS).logits, base(input_ids=IDS).logits)
    same = [torch.equal(a, b) for a, b in zip(list_weights(first).values(), list_weights(again).values(), strict=True)]
    assert all(same)
    differ = [
        not torch.equal(a, b) for a, b in zip(list_weights(first).values(), list_weights(other).values(), strict=True)
    ]
    assert any(differ)


def test_only_the_adapter_trains(make_model) -> None:
    model = attach_adapter(make_model("llama"), LoraSettings(r=2, targets="paper"))
    trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trainable == set(list_weights(model))
    assert count_trainable(model) == 3 * 2 * ((64 + 64) + (64 + 32))
