"""What a run folder holds, that plain PEFT loads it, and that real data trains with falling loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import koat
from koat.adapters.methods import METHODS
from koat.core.errors import ConfigError, RunFolderError
from koat.core.json_lines import read_lines
from koat.core.run_folder import RunFolder
from koat.data.prompts import from_mapping
from koat.workflows.shell import suggest_task
from tests.tiny_base import call_koat, make_rows, need_shared, write_rows


def read_manifest(run: Path) -> dict[str, Any]:
    """Return a run's manifest."""
    manifest: dict[str, Any] = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    return manifest


def test_a_run_folder_holds_everything_and_nothing_else(finished: Path) -> None:
    held = {path.name for path in finished.iterdir()}
    assert held == {"adapter", "checkpoints", "config.yaml", "manifest.json", "metrics.jsonl"}
    assert {path.name for path in (finished / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "koat_adapter.json", "prompt_template.json",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert not [path for path in finished.rglob("*") if path.suffix in {".bin", ".pt", ".pth", ".pkl"}]


def test_metrics_have_every_step_once(finished: Path) -> None:
    lines = read_lines(finished / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {line["num_steps"] for line in lines} == {6}
    assert all(line["tokens"] >= line["unique_tokens"] > 0 for line in lines)
    assert lines[-1]["validation_loss"] < lines[0]["validation_loss"]


def test_the_manifest_says_what_the_run_depended_on(finished: Path, place: Path) -> None:
    manifest = read_manifest(finished)
    assert manifest["finished"] is True
    assert manifest["method"] == "ia3"
    assert (manifest["trainable_parameters"], manifest["seed"]) == (160, 3)
    assert manifest["examples"] == {"train": 24, "validation": 6, "groups": 0}
    assert manifest["forest"]["shares"] is True
    assert manifest["base"]["name"] == str(place / "base")
    assert len(manifest["base"]["fingerprint"]) == 16
    assert {"python", "koat", "torch", "transformers", "peft"} <= manifest["versions"].keys()
    assert {"device", "processor", "cores", "threads"} <= manifest["hardware"].keys()
    (data,) = manifest["data"].values()
    assert data["bytes"] == (place / "rows.jsonl").stat().st_size
    result, lines = manifest["result"], read_lines(finished / "metrics.jsonl")
    assert result["steps"] == 6
    assert result["tokens"] == sum(line["tokens"] for line in lines)
    assert result["unique_tokens"] == sum(line["unique_tokens"] for line in lines)
    assert result["best_validation_loss"] == min(line["validation_loss"] for line in lines)
    weights = sum(weight.numel() for weight in load_file(place / "base" / "model.safetensors").values())
    assert manifest["total_parameters"] == weights


def test_the_configuration_kept_is_the_resolved_one(finished: Path, place: Path) -> None:
    kept = yaml.safe_load((finished / "config.yaml").read_text(encoding="utf-8"))
    assert kept["model"]["base"] == str(place / "base")
    whole = {"method": "ia3", "targets": "paper", "feedforward": [], "reach": "peft", "start": None}
    assert kept["adapter"] == whole
    assert (kept["training"]["max_steps"], kept["training"]["seed"]) == (6, 3)
    assert kept["training"]["learning_rate"] == METHODS["ia3"].learning_rate
    assert kept["data"]["template"] == "koalpaca"


def test_plain_peft_loads_the_adapter_and_agrees(finished: Path, place: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(finished / "adapter")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "base"), finished / "adapter")
    template = from_mapping(json.loads((finished / "adapter" / "prompt_template.json").read_text(encoding="utf-8")))
    assert template.name == "koalpaca"
    ids = torch.tensor([tokenizer("### 질문: 비가 옵니다\n\n### 답변: 오늘").input_ids])
    ours = koat.load(finished).model
    with torch.no_grad():
        expected, base = plain(ids).logits, plain.get_base_model()(ids).logits
        found = ours(ids.to(ours.device)).logits.float().cpu()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        with plain.disable_adapter():
            assert not torch.allclose(plain(ids).logits, expected, atol=1e-3)
    assert torch.equal(base, expected)  # PEFT changes the layers in place


def test_a_run_that_is_there_is_not_touched(finished: Path, place: Path) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    settings = {"model": {"base": str(place / "base")}, "data": {"train": [str(place / "rows.jsonl")]}}
    with pytest.raises(RunFolderError, match="not empty"):
        koat.finetune(settings, out=finished)
    with pytest.raises(RunFolderError, match="finished"):
        koat.finetune(out=finished, resume=True)
    # Asked to replace it, koat first makes sure that nothing is wrong with the new run.
    for wrong in (
        {"data": {"train": [str(place / "nowhere.jsonl")]}},
        {"adapter": {"targets": ["k_porj"]}},
        {"model": {"base": str(place / "nowhere")}},
        {"data": {**settings["data"], "template": "koalpac"}},
    ):
        with pytest.raises(koat.KoatError):
            koat.finetune({**settings, **wrong}, out=finished, overwrite=True)
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_a_failed_start_leaves_nothing_in_the_way(place: Path, tmp_path: Path) -> None:
    settings = {
        "model": {"base": str(place / "base")},
        "data": {"train": [str(place / "rows.jsonl")]},
        "training": {"max_steps": 1},
    }
    with pytest.raises(koat.AdapterError):
        koat.finetune({**settings, "adapter": {"targets": ["k_porj"]}}, out=tmp_path / "run")
    assert koat.finetune(settings, out=tmp_path / "run").is_complete()


def test_overwriting_leaves_one_run(place: Path, tmp_path: Path) -> None:
    settings = {
        "model": {"base": str(place / "base")},
        "data": {"train": [str(place / "rows.jsonl")]},
        "training": {"max_steps": 4},
    }
    koat.finetune(settings, out=tmp_path / "run")
    koat.finetune({**settings, "training": {"max_steps": 2}}, out=tmp_path / "run", overwrite=True)
    assert [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()][-1] == "step-000002"


def interrupt(settings: dict[str, Any], out: Path, step: int) -> None:
    """Begin a run and stop it after a step, as Ctrl-C would."""

    def stop(record: Any) -> None:
        if record.step == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        koat.finetune(settings, out=out, on_step=stop)


def test_a_run_goes_on_only_as_it_began(place: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", make_rows(20))
    settings = {
        "model": {"base": str(place / "base")},
        "data": {"train": [str(data)]},
        "training": {"max_steps": 6, "batch_size": 4, "save_every": 1},
    }
    interrupt(settings, tmp_path / "run", 4)
    assert not RunFolder(tmp_path / "run").is_complete()
    with pytest.raises(ConfigError, match=r"training\.seed"):
        koat.finetune({**settings, "training": {**settings["training"], "seed": 5}}, out=tmp_path / "run", resume=True)
    write_rows(data, make_rows(21))
    with pytest.raises(RunFolderError, match="data changed"):
        koat.finetune(out=tmp_path / "run", resume=True)
    write_rows(data, make_rows(20))
    run = koat.finetune(out=tmp_path / "run", resume=True)
    assert [line["step"] for line in read_lines(run.metrics)] == [1, 2, 3, 4, 5, 6]
    whole = koat.finetune(settings, out=tmp_path / "whole")
    name = "adapter_model.safetensors"
    assert (run.adapter / name).read_bytes() == (whole.adapter / name).read_bytes()


def test_a_broken_checkpoint_is_named_and_kept(place: Path, tmp_path: Path) -> None:
    settings = {
        "model": {"base": str(place / "base")},
        "data": {"train": [str(place / "rows.jsonl")]},
        "training": {"max_steps": 6, "batch_size": 4, "save_every": 1},
    }
    interrupt(settings, tmp_path / "run", 4)
    broken = tmp_path / "run" / "checkpoints" / "step-000003" / "adapter.safetensors"
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(RunFolderError, match="step-000003 cannot be read"):
        koat.finetune(out=tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "checkpoints" / "step-000002" / "done.json").exists()


@pytest.mark.parametrize(("dtype", "precision"), [("auto", "bfloat16"), ("float32", "bfloat16"), ("auto", "float32")])
def test_precisions_follow_each_other_in_one_process(dtype: str, precision: str, place: Path, tmp_path: Path) -> None:
    settings = {
        "model": {"base": str(place / "base"), "dtype": dtype},
        "data": {"train": [str(place / "rows.jsonl")]},
        "training": {"max_steps": 2, "precision": precision},
    }
    run = koat.finetune(settings, out=tmp_path / "run")
    state = load_file(run.adapter / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert any((tensor != 1).any() for tensor in state.values())


def test_padded_rows_reach_the_same_adapter(place: Path, tmp_path: Path, finished: Path) -> None:
    from tests.workflows.conftest import list_arguments

    status, _, error = call_koat(*list_arguments(place), "model.layout=padded", "--out", tmp_path / "padded")
    assert status == 0, error
    manifest = read_manifest(tmp_path / "padded")
    assert manifest["forest"]["shares"] is False
    assert manifest["result"]["unique_tokens"] == manifest["result"]["tokens"] - 6 * 4  # all but last tokens
    name = "adapter/adapter_model.safetensors"
    found, expected = load_file(tmp_path / "padded" / name), load_file(finished / name)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-5)


REAL: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "songys": (
        "instructions_ko/chatbot_songys.jsonl",
        {"validation_fraction": 0.01, "limit": 64, "validation_limit": 16},
        {"max_steps": 8, "batch_size": 8, "validate_every": 4},
    ),
    "seed tasks": (
        "instructions_en/seed_tasks_alpaca.json",
        {"validation_fraction": 0.1, "template": "alpaca", "max_length": 1024, "overflow": "drop"},
        {"max_steps": 2, "batch_size": 2},
    ),
    "KorQuAD": (
        "qa/KorQuAD_v1.0_dev.json",
        {"template": "koalpaca-context", "max_length": 320, "overflow": "truncate_context", "limit": 8},
        {"max_steps": 2, "batch_size": 2},
    ),
}
"""Files as they were published, and what is needed to train on them."""


@pytest.mark.parametrize("name", REAL)
def test_real_files_train_unedited(name: str, tmp_path: Path) -> None:
    file, data, training = REAL[name]
    data = {"train": [str(need_shared("data", file))], "validation_limit": 4, **data}
    if name == "KorQuAD":
        data["splits"] = str(need_shared("data", "qa", "korquad_article_split.tsv"))
    run = koat.finetune(
        {"model": {"base": "nano"}, "data": data, "training": {"keep": "last", **training}}, out=tmp_path / "run"
    )
    lines = read_lines(run.metrics)
    losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert len(lines) == training["max_steps"]
    assert all(0 < loss < 20 for loss in losses)
    if name == "songys":  # the others are too short to learn from
        assert losses[-1] < losses[0]
    manifest = run.read_manifest()
    assert 1 <= manifest["examples"]["validation"] <= data["validation_limit"]
    assert set(manifest["data"]) == {*data["train"], *([data["splits"]] if "splits" in data else [])}


def test_choice_losses_learn_from_the_other_words_of_a_field(place: Path, tmp_path: Path) -> None:
    from tests.workflows.conftest import list_arguments

    rows = [{"document": row["instruction"], "label": str(number % 2)} for number, row in enumerate(make_rows(24))]
    data = write_rows(tmp_path / "reviews.jsonl", rows)
    flags = ["--base", place / "base", "--data", data, "--method", "ia3"]
    settings = [
        "data.values={label: {0: 눈이, 1: 비가}}", "data.template={prompt: '{document}:', response: ' {label}'}",
        "training.unlikelihood=1", "training.choice_loss=1", "training.max_steps=8", "training.learning_rate=0.05",
        "data.format=table",
    ]  # fmt: skip
    for part, budget in (("whole", 4096), ("cut", 20)):
        given = [*flags, *settings, f"training.tokens_per_microbatch={budget}", "--out", tmp_path / part]
        status, _, error = call_koat("finetune", *given)
        assert status == 0, error
    whole, cut = (read_lines(tmp_path / part / "metrics.jsonl") for part in ("whole", "cut"))
    assert [line["loss"] for line in cut] == pytest.approx([line["loss"] for line in whole], rel=1e-4)
    assert whole[-1]["loss"] < whole[0]["loss"]
    assert all(line["unique_tokens"] < line["tokens"] for line in whole)
    status, _, error = call_koat(*list_arguments(place), "--out", tmp_path / "none", "training.choice_loss=1")
    assert status == 2 and "data.values" in error


def test_two_processes_cannot_train_in_one_folder(place: Path, tmp_path: Path) -> None:
    settings = {
        "model": {"base": str(place / "base")},
        "data": {"train": [str(place / "rows.jsonl")]},
        "training": {"max_steps": 4, "batch_size": 4, "save_every": 1},
    }
    refused: list[str] = []

    def try_at_the_same_time(record: Any) -> None:
        if record.step == 2:
            for options in ({"resume": True}, {"overwrite": True}, {}):
                given = () if "resume" in options else (settings,)
                with pytest.raises(RunFolderError, match="being worked on by another process"):
                    koat.finetune(*given, out=tmp_path / "run", **options)
                refused.append(str(options))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        koat.finetune(settings, out=tmp_path / "run", on_step=try_at_the_same_time)
    assert len(refused) == 3
    run = koat.finetune(out=tmp_path / "run", resume=True)
    assert run.is_complete()
    assert not run.lock.exists()


def test_a_lock_that_a_kill_left_is_no_run(place: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("", encoding="utf-8")
    settings = {"model": {"base": str(place / "base")}, "data": {"train": [str(place / "rows.jsonl")]}}
    assert koat.finetune({**settings, "training": {"max_steps": 1}}, out=tmp_path / "run").is_complete()


@pytest.mark.parametrize(
    ("manifest", "task"),
    [
        ({"examples": {"groups": 2}}, "context-qa"),
        ({"examples": {"groups": 0}}, "mine.yaml"),
        ({"templates": [{"name": "chat"}]}, "mine.yaml"),
        ({"templates": [{"name": "nsmc-prompt2"}], "examples": {"groups": 2}}, "nsmc-prompt2"),
        ({}, "mine.yaml"),
    ],
)
def test_the_next_step_suits_what_was_trained_on(manifest: dict[str, Any], task: str) -> None:
    assert suggest_task(manifest).startswith(f"--task {task} ")
