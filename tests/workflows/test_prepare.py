"""What a run is prepared from: names that ship, homes, tokens that the base knows, something left to train on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import koat
from koat.core.settings import DataSettings, ModelSettings
from koat.model import load_config, load_tokenizer
from koat.workflows.config import PlanConfig, RunConfig
from koat.workflows.trained import settle_base
from koat.workflows.training.examples import check_vocabulary, load_examples
from koat.workflows.training.prepare import settle_paths
from tests.tiny_base import VOCABULARY, write_rows


def test_the_model_that_ships_is_no_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nano", "mine"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    for name, whole in (("nano", "nano"), ("mine", str(tmp_path / "mine"))):
        assert settle_paths(PlanConfig(model=ModelSettings(base=name)))["model"]["base"] == whole
        assert settle_base(name) == whole


def test_the_model_that_ships_is_opened_beside_a_run_of_that_name(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nano").symlink_to(finished)
    monkeypatch.chdir(tmp_path)
    assert koat.load("nano").template is None
    assert koat.load("./nano").template is not None


def test_a_tilde_stands_for_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = {"train": ["~/a.jsonl", "owner/name"], "validation": ["~/b"], "splits": "~/c.tsv", "template": "koat"}
    data = RunConfig.model_validate({"model": {"base": "nano"}, "data": settings}).data
    assert data.train == [str(tmp_path / "a.jsonl"), "owner/name"]
    assert (data.validation, data.splits) == ([str(tmp_path / "b")], tmp_path / "c.tsv")
    assert data.template == "koat"


@pytest.fixture
def stretched(place: Path, tmp_path: Path) -> Path:
    """A base whose tokenizer got a token that the model has no embedding for."""
    base = shutil.copytree(place / "base", tmp_path / "base")
    tokenizer = load_tokenizer(ModelSettings(base=str(base)))
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(base)
    return base


@pytest.mark.parametrize(
    "row",
    [{"instruction": "비가 <new>", "output": "1"}, {"instruction": "비가", "output": "0", "words": {"1": "<new>"}}],
    ids=["prompt", "wrong answer"],
)
def test_a_token_without_an_embedding_is_named(stretched: Path, tmp_path: Path, row: dict[str, Any]) -> None:
    words = {"0": "눈이", "1": "해가"} | row.pop("words", {})
    file = write_rows(tmp_path / "rows.jsonl", [row])
    settings = DataSettings(train=[str(file)], values={"output": words})
    model = ModelSettings(base=str(stretched))
    tokenizer, config = load_tokenizer(model), load_config(model)
    examples = load_examples(settings, tokenizer, 256, 0, with_choices=True)
    known = len(tokenizer) - 1
    config.vocab_size = known
    with pytest.raises(koat.DataError, match=rf"the token '<new>', id {known}, and the base model knows {known} tok"):
        check_vocabulary(examples, tokenizer, config)
    config.vocab_size = VOCABULARY * 2
    check_vocabulary(examples, tokenizer, config)


def test_it_is_found_before_weights_are_read(stretched: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(ModelSettings(base=str(stretched)))
    while len(tokenizer) <= VOCABULARY:
        tokenizer.add_tokens([f"<new{len(tokenizer)}>"])
    tokenizer.save_pretrained(stretched)
    (stretched / "model.safetensors").unlink()
    rows = write_rows(tmp_path / "rows.jsonl", [{"instruction": "가", "output": f"<new{VOCABULARY}>"}])
    settings = {"model": {"base": str(stretched)}, "data": {"train": [str(rows)]}}
    with pytest.raises(koat.DataError, match=f"id {VOCABULARY}, and the base model knows {VOCABULARY}"):
        koat.finetune(settings, out=tmp_path / "run")


@pytest.mark.parametrize(("num_groups", "fraction"), [(1, 0.1), (3, 1.0)])
def test_holding_everything_out_is_said(place: Path, tmp_path: Path, num_groups: int, fraction: float) -> None:
    rows = [{"context": f"글 {n}", "instruction": f"{n}", "output": "가"} for n in range(num_groups)] * 2
    rows = rows if num_groups > 1 else rows[:1]
    data = {"train": [str(write_rows(tmp_path / "rows.jsonl", rows))], "template": "koalpaca-context"}
    settings = {"model": {"base": str(place / "base")}, "data": {**data, "validation_fraction": fraction}}
    with pytest.raises(koat.DataError, match=rf"fraction={fraction:g} holds out all {num_groups} groups .* it to 0"):
        koat.finetune(settings, out=tmp_path / "run")
