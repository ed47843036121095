"""Adapters that a plain PEFT script made are evaluated, trained on and merged in koat; koat's open in plain PEFT."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from koat.adapters.attach import attach_adapter, restore_adapter, save_adapter
from koat.adapters.merge import merge_adapter
from koat.adapters.methods import Ia3Settings, LoraSettings
from koat.adapters.start import start_from
from koat.core.errors import AdapterError
from koat.core.settings import TrainingSettings
from koat.forest.verify import verify_layout
from koat.training.loop import train
from tests.forest.test_score import assert_same, run_layout, run_single

FAMILIES = ["qwen2", "gpt_neox"]
IDS = torch.randint(3, 300, (2, 15), generator=torch.Generator().manual_seed(0))
CONFIGS: dict[str, Any] = {"ia3": IA3Config, "lora": LoraConfig}
SETTINGS: dict[str, Any] = {
    "ia3": Ia3Settings(targets="peft"),
    "lora": LoraSettings(targets="peft", r=8, alpha=8),
}
"""koat's settings for PEFT's defaults."""
NAME = "adapter_model.safetensors"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


@torch.no_grad()
def ask(model: Any) -> Tensor:
    logits: Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def write_with_peft(base: Any, method: str, folder: Path, randomise: Any) -> Any:
    """Do what a script does that knows PEFT only, with PEFT's own defaults."""
    model = get_peft_model(copy.deepcopy(base), CONFIGS[method](task_type="CAUSAL_LM")).eval()
    randomise(model)
    model.save_pretrained(str(folder))
    return model


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_pefts_adapter_is_evaluated(family, method, make_model, make_sequences, score_singly, randomise, tmp_path):
    """The forest's log-probabilities and gradients are those of plain PEFT on one sequence at a time."""
    base = make_model(family)
    theirs = write_with_peft(base, method, tmp_path, randomise)
    ours = restore_adapter(copy.deepcopy(base), tmp_path, trainable=True).eval()
    assert_near(ask(ours), ask(theirs))
    assert (ask(ours) - ask(base)).abs().max() > 0.01
    sequences = make_sequences("shared")
    layout, verification = verify_layout(ours)
    assert verification.shares
    assert_same(run_layout(ours, sequences, layout, 256, None), run_single(theirs, sequences, score_singly))


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_pefts_adapter_is_merged(family, method, make_model, randomise, tmp_path):
    base = make_model(family)
    theirs = write_with_peft(base, method, tmp_path, randomise)
    merged = merge_adapter(restore_adapter(copy.deepcopy(base), tmp_path).eval())
    assert float((ask(merged) - ask(theirs)).abs().max()) <= 1e-4


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_pefts_adapter_is_trained_on(family, method, make_model, make_sequences, randomise, tmp_path):
    """It begins where PEFT left it, learns, and goes back to plain PEFT."""
    base = make_model(family)
    theirs = write_with_peft(base, method, tmp_path / "theirs", lambda model: randomise(model, spread=0.05))
    ours = attach_adapter(copy.deepcopy(base), SETTINGS[method])
    start_from(ours, tmp_path / "theirs")
    assert_near(ask(ours.eval()), ask(theirs))
    layout, _ = verify_layout(ours)
    settings = TrainingSettings(max_steps=8, batch_size=8, learning_rate=0.01, schedule="constant", keep="last")
    losses: list[float] = []
    train(
        ours, make_sequences("shared"), layout, settings,
        accelerator=Accelerator(cpu=True), checkpoints=tmp_path / "checkpoints",
        on_step=lambda record: losses.append(record.loss),
    )  # fmt: skip
    assert losses[-1] < losses[0] - 0.05
    (tmp_path / "ours").mkdir()
    save_adapter(ours, tmp_path / "ours")
    before, after = (load_file(tmp_path / name / NAME) for name in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    again = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours")).eval()
    assert_near(ask(again), ask(ours.eval()))


@pytest.mark.parametrize("settings", [Ia3Settings(), Ia3Settings(targets="all-linear"), LoraSettings(dora=True)])
@pytest.mark.parametrize("family", FAMILIES)
def test_koats_adapter_opens_in_plain_peft(family, settings, make_model, randomise, tmp_path):
    base = make_model(family)
    ours = attach_adapter(copy.deepcopy(base), settings).eval()
    randomise(ours)
    save_adapter(ours, tmp_path)
    expected = ask(restore_adapter(copy.deepcopy(base), tmp_path).eval())
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    assert not any(type(module).__module__.startswith("koat") for module in theirs.modules())
    assert_near(ask(theirs), expected)
    assert float((ask(theirs.merge_and_unload()) - expected).abs().max()) <= 1e-4


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (LoraSettings(targets="peft", r=4, alpha=8), r"r=8.*adapter\.r"),
        (LoraSettings(targets="peft", r=8, alpha=16), r"lora_alpha=8.*adapter\.alpha"),
        (LoraSettings(targets="all-linear", r=8, alpha=8), r"target_modules=.*adapter\.targets"),
        (LoraSettings(targets="peft", r=8, alpha=8, rslora=True), r"use_rslora=None.*adapter\.rslora"),
        (Ia3Settings(targets="peft"), r"peft_type=LORA.*adapter\.method"),
    ],
)
def test_training_does_not_go_on_from_something_else(changed, said, make_model, randomise, tmp_path):
    write_with_peft(make_model("qwen2"), "lora", tmp_path, randomise)
    with pytest.raises(AdapterError, match=said):
        start_from(attach_adapter(make_model("qwen2"), changed), tmp_path)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"alpha_pattern": {"k_proj": 32}}, "alpha_pattern"),
        ({"rank_pattern": {"k_proj": 4}}, "rank_pattern"),
        ({"init_lora_weights": "pissa"}, "takes something away from the base"),
    ],
)
def test_training_does_not_go_on_from_what_peft_alone_knows(more, said, make_model, randomise, tmp_path):
    write_with_peft(make_model("qwen2"), "lora", tmp_path, randomise)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **more}), encoding="utf-8")
    with pytest.raises(AdapterError, match=said):
        start_from(attach_adapter(make_model("qwen2"), SETTINGS["lora"]), tmp_path)


