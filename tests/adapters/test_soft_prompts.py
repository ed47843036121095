"""Soft prompts below the trees, against PEFT's own forward pass with one sequence at a time."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from koat.adapters.attach import (
    attach_adapter,
    count_trainable,
    read_adapter_state,
    restore_adapter,
    save_adapter,
    write_adapter_state,
)
from koat.adapters.methods import METHODS, check_combination
from koat.adapters.settings import PrefixSettings, PromptSettings, PTuningSettings
from koat.adapters.soft_prompts import make_prefix_config, make_prompt_config
from koat.adapters.start import start_from
from koat.core.errors import AdapterError, ModelError
from koat.core.settings import ModelSettings, TrainingSettings
from koat.forest.choose import choose_layout
from koat.forest.score import cut_sequences, token_logprobs
from koat.forest.verify import verify_layout
from tests.family_models import FAMILIES, make_family

SETTINGS = {
    "prefix": PrefixSettings(num_virtual_tokens=3),
    "prefix-projected": PrefixSettings(num_virtual_tokens=3, projection_size=16),
    "prompt": PromptSettings(num_virtual_tokens=3),
    "p_tuning": PTuningSettings(num_virtual_tokens=3, encoder_size=16),
}
SOME = ["gpt_neox", "llama", "gpt2", "mistral", "qwen3", "bloom"]
BROKEN_IN_PEFT = {
    ("prefix", "falcon-multi-query"),
    ("prefix-projected", "falcon-multi-query"),
    ("p_tuning", "opt"),
}
"""Prompts of the wrong size: PEFT counts one key head as many, and OPT's embeddings as wide as its layers."""


def attach(name: str, method: str, seed: int = 0) -> PeftModel:
    """Return a tiny model with a soft prompt that is far from where it began."""
    model = attach_adapter(make_family(name), SETTINGS[method], seed)
    generator = torch.Generator().manual_seed(seed)
    state = read_adapter_state(model)
    write_adapter_state(
        model, {key: value + 0.3 * torch.randn(value.shape, generator=generator) for key, value in state.items()}
    )
    return model.eval()


def run_peft(model: PeftModel, sequences) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return log-probabilities and gradients from PEFT's own forward pass, one sequence at a time."""
    logprobs = []
    for sequence in sequences:
        ids = torch.tensor([sequence.token_ids])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -len(sequence) :]
        at = torch.tensor(sequence.supervised).nonzero().squeeze(1)
        logprobs.append(logits.log_softmax(-1)[at - 1, ids[0, at]])
    torch.cat(logprobs).sum().backward()
    return [each.detach() for each in logprobs], take_gradients(model)


def run_forest(model: PeftModel, sequences, layout, budget: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return the same from koat's layout."""
    found: list[list[Tensor]] = [[] for _ in sequences]
    for batch in cut_sequences(sequences, layout, budget):
        values = token_logprobs(model, batch, layout)
        values.sum().backward()
        for value, owner in zip(values.detach(), batch.owner.tolist(), strict=True):
            found[owner].append(value)
    return [torch.stack(each) for each in found], take_gradients(model)


def take_gradients(model: PeftModel) -> dict[str, Tensor]:
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return gradients


def assert_same(found, expected) -> None:
    for left, right in zip(found[0], expected[0], strict=True):
        assert torch.allclose(left, right, rtol=1e-5, atol=2e-5)
    assert found[1].keys() == expected[1].keys() != set()
    for name, gradient in expected[1].items():
        assert float((found[1][name] - gradient).abs().max()) <= 2e-5 * max(1.0, float(gradient.abs().max())), name


@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("name", SOME)
def test_a_forest_on_a_soft_prompt_equals_peft(make_sequences, name, method) -> None:
    check_family(name, method, make_sequences("shared"))


@pytest.mark.soak
@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - set(SOME)))
def test_every_family_stands_on_a_soft_prompt(make_sequences, name, method) -> None:
    if (method, name) in BROKEN_IN_PEFT:
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            run_peft(attach(name, method), make_sequences("shared"))
        return
    check_family(name, method, make_sequences("shared"))


