"""`adapter.start`: a run that goes on from an adapter, koat's or PEFT's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import koat
from koat.adapters.start import find_adapter
from koat.core.json_lines import read_lines
from tests.tiny_base import call_koat

NAME = "adapter_model.safetensors"


def settle(place: Path, start: Path, **adapter: object) -> dict[str, object]:
    return {
        "model": {"base": str(place / "base")},
        "data": {"train": [str(place / "rows.jsonl")]},
        "adapter": {"start": str(start), **adapter},
        "training": {"max_steps": 3, "batch_size": 4, "schedule": "constant", "keep": "last", "save_every": 1},
    }


def write_with_peft(place: Path, folder: Path) -> Path:
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data = 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder)
    return folder


def test_a_tilde_stands_for_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_adapter(Path("~/run")) == tmp_path / "run"
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "adapter" / "adapter_config.json").touch()
    assert find_adapter(Path("~/run")) == tmp_path / "run" / "adapter"


def test_a_run_goes_on_from_pefts_adapter(place: Path, tmp_path: Path) -> None:
    theirs = write_with_peft(place, tmp_path / "theirs")
    settings = settle(place, theirs, method="lora", targets="paper", r=8, alpha=8)
    begun = load_file(theirs / NAME)
    run = koat.finetune(settings, out=tmp_path / "run")
    ended = load_file(run.adapter / NAME)
    assert begun.keys() == ended.keys()
    for name, tensor in begun.items():  # AdamW moves an entry by its rate at most: 3 steps of 2e-4
        assert 0 < (ended[name] - tensor).abs().max() < 1e-3

    def stop(record: object) -> None:
        if record.step == 2:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        koat.finetune(settings, out=tmp_path / "halted", on_step=stop)
    again = koat.finetune(out=tmp_path / "halted", resume=True)
    assert (again.adapter / NAME).read_bytes() == (run.adapter / NAME).read_bytes()


def test_a_run_goes_on_from_a_run(place: Path, finished: Path, tmp_path: Path) -> None:
    run = koat.finetune(settle(place, finished, method="ia3"), out=tmp_path / "run")
    fresh = koat.finetune({**settle(place, finished), "adapter": {"method": "ia3"}}, out=tmp_path / "fresh")
    first, other = (read_lines(each.metrics)[0]["loss"] for each in (run, fresh))
    assert first != other
    begun, ended = load_file(finished / "adapter" / NAME), load_file(run.adapter / NAME)
    assert all((ended[name] - begun[name]).abs().max() < 0.02 for name in begun)


def test_the_adapter_that_a_run_began_from_is_pinned(place: Path, tmp_path: Path) -> None:
    theirs = write_with_peft(place, tmp_path / "theirs")
    settings = settle(place, theirs, method="lora", targets="paper", r=8, alpha=8)
    whole = koat.finetune(settings, out=tmp_path / "whole")

    def halt(run: Path, after: int) -> None:
        def stop(record: object) -> None:
            if record.step == after:  # type: ignore[attr-defined]
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            koat.finetune(settings, out=run, on_step=stop)

    halt(tmp_path / "early", 1)  # its record is written before the step's checkpoint
    halt(tmp_path / "late", 2)
    moved = {name: tensor + 0.1 for name, tensor in load_file(theirs / NAME).items()}
    save_file(moved, theirs / NAME, metadata={"format": "pt"})
    with pytest.raises(koat.RunFolderError, match="its start changed"):
        koat.finetune(out=tmp_path / "early", resume=True)
    shutil.rmtree(theirs)
    with pytest.raises(koat.AdapterError, match="is not an adapter"):
        koat.finetune(out=tmp_path / "early", resume=True)
    # A checkpoint holds what became of it.
    again = koat.finetune(out=tmp_path / "late", resume=True)
    assert (again.adapter / NAME).read_bytes() == (whole.adapter / NAME).read_bytes()
    assert again.read_manifest()["start"] == whole.read_manifest()["start"] != ""


def test_what_is_no_start(place: Path, finished: Path, tmp_path: Path) -> None:
    flags = ["finetune", "--base", place / "base", "--data", place / "rows.jsonl", "--out", tmp_path / "run"]
    for more, said in (
        ([f"adapter.start={tmp_path / 'nowhere'}"], "is not an adapter"),
        ([f"adapter.start={finished}", "adapter.targets=attention"], "adapter.targets"),
        ([f"adapter.start={finished}", "--method", "lora"], "adapter.method"),
    ):
        status, _, error = call_koat(*flags, *more)
        assert status == 2
        assert said in error, error
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())