def test_training_goes_on_from_pefts_other_plain_beginnings(make_model, randomise, tmp_path):
    write_with_peft(make_model("qwen2"), "lora", tmp_path, randomise)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "init_lora_weights": "Gaussian"}))
    model = attach_adapter(make_model("qwen2"), SETTINGS["lora"])
    start_from(model, tmp_path)
    stored = load_file(str(tmp_path / NAME))
    assert any(torch.equal(weight, tensor) for weight in model.parameters() for tensor in stored.values())


def test_scaled_queries_are_not_held_in_silence(make_model, randomise, tmp_path):
    """PEFT's default scales GPT-NeoX's queries; under paper targets they would jump back to one."""
    write_with_peft(make_model("gpt_neox"), "ia3", tmp_path, randomise)
    stored = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    paper = attach_adapter(make_model("gpt_neox"), Ia3Settings())
    config = paper.peft_config["default"]
    stored |= {"target_modules": sorted(config.target_modules)}
    stored |= {"feedforward_modules": sorted(config.feedforward_modules)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(stored), encoding="utf-8")
    with pytest.raises(AdapterError, match="also scales the queries"):
        start_from(paper, tmp_path)


def test_an_adapter_of_another_shape_is_no_start(make_model, randomise, tmp_path):
    write_with_peft(make_model("qwen2", intermediate_size=128), "ia3", tmp_path, randomise)
    with pytest.raises(AdapterError, match="another shape"):
        start_from(attach_adapter(make_model("qwen2"), SETTINGS["ia3"]), tmp_path)