def check_family(name: str, method: str, sequences) -> None:
    model = attach(name, method)
    expected = run_peft(model, sequences)
    layout, found = verify_layout(model)
    assert layout.shares == FAMILIES[name].shares, found.reason
    for budget in (60, 4096):
        assert_same(run_forest(model, sequences, layout, budget), expected)


def build_short_convolutions() -> torch.nn.Module:
    """Return a tiny LFM2, whose cache PEFT fills as if every layer were attention."""
    config = AutoConfig.for_model(
        "lfm2", vocab_size=300, hidden_size=32, block_ff_dim=48, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=2, layer_types=["conv", "full_attention"], pad_token_id=None, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).requires_grad_(False)


@pytest.mark.parametrize(
    ("method", "name", "said"),
    [(*pair, "Sizes of tensors must match") for pair in sorted(BROKEN_IN_PEFT)]
    + [("prefix", "lfm2", "this layer is an Attention layer")],
)
def test_a_base_that_peft_cannot_run_with_a_soft_prompt_is_refused_in_a_sentence(method, name, said) -> None:
    model = attach_adapter(build_short_convolutions(), SETTINGS[method], 0) if name == "lfm2" else attach(name, method)
    with pytest.raises(ModelError, match=f"^This base cannot run with this soft prompt: .*{said}.* Use .*ia3 or lora"):
        choose_layout(model, ModelSettings(base="here"))


@pytest.mark.parametrize("method", SETTINGS)
def test_a_wrong_prompt_is_told_from_the_right_one(make_sequences, method) -> None:
    """The comparison above could not pass by ignoring the prompt."""
    sequences = make_sequences("shared")
    first, second = attach("llama", method, seed=0), attach("llama", method, seed=1)
    left, right = run_peft(first, sequences)[0], run_peft(second, sequences)[0]
    assert max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True)) > 1e-2


@pytest.mark.parametrize("method", SETTINGS)
def test_files_open_in_plain_peft(make_sequences, tmp_path, method) -> None:
    sequences = make_sequences("shared")
    model = attach("llama", method)
    expected = run_peft(model, sequences)[0]
    save_adapter(model, tmp_path)
    opened = PeftModel.from_pretrained(make_family("llama"), str(tmp_path)).eval()
    for found in (opened, restore_adapter(make_family("llama"), tmp_path).eval()):
        with torch.no_grad():
            layout, _ = verify_layout(found)
            values = run_scores(found, sequences, layout)
        assert all(torch.allclose(a, b, atol=2e-5) for a, b in zip(values, expected, strict=True))


def run_scores(model, sequences, layout) -> list[Tensor]:
    found: list[list[Tensor]] = [[] for _ in sequences]
    for batch in cut_sequences(sequences, layout, 4096):
        for value, owner in zip(token_logprobs(model, batch, layout), batch.owner.tolist(), strict=True):
            found[owner].append(value)
    return [torch.stack(each) for each in found]


@pytest.mark.parametrize("make_config", [make_prefix_config, make_prompt_config])
def test_a_prompt_that_peft_trained_opens_in_koat(make_sequences, tmp_path, make_config) -> None:
    sequences = make_sequences("shared")
    settings = SETTINGS["prefix" if make_config is make_prefix_config else "prompt"]
    theirs = get_peft_model(make_family("gpt_neox"), make_config(settings)).eval()
    expected = run_peft(theirs, sequences)[0]
    theirs.save_pretrained(str(tmp_path))
    ours = restore_adapter(make_family("gpt_neox"), tmp_path, trainable=True).eval()
    layout, _ = verify_layout(ours)
    with torch.no_grad():
        assert all(
            torch.allclose(a, b, atol=2e-5) for a, b in zip(run_scores(ours, sequences, layout), expected, strict=True)
        )


