"""`koat adapters list | show | average`: what is on disk, and means of what has one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import koat
from tests.tiny_base import call_koat, write_base

NAME = "adapter_model.safetensors"
SCORE = {"value": 0.75, "low": 0.6, "high": 0.86, "num_items": 40, "meaningful": True}


def change(folder: Path, amount: float) -> None:
    state = load_file(folder / NAME)
    save_file({name: tensor + amount for name, tensor in state.items()}, folder / NAME, metadata={"format": "pt"})


def write_scores(predictions: Path, **scores: float) -> None:
    """Write a likelihood's share, and `scores` that are none."""
    others = {name: {**SCORE, "value": value, "low": value - 2, "high": value + 2} for name, value in scores.items()}
    result = {
        "task": "nsmc-prompt1", "num_shots": 0, "scores": {"likelihood": SCORE, **others},
        "contracts": {name: {"hash": "0123456789abcdef"} for name in ("likelihood", *others)},
        "conditions": {"hash": "fedcba9876543210"},
    }  # fmt: skip
    predictions.mkdir()
    (predictions / "one.scores.json").write_text(json.dumps({"subject": "run", "results": [result]}), encoding="utf-8")


@pytest.fixture
def runs(finished: Path, tmp_path: Path) -> Path:
    """A folder with two runs, `a` with a score and `b`, and a plain copy of b's adapter, `plain`."""
    for name, amount in (("a", 0.1), ("b", 0.3)):
        shutil.copytree(finished, tmp_path / "runs" / name)
        change(tmp_path / "runs" / name / "adapter", amount)
    write_scores(tmp_path / "runs" / "a" / "predictions")
    shutil.copytree(tmp_path / "runs" / "b" / "adapter", tmp_path / "runs" / "plain")
    return tmp_path / "runs"


def call(*arguments: Any) -> Any:
    status, out, error = call_koat(*arguments)
    assert status == 0, error
    return json.loads(out) if "--json" in arguments else out


def test_adapters_are_listed_once_each(runs: Path, place: Path) -> None:
    (runs / "broken").mkdir()
    (runs / "broken" / "adapter_config.json").write_text("{", encoding="utf-8")
    found = call("adapters", "list", runs, "--json")
    assert [Path(entry["path"]).name for entry in found["adapters"]] == ["a", "b", "plain"]
    assert {entry["method"] for entry in found["adapters"]} == {"ia3"}
    assert {entry["base"] for entry in found["adapters"]} == {str(place / "base")}
    assert len(found["problems"]) == 1 and "broken" in found["problems"][0]
    counts = {entry["num_parameters"] for entry in found["adapters"]}
    state = load_file(runs / "a" / "adapter" / NAME)
    assert counts == {sum(tensor.numel() for tensor in state.values())}
    table = call("adapters", "list", runs)
    assert "nsmc-prompt1 likelihood 75.0 %" in table


def test_one_adapter_is_shown(runs: Path) -> None:
    found = call("adapters", "show", runs / "a", "--json")
    manifest = json.loads((runs / "a" / "manifest.json").read_text(encoding="utf-8"))
    assert found["fingerprint"] == manifest["base"]["fingerprint"]
    assert found["targets"] == ["down_proj", "k_proj", "v_proj"]
    assert found["template"] == "koalpaca"
    assert found["scores"] == [
        {"task": "nsmc-prompt1", "scoring": "likelihood", "shots": 0, **SCORE}
        | {"contract": "0123456789abcdef", "conditions": "fedcba9876543210"}
    ]
    inside = call("adapters", "show", runs / "a" / "adapter", "--json")
    assert {**inside, "path": ""} == {**found, "path": ""}
    assert "75.0 % (60.0–86.0)" in call("adapters", "show", runs / "a")


def test_a_score_that_is_no_share_is_no_percentage(runs: Path) -> None:
    write_scores(runs / "b" / "predictions", bleu=23.5)
    assert "23.5 (21.5–25.5)" in call("adapters", "show", runs / "b")
    table = call("adapters", "list", runs)
    assert "23.5" in table and "2350" not in table


def test_the_average_opens_and_lies_between(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "mean"
    call("adapters", "average", runs / "a", runs / "plain", "--out", out)
    first, second, mean = (load_file(folder / NAME) for folder in (runs / "a" / "adapter", runs / "plain", out))
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, (first[name] + second[name]) / 2)
    assert koat.load(out).name == "mean"
    for name in ("prompt_template.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (runs / "a" / "adapter" / name).read_bytes()


def refuse(*arguments: Any) -> str:
    status, _, error = call_koat("adapters", *arguments)
    assert status == 2
    return error


def test_adapters_of_different_bases_have_no_mean(runs: Path, tmp_path: Path) -> None:
    """The same shapes, other weights."""
    base = write_base(tmp_path / "other")
    state = load_file(base / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"] + 1
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    config = runs / "plain" / "adapter_config.json"
    stored = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**stored, "base_model_name_or_path": str(base)}), encoding="utf-8")
    error = refuse("average", runs / "a", runs / "plain", "--out", tmp_path / "mean")
    assert "different base models" in error
    config.write_text(json.dumps({**stored, "base_model_name_or_path": str(tmp_path / "gone")}), encoding="utf-8")
    error = refuse("average", runs / "a", runs / "plain", "--out", tmp_path / "mean")
    assert "not at hand" in error and "--base" in error
    assert not (tmp_path / "mean").exists()


def test_adapters_of_different_templates_have_no_mean(runs: Path, tmp_path: Path) -> None:
    path = runs / "plain" / "prompt_template.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**stored, "prompts": ["{instruction}?"]}), encoding="utf-8")
    assert "different prompt templates" in refuse("average", runs / "a", runs / "plain", "--out", tmp_path / "mean")


def test_what_is_there_is_not_overwritten(runs: Path) -> None:
    assert "not empty" in refuse("average", runs / "a", runs / "b", "--out", runs / "plain")
    assert "no such folder" in refuse("list", runs / "nowhere")
    assert "is not an adapter" in refuse("show", runs)
