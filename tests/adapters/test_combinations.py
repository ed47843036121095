"""What may not be combined is refused before any weight is read, with what to do instead."""

from __future__ import annotations

import sys

import pytest

import koat
from koat.adapters.methods import METHODS, Ia3Settings, LoraSettings, QloraSettings, check_combination, default_values
from koat.core.errors import AdapterError, ConfigError, TrainingError
from koat.core.settings import ModelSettings, TrainingSettings
from koat.workflows.config import PlanConfig, resolve_run
from tests.tiny_base import call_koat

NOWHERE = {"base": "no-such-model"}


def check(adapter, training=None, **model) -> None:
    check_combination(adapter, ModelSettings(base="nano", **model), TrainingSettings(**training or {}))


@pytest.mark.parametrize("quantisation", ["none", "8bit"])
def test_qlora_needs_four_bits(quantisation) -> None:
    with pytest.raises(AdapterError) as caught:
        check(QloraSettings(), quantisation=quantisation)
    text = str(caught.value)
    assert f"model.quantisation={quantisation}" in text
    assert "nf4-double or nf4" in text and "adapter.method=lora" in text


@pytest.mark.parametrize("quantisation", ["8bit", "nf4", "nf4-double"])
def test_quantised_bases_take_low_rank_and_scaling(quantisation) -> None:
    check(Ia3Settings(), quantisation=quantisation)
    check(LoraSettings(), quantisation=quantisation)
    if quantisation != "8bit":
        check(QloraSettings(), quantisation=quantisation)
        check(LoraSettings(dora=True), quantisation=quantisation)


def test_dora_on_8_bit_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"dora=true.*nf4 or none"):
        check(LoraSettings(dora=True), quantisation="8bit")


def test_quantised_layers_run_on_cpu_and_cuda_alone() -> None:
    for device in ("auto", "cpu", "cuda", "cuda:1"):
        check(LoraSettings(), quantisation="nf4", device=device)
    with pytest.raises(AdapterError, match=r"does not run on model.device=mps.*auto, cpu, cuda"):
        check(LoraSettings(), quantisation="nf4", device="mps")
    check(LoraSettings(), device="mps")


def test_a_fact_of_the_table_forbids_quantised_bases(monkeypatch) -> None:
    from dataclasses import replace

    monkeypatch.setitem(METHODS, "ia3", replace(METHODS["ia3"], allows_quantised_base=False))
    with pytest.raises(AdapterError, match=r"quantisation=none, or adapter.method=qlora"):
        check(Ia3Settings(), quantisation="nf4")
    check(Ia3Settings())


def test_decay_and_checkpointing_are_still_looked_at() -> None:
    with pytest.raises(AdapterError, match="weight_decay=0"):
        check(Ia3Settings(), {"weight_decay": 0.1})
    check(LoraSettings(), {"weight_decay": 0.1, "activation_checkpointing": True})


def test_qlora_brings_its_quantisation_along() -> None:
    assert default_values("qlora")["model"] == {"quantisation": "nf4-double"}
    assert "model" not in default_values("lora")
    found = resolve_run(PlanConfig, flags={"model": {"base": "nano"}, "adapter": {"method": "qlora"}})
    assert found.settings.model.quantisation == "nf4-double"
    assert found.origins["model.quantisation"] == "method"
    assert found.settings.training.learning_rate == 2e-4
    given = {"model": {"base": "nano", "quantisation": "nf4"}, "adapter": {"method": "qlora"}}
    assert resolve_run(PlanConfig, flags=given).settings.model.quantisation == "nf4"


def test_the_recipe_has_the_diarys_settings() -> None:
    found = resolve_run(PlanConfig, recipe="koalpaca-qlora").settings
    assert (found.model.quantisation, found.model.dtype) == ("nf4-double", "bfloat16")
    adapter = found.adapter
    assert (adapter.r, adapter.alpha, adapter.dropout, adapter.targets) == (8, 32, 0.05, ["query_key_value"])
    assert found.training.learning_rate == 2e-4
    check_combination(adapter, found.model, found.training)


@pytest.mark.parametrize("command", ["plan", "finetune"])
def test_commands_refuse_before_they_look_for_the_model(command, tmp_path) -> None:
    more = ["--data", tmp_path / "nowhere.jsonl", "--out", tmp_path / "run"] if command == "finetune" else []
    status, _, error = call_koat(
        command, "--base", tmp_path / "nowhere", "--method", "qlora", "model.quantisation=none", *more
    )
    assert status == 2
    assert "QLoRA is trained on a base in 4 bit" in " ".join(error.split())


def test_a_misspelt_setting_suggests_the_nearest() -> None:
    for wrong in ({"quantization": "nf4"}, {"quantisatoin": "nf4"}):
        with pytest.raises(ConfigError, match=r"model\.quantisation"):
            resolve_run(PlanConfig, flags={"model": {"base": "nano", **wrong}})
    with pytest.raises(ConfigError, match="nf4-double"):
        resolve_run(PlanConfig, flags={"model": {"base": "nano", "quantisation": "nf4-duoble"}})


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [("adamw-paged", "needs a CUDA GPU.*adamw or adamw-8bit"), ("adamw-8bit", r"pip install 'koat\[quant\]'")],
)
def test_optimizers_that_cannot_run_are_refused(monkeypatch, tmp_path, optimizer, message) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    settings = {
        "model": {"base": str(tmp_path / "nowhere"), "device": "cpu"},
        "data": {"train": [str(tmp_path / "nowhere.jsonl")]},
        "training": {"optimizer": optimizer},
    }
    with pytest.raises(TrainingError, match=message):
        koat.finetune(settings, out=tmp_path / "run")


def test_offloading_needs_something_to_offload() -> None:
    check(LoraSettings(), {"activation_checkpointing": True, "activation_offload": True})
    with pytest.raises(AdapterError, match=r"activation_checkpointing=true, or training\.activation_offload=false"):
        check(LoraSettings(), {"activation_offload": True})


def test_offloading_to_the_cpu_is_refused_on_the_cpu(tmp_path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    flags = ["--base", "nano", "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "out", "model.device=cpu"]
    settings = ["training.activation_checkpointing=true", "training.activation_offload=true"]
    status, _, error = call_koat("finetune", *flags, *settings)
    assert status == 2 and "this run is on the CPU" in error
    assert not (tmp_path / "out").exists()


def test_types_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(AdapterError, match=r"precision=float32 cannot be had with model\.dtype=bfloat16"):
        check(LoraSettings(), {"precision": "float32"}, dtype="bfloat16")
    with pytest.raises(AdapterError, match="loss scaling"):
        check(LoraSettings(), dtype="float16")
    check(LoraSettings(), {"precision": "bfloat16"}, dtype="bfloat16")
    check(LoraSettings(), {"precision": "bfloat16"}, dtype="float32")
    check(LoraSettings(), dtype="bfloat16")