def test_a_checkpoint_of_p_tuning_keeps_the_network_and_its_file_the_finished_prompt(tmp_path) -> None:
    model = attach("llama", "p_tuning")
    assert len(read_adapter_state(model)) > 1
    save_adapter(model, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert list(stored) == ["prompt_embeddings"]
    assert torch.equal(stored["prompt_embeddings"], model.get_prompt(1)[0].detach().cpu())


def test_a_checkpoint_of_a_projected_prefix_keeps_the_network_and_its_file_only_what_it_made(tmp_path) -> None:
    model = attach("llama", "prefix-projected")
    assert sum("transform" in name for name in read_adapter_state(model)) == 4
    save_adapter(model, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == {"prompt_embeddings": (3, 2 * 2 * 16)}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["prefix_projection"] is False
    assert model.peft_config["default"].prefix_projection is True


@pytest.mark.parametrize(("made", "goes_on"), [("prefix", "prefix"), ("prompt", "prompt"), ("p_tuning", "prompt")])
def test_training_goes_on_from_a_finished_prompt_of_pefts(make_sequences, tmp_path, made, goes_on) -> None:
    sequences = make_sequences("shared")
    theirs = get_peft_model(make_family("llama"), copy.deepcopy(attach("llama", made).peft_config["default"])).eval()
    expected = run_peft(theirs, sequences)[0]
    theirs.save_pretrained(str(tmp_path))
    ours = attach("llama", goes_on, seed=1)
    layout, _ = verify_layout(ours)
    start_from(ours, tmp_path)
    values = run_scores(ours, sequences, layout)
    assert all(torch.allclose(a, b, atol=2e-5) for a, b in zip(values, expected, strict=True))
    assert count_trainable(ours) == next(iter(load_file(tmp_path / "adapter_model.safetensors").values())).numel()


def test_a_projected_prefix_that_peft_saved_is_trained_further(make_sequences, tmp_path) -> None:
    theirs = get_peft_model(make_family("llama"), make_prefix_config(SETTINGS["prefix-projected"])).eval()
    expected = run_peft(theirs, make_sequences("shared"))[0]
    theirs.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["prefix_projection"] is True
    ours = restore_adapter(make_family("llama"), tmp_path, trainable=True).eval()
    layout, _ = verify_layout(ours)
    values = run_scores(ours, make_sequences("shared"), layout)
    assert all(torch.allclose(a, b, atol=2e-5) for a, b in zip(values, expected, strict=True))
    assert values[0].requires_grad


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (PrefixSettings(num_virtual_tokens=3, projection_size=16), "projection_size=0"),
        (PrefixSettings(num_virtual_tokens=4), "adapter.num_virtual_tokens"),
        (PromptSettings(num_virtual_tokens=3), "adapter.method"),
    ],
)
def test_what_a_prefix_is_no_start_for(tmp_path, settings, said) -> None:
    save_adapter(attach("llama", "prefix"), tmp_path)
    with pytest.raises(AdapterError, match=said):
        start_from(attach_adapter(make_family("llama"), settings), tmp_path)


def test_counts() -> None:
    assert count_trainable(attach("llama", "prompt")) == 3 * 32
    # Two layers, keys and values, two heads of eight.
    assert count_trainable(attach("llama", "prefix")) == 3 * 2 * 2 * 2 * 8


def test_what_prefix_tuning_forbids_is_refused_before_a_weight_is_read() -> None:
    training = TrainingSettings(activation_checkpointing=True)
    with pytest.raises(AdapterError, match="activation_checkpointing=false"):
        check_combination(PrefixSettings(), ModelSettings(base="nano"), training)
    check_combination(PromptSettings(), ModelSettings(base="nano"), training)
    assert not any(METHODS[settings.method].mergeable for settings in SETTINGS.values())


def test_a_folder_of_another_base_is_refused(tmp_path) -> None:
    save_adapter(attach("llama", "prompt"), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["num_virtual_tokens"] = 7
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="another shape"):
        restore_adapter(make_family("llama"), tmp_path)
