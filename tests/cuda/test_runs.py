"""On a CUDA GPU: whole runs, quantised ones, every optimizer; stopped, resumed, evaluated there and on a processor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import koat
from koat.core.json_lines import read_lines
from koat.workflows.config import RunConfig, resolve_run
from koat.workflows.training.finetune import finetune_run
from tests.tiny_base import PowerCutError, call_koat, make_rows, stop_after, write_rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA GPU")
SAMPLES = Path(koat.__file__).parent / "nano" / "samples"
METHODS = [
    ("ia3", {}, {}),
    ("lora", {}, {}),
    ("prefix", {}, {}),
    ("prompt", {}, {}),
    ("p_tuning", {}, {}),
    ("full", {}, {"learning_rate": 1e-4, "precision": "float32"}),
    ("qlora", {}, {}),
    ("ia3", {"quantisation": "nf4"}, {}),
    ("ia3", {"quantisation": "8bit"}, {}),
    ("lora", {"quantisation": "8bit"}, {}),
    ("lora", {}, {"optimizer": "adamw-8bit"}),
    ("lora", {}, {"optimizer": "adamw-paged"}),
    ("lora", {}, {"activation_checkpointing": True}),
    ("lora", {}, {"activation_checkpointing": True, "activation_offload": True}),
    ("ia3", {}, {"precision": "float32"}),
    ("ia3", {"attention": "sdpa"}, {}),
]


def resolve(folder: Path, method: str, model: dict, training: dict, device: str = "cuda"):
    """Return the settings of a short run on the shipped model."""
    rows = folder / "rows.jsonl"
    if not rows.exists():
        write_rows(rows, make_rows(40))
    steps = {"max_steps": 6, "batch_size": 8, "save_every": 1, "seed": 3, "sampler": "grouped"}
    flags = {
        "model": {"base": "nano", "device": device, **model},
        "data": {"train": [str(rows)], "validation_fraction": 0.2},
        "adapter": {"method": method},
        "training": {**steps, **training},
    }
    return resolve_run(RunConfig, flags=flags)


def read_losses(run: Path) -> list[float]:
    """Return the loss of every step."""
    return [line["loss"] for line in read_lines(run / "metrics.jsonl") if "loss" in line]


@pytest.mark.parametrize(("method", "model", "training"), METHODS)
def test_every_method_trains_as_on_a_processor(tmp_path, method, model, training) -> None:
    if method == "qlora" or "quantisation" in model or "optimizer" in training:
        pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")
    finetune_run(resolve(tmp_path, method, model, training), tmp_path / "gpu")
    losses = read_losses(tmp_path / "gpu")
    assert len(losses) == 6 and losses[-1] < losses[0]
    manifest = json.loads((tmp_path / "gpu" / "manifest.json").read_text(encoding="utf-8"))
    dense = method == "prefix" or model.get("attention") == "sdpa"
    assert manifest["forest"]["kernel"] == ("sdpa" if dense else "tree")
    if "optimizer" in training or "activation_offload" in training:  # not on a processor
        training = {}
    here = {**training, "precision": "float32"}
    finetune_run(resolve(tmp_path, method, model, here, device="cpu"), tmp_path / "cpu")
    expected = read_losses(tmp_path / "cpu")
    tolerance = 2e-4 if training.get("precision") == "float32" else 6e-2
    assert losses == pytest.approx(expected, abs=tolerance)


def test_a_stopped_run_goes_on_to_the_same_numbers(tmp_path) -> None:
    settings = resolve(tmp_path, "lora", {}, {"precision": "float32"})
    finetune_run(settings, tmp_path / "whole")

    with pytest.raises(PowerCutError):
        finetune_run(settings, tmp_path / "stopped", on_step=stop_after(3))
    finetune_run(settings, tmp_path / "stopped", resume=True)
    assert read_losses(tmp_path / "stopped")[-3:] == pytest.approx(read_losses(tmp_path / "whole")[-3:], abs=2e-5)


def test_scores_are_a_processors(tmp_path) -> None:
    finetune_run(resolve(tmp_path, "ia3", {}, {"precision": "float32"}), tmp_path / "run")
    scores = {}
    for device in ("cuda", "cpu"):
        options = ["--task", "nsmc-prompt1", "--data", SAMPLES / "reviews_test.tsv", "--shots-from"]
        options += [SAMPLES / "reviews_train.tsv", "--shots", 4, "--limit", 60, "--dtype", "float32"]
        out = tmp_path / device
        status, text, error = call_koat("eval", tmp_path / "run", *options, "--device", device, "--out", out)
        assert status == 0, error + text
        lines = [line for path in sorted(out.rglob("*.jsonl")) for line in read_lines(path)]
        scores[device] = [value for line in lines for value in list_numbers(line)]
    assert len(scores["cuda"]) >= 120
    assert scores["cuda"] == pytest.approx(scores["cpu"], abs=1e-3)


def list_numbers(value: object) -> list[float]:
    """Return all floating-point numbers in a JSON value."""
    if isinstance(value, dict):
        return [number for each in value.values() for number in list_numbers(each)]
    if isinstance(value, list):
        return [number for each in value for number in list_numbers(each)]
    return [value] if isinstance(value, float) else []
