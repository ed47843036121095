"""Settings of a run from method, recipe, file and flags, and what a misspelt one is answered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from koat.adapters.methods import METHODS
from koat.core.config import Layer, to_mapping
from koat.core.errors import AdapterError, ConfigError
from koat.workflows.config import PlanConfig, RunConfig, find_value, list_recipes, read_recipe, resolve_run

NEEDED = {"model": {"base": "nano"}, "data": {"train": ["a.jsonl"]}}


def test_a_method_brings_its_learning_rate_and_a_flag_overrides_it() -> None:
    plain = resolve_run(RunConfig, flags=NEEDED)
    assert plain.settings.adapter.method == "ia3"
    assert plain.origins["training.learning_rate"] == "method"
    lora = resolve_run(RunConfig, flags={**NEEDED, "adapter": {"method": "lora"}})
    assert lora.settings.training.learning_rate != plain.settings.training.learning_rate
    named = resolve_run(RunConfig, flags={**NEEDED, "training": {"learning_rate": 0.125}})
    assert (named.settings.training.learning_rate, named.origins["training.learning_rate"]) == (0.125, "flag")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_brings_its_own_rate(method: str) -> None:
    settings = resolve_run(RunConfig, flags={**NEEDED, "adapter": {"method": method}}).settings
    assert settings.training.learning_rate == METHODS[method].learning_rate


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("training: {epochs: 9, batch_size: 5}\ndata: {train: [b.tsv]}\n", encoding="utf-8")
    resolved = resolve_run(
        RunConfig, recipe="demo-lora", file=file, flags={"training": {"batch_size": 7}, "model": {"dtype": "float32"}}
    )
    training = resolved.settings.training
    assert (training.epochs, training.batch_size) == (9, 7)
    assert resolved.settings.adapter.method == "lora"
    assert resolved.settings.data.train == ["b.tsv"]
    origins = resolved.origins
    assert (origins["training.epochs"], origins["training.batch_size"]) == ("file", "flag")
    assert (origins["training.learning_rate"], origins["model.base"]) == ("recipe", "recipe")
    assert (origins["model.dtype"], origins["training.seed"]) == ("flag", "default")


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_stands_and_comes_back_unchanged(name: str) -> None:
    settings = resolve_run(RunConfig, recipe=name, flags=NEEDED).settings  # some leave these to the user
    assert resolve_run(RunConfig, flags=to_mapping(settings)).settings == settings
    assert read_recipe(name)


def test_a_plan_wants_no_data_but_takes_a_file_that_has_some(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: {train: [b.tsv]}\nmodel: {base: nano}\n", encoding="utf-8")
    assert resolve_run(PlanConfig, file=file).settings.model.base == "nano"


def test_all_problems_come_at_once() -> None:
    flags = {"model": {"bose": "x"}, "data": {"trian": []}, "adapter": {"target": "paper"}, "training": {"lr": 1}}
    with pytest.raises(ConfigError) as caught:
        resolve_run(RunConfig, flags=flags)
    text = str(caught.value)
    for wrong, right in [
        ("model.bose", "model.base"),
        ("data.trian", "data.train"),
        ("adapter.target", "adapter.targets"),
        ("training.lr", "training.learning_rate"),
    ]:
        assert wrong in text
        assert right in text


@pytest.mark.parametrize("method", ["loar", "ai3"])
def test_an_unknown_method_is_answered_with_the_nearest(method: str) -> None:
    with pytest.raises((ConfigError, AdapterError), match=r"adapter\.method.*did you mean '(lora|ia3)'"):
        resolve_run(RunConfig, flags={**NEEDED, "adapter": {"method": method}})


@pytest.mark.parametrize(("method", "shown"), [(["ia3"], "['ia3']"), ({"a": 1}, "{'a': 1}"), (3, "3")])
@pytest.mark.parametrize("schema", [RunConfig, PlanConfig])
def test_a_method_that_is_no_name_is_refused(method: Any, shown: str, schema: type[Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_run(schema, flags={**NEEDED, "adapter": {"method": method}})
    assert f"adapter.method: received {shown} (from flag); allowed: 'ia3', 'lora'" in str(caught.value)


def test_an_unknown_recipe_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="demo-lora"):
        resolve_run(RunConfig, recipe="demo-lroa")


def test_a_setting_of_another_method_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"adapter\.r\b.*ia3"):
        resolve_run(RunConfig, flags={**NEEDED, "adapter": {"method": "ia3", "r": 8}})


def test_the_last_layer_that_says_anything_decides() -> None:
    layers = [Layer("recipe", {"a": {"b": 1}}), Layer("file", {"a": None}), Layer("flag", {"a": {"c": 3}})]
    assert find_value(layers, ("a", "b")) == 1
    assert find_value(layers, ("a", "d")) is None


def test_published_instructions_with_empty_answers_are_skipped_not_refused() -> None:
    """Stanford Alpaca has 28 rows without an output."""
    data = read_recipe("alpaca-lora")["data"]
    assert data["train"] == ["tatsu-lab/alpaca"]
    assert data["on_bad_row"] == "skip"
