"""A fully fine-tuned run from the command line: trained, gone on with, scored, looked at, merged, opened plainly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from koat.core.json_lines import read_lines
from koat.workflows.evaluating.evaluate import open_subject
from tests.tiny_base import call_koat

SETTINGS = ["data.validation_fraction=0.2", "training.max_steps=6", "training.batch_size=4", "training.save_every=2"]


def call(*arguments: object) -> str:
    """Run a command that must succeed and return what it says."""
    status, out, error = call_koat(*arguments)
    assert status == 0, error
    return out


@pytest.fixture(scope="module")
def run(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("full") / "run"
    flags = ["--base", place / "base", "--data", place / "rows.jsonl", "--method", "full", "--out", out]
    call("finetune", *flags, *SETTINGS, "training.learning_rate=1e-3", "training.keep_checkpoints=3")
    return out


def test_training_changes_every_weight(run: Path, place: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    base, trained = (load_file(folder / "model.safetensors") for folder in (place / "base", run / "adapter"))
    assert base.keys() == trained.keys()
    assert not any(torch.equal(base[name], trained[name]) for name in base)
    assert manifest["trainable_parameters"] == manifest["total_parameters"] == sum(t.numel() for t in base.values())
    losses = [line["loss"] for line in read_lines(run / "metrics.jsonl")]
    assert losses[-1] < losses[0]


def test_a_run_goes_on_bit_for_bit(run: Path, tmp_path: Path) -> None:
    import shutil

    stopped = tmp_path / "stopped"
    shutil.copytree(run, stopped)
    for gone in ("adapter", "checkpoints/step-000006", "checkpoints/step-000004"):
        shutil.rmtree(stopped / gone)
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    (stopped / "manifest.json").write_text(json.dumps({**manifest, "finished": False}), encoding="utf-8")
    call("finetune", "--resume", stopped)
    name = Path("adapter") / "model.safetensors"
    assert (stopped / name).read_bytes() == (run / name).read_bytes()


def test_it_is_evaluated_and_looked_at_like_any_run(run: Path, place: Path) -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([[5, 9, 17, 3]])
    plain = AutoModelForCausalLM.from_pretrained(run / "adapter").eval()
    subject = open_subject(str(run))
    with torch.no_grad():
        assert torch.equal(subject.model(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert subject.template is not None and subject.verification.shares
    listed = json.loads(call("adapters", "list", run.parent, "--json"))
    assert [entry["method"] for entry in listed["adapters"]] == ["full"] and not listed["problems"]
    shown = json.loads(call("adapters", "show", run, "--json"))
    assert shown["num_bytes"] == (run / "adapter" / "model.safetensors").stat().st_size
    assert shown["num_parameters"] == sum(weight.numel() for weight in plain.parameters())


def test_a_merge_is_a_checked_copy_in_the_type_it_is_served_in(run: Path, tmp_path: Path) -> None:
    record = json.loads(call("merge", run, "--out", tmp_path / "same", "--json"))
    assert record["check"]["folder"]["max"] == 0
    same, trained = (load_file(folder / "model.safetensors") for folder in (tmp_path / "same", run / "adapter"))
    assert all(torch.equal(same[name], weight) for name, weight in trained.items())
    call("merge", run, "--out", tmp_path / "short", "--dtype", "bfloat16")
    short = load_file(tmp_path / "short" / "model.safetensors")
    assert all(torch.equal(short[name], weight.bfloat16()) for name, weight in trained.items())
    out = call("push", run, "me/full", "--merged", tmp_path / "short", "--dry-run")
    assert "full fine-tuning" in out


def test_what_only_adapters_can_do_is_refused_with_what_to_do(run: Path, place: Path, tmp_path: Path) -> None:
    status, _, error = call_koat("push", run, "me/full", "--dry-run")
    assert status == 2 and "koat merge" in error
    status, _, error = call_koat("adapters", "average", run, run, "--out", tmp_path / "mean")
    assert status == 2 and "FULL" in error and "cannot be averaged" in error
    flags = ["--base", place / "base", "--method", "full"]
    for setting in ("model.quantisation=nf4", "model.dtype=bfloat16"):
        status, _, error = call_koat("plan", *flags, setting)
        assert status == 2 and "Set model." in error


def test_a_plan_counts_weights_gradients_and_moments_once(place: Path) -> None:
    plan = json.loads(call("plan", "--base", place / "base", "--method", "full", "--json"))
    plan = plan.get("plan", plan)
    size = 4 * plan["total_parameters"]
    assert plan["trainable_parameters"] == plan["total_parameters"]
    assert (plan["weight_bytes"], plan["adapter_bytes"], plan["gradient_bytes"]) == (0, size, size)
    assert plan["optimizer_bytes"] == 2 * size
    assert plan["peak_bytes"] > 4 * size
