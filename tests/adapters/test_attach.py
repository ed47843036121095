"""Saved adapters: what is missing, left over, misshapen or broken is said, never loaded in part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from koat.adapters.attach import (
    attach_adapter,
    read_adapter_state,
    restore_adapter,
    save_adapter,
    write_adapter_state,
)
from koat.adapters.methods import Ia3Settings, LoraSettings
from koat.core.errors import AdapterError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
IDS = torch.arange(3, 20)[None]


@pytest.fixture
def saved(make_model, randomise, tmp_path) -> Path:
    """Return the folder of a good IA3 adapter for the tiny Llama."""
    model = attach_adapter(make_model("llama"), Ia3Settings())
    randomise(model)
    save_adapter(model, tmp_path)
    return tmp_path


def refuse(make_model, folder: Path, family: str = "llama", **options) -> str:
    with pytest.raises(AdapterError) as caught:
        restore_adapter(make_model(family, **options), folder)
    return str(caught.value)


def change_tensors(folder: Path, change) -> None:
    state = load_file(str(folder / WEIGHTS))
    change(state)
    save_file(state, str(folder / WEIGHTS))


def change_config(folder: Path, **values) -> None:
    stored = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    (folder / CONFIG).write_text(json.dumps({**stored, **values}), encoding="utf-8")


def test_the_good_one_loads(make_model, saved) -> None:
    model = restore_adapter(make_model("llama"), saved).eval()
    state = load_file(str(saved / WEIGHTS))
    found = read_adapter_state(model)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert not any(weight.requires_grad for weight in model.parameters())
    again = restore_adapter(make_model("llama"), saved, trainable=True)
    assert sum(weight.requires_grad for weight in again.parameters()) == len(state)


def test_only_safetensors_and_json_are_written(saved) -> None:
    assert {path.suffix for path in saved.iterdir()} == {".safetensors", ".json"}


def test_missing_tensors(make_model, saved) -> None:
    change_tensors(saved, lambda state: [state.pop(name) for name in sorted(state)[:2]])
    message = refuse(make_model, saved)
    assert "2 tensors are missing" in message
    assert "layers.0" in message


def test_extra_tensors(make_model, saved) -> None:
    change_tensors(saved, lambda state: state.update({"base_model.model.stranger.ia3_l": torch.ones(3)}))
    message = refuse(make_model, saved)
    assert "1 tensors fit nothing" in message
    assert "stranger" in message


def test_misshapen_tensors(make_model, saved) -> None:
    change_tensors(saved, lambda state: state.update({sorted(state)[0]: torch.ones(1, 5)}))
    message = refuse(make_model, saved)
    assert "another shape" in message
    assert "[1, 5]" in message
    assert "[1, 96]" in message


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_hidden_layers": 4}, "3 tensors are missing"),
        ({"num_hidden_layers": 2}, "3 tensors fit nothing"),
        ({"intermediate_size": 128}, "3 tensors have another shape"),
    ],
)
def test_an_adapter_of_another_base(make_model, saved, options, said) -> None:
    message = refuse(make_model, saved, **options)
    assert said in message
    assert "base model that it was trained on" in message


def test_an_adapter_of_another_family(make_model, saved) -> None:
    message = refuse(make_model, saved, "gpt_neox")
    assert "matches no layer" in message
    assert "dense_4h_to_h" in message


def test_an_adapter_of_another_base_for_lora(make_model, tmp_path) -> None:
    save_adapter(attach_adapter(make_model("llama"), LoraSettings(r=4)), tmp_path)
    change_config(tmp_path, r=8)
    assert "another shape" in refuse(make_model, tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_file_that_breaks_off(make_model, saved, keep) -> None:
    path = saved / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    message = refuse(make_model, saved)
    assert WEIGHTS in message
    assert "not a whole safetensors file" in message


def test_a_file_of_something_else(make_model, saved) -> None:
    (saved / WEIGHTS).write_bytes(b"PK\x03\x04" + b"x" * 5000)
    assert "not a whole safetensors file" in refuse(make_model, saved)


def test_a_file_without_tensors(make_model, saved) -> None:
    save_file({}, str(saved / WEIGHTS))
    assert "holds no tensors" in refuse(make_model, saved)


def test_no_weights(make_model, saved) -> None:
    (saved / WEIGHTS).unlink()
    message = refuse(make_model, saved)
    assert "does not exist" in message
    assert "pickle" not in message


def test_only_a_pickle(make_model, saved) -> None:
    """It is not opened: this one would tell."""
    (saved / WEIGHTS).unlink()
    (saved / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    message = refuse(make_model, saved)
    assert "adapter_model.bin" in message
    assert "safe_serialization=True" in message


def test_no_configuration(make_model, saved, tmp_path) -> None:
    (saved / CONFIG).unlink()
    assert f"has no {CONFIG}" in refuse(make_model, saved)
    assert "is not an adapter" in refuse(make_model, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[]", "not a PEFT adapter"),
        (b"{}", "not a PEFT adapter"),
        (b'{"peft_type": "FOO"}', "FOO"),
        (b'{"peft_type": 3}', "PEFT cannot read"),
    ],
)
def test_a_broken_configuration(make_model, saved, content, said) -> None:
    (saved / CONFIG).write_bytes(content)
    message = refuse(make_model, saved)
    assert said in message
    assert CONFIG in message


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_broken_note_beside_it(make_model, saved, content) -> None:
    (saved / "koat_adapter.json").write_text(content, encoding="utf-8")
    assert "koat_adapter.json" in refuse(make_model, saved)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"target_modules": ["k_prj", "v_proj", "down_proj"]}, "did you mean 'k_proj'"),
        ({"target_modules": ".*nothing"}, "nothing"),
        ({"target_modules": 3}, CONFIG),
        ({"feedforward_modules": ["down_prj"]}, "feedforward_modules"),
        # Input scaling turned into output scaling: the shapes tell.
        ({"feedforward_modules": []}, "another shape"),
        ({"target_modules": ".*(k_proj|v_proj|down_proj)", "feedforward_modules": ".*down_prj"}, "another shape"),
    ],
)
def test_targets_that_do_not_match(make_model, saved, values, said) -> None:
    change_config(saved, **values)
    assert said in refuse(make_model, saved)


def test_targets_may_be_a_pattern(make_model, saved) -> None:
    with torch.no_grad():
        expected = restore_adapter(make_model("llama"), saved).eval()(input_ids=IDS).logits
        pattern = ".*(k_proj|v_proj|down_proj)"
        change_config(saved, target_modules=pattern, feedforward_modules=".*down_proj")
        assert torch.equal(restore_adapter(make_model("llama"), saved).eval()(input_ids=IDS).logits, expected)


def test_a_state_goes_round(make_model, randomise) -> None:
    source, target = (attach_adapter(make_model("llama"), LoraSettings()) for _ in range(2))
    randomise(source)
    write_adapter_state(target, read_adapter_state(source))
    with torch.no_grad():
        assert torch.equal(source.eval()(input_ids=IDS).logits, target.eval()(input_ids=IDS).logits)
    state = read_adapter_state(source)
    state.pop(sorted(state)[0])
    with pytest.raises(AdapterError, match="1 tensors are missing"):
        write_adapter_state(target, state)
