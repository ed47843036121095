"""Averaging: IA3's mean around one, LoRA's mean update to the last digit, and no mean of what has none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from koat.adapters.attach import attach_adapter, restore_adapter, save_adapter
from koat.adapters.average import StoredAdapter, average_adapters
from koat.adapters.files import read_extra
from koat.adapters.methods import Ia3Settings, LoraSettings
from koat.core.errors import AdapterError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
IDS = torch.arange(3, 20)[None]


def read(folder: Path) -> StoredAdapter:
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return StoredAdapter(folder.name, config, read_extra(folder), load_file(str(folder / WEIGHTS)))


def save(make_model, randomise, folder: Path, settings, seed: int, family: str = "llama") -> StoredAdapter:
    model = attach_adapter(make_model(family), settings)
    randomise(model, seed)
    folder.mkdir()
    save_adapter(model, folder)
    return read(folder)


def open_average(make_model, found: list[StoredAdapter], folder: Path, family: str = "llama"):
    config, state = average_adapters(found)
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    save_file(state, str(folder / WEIGHTS))
    return restore_adapter(make_model(family), folder).eval()


def test_ia3_averages_around_one(make_model, randomise, tmp_path) -> None:
    found = [save(make_model, randomise, tmp_path / str(n), Ia3Settings(), n) for n in range(3)]
    _, state = average_adapters(found)
    for name, tensor in state.items():
        deviations = torch.stack([adapter.state[name].double() - 1 for adapter in found])
        torch.testing.assert_close(tensor.double() - 1, deviations.mean(0), rtol=1e-6, atol=1e-7)
        # A fresh adapter moves nothing: averaging with it halves what was learned, it does not halve the vector.
        fresh = StoredAdapter("fresh", found[0].config, {}, {key: torch.ones_like(t) for key, t in state.items()})
        _, halved = average_adapters([found[0], fresh])
        torch.testing.assert_close(halved[name] - 1, (found[0].state[name] - 1) / 2, rtol=1e-6, atol=1e-7)


def test_the_mean_of_one_adapter_with_itself_is_that_adapter(make_model, randomise, tmp_path) -> None:
    for name, settings in (("ia3", Ia3Settings(targets="all-linear")), ("lora", LoraSettings(r=3))):
        one = save(make_model, randomise, tmp_path / name, settings, 1)
        mean = open_average(make_model, [one, one, one], tmp_path / f"{name}-mean")
        alone = restore_adapter(make_model("llama"), tmp_path / name).eval()
        with torch.no_grad():
            expected = alone(input_ids=IDS).logits
            torch.testing.assert_close(mean(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rslora_first", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_averages_updates_not_factors(make_model, randomise, tmp_path, family, rslora_first) -> None:
    """Ranks and scalings differ; merged weights of the mean are the mean of the merged weights."""
    settings = [LoraSettings(r=2, alpha=8), LoraSettings(r=5, alpha=4, rslora=True)][:: -1 if rslora_first else 1]
    found = [save(make_model, randomise, tmp_path / str(n), each, n, family) for n, each in enumerate(settings)]
    mean = open_average(make_model, found, tmp_path / "mean", family).merge_and_unload()
    merged = [restore_adapter(make_model(family), tmp_path / str(n)).merge_and_unload() for n in range(2)]
    base, differs = make_model(family).state_dict(), 0
    for name, weight in mean.state_dict().items():
        first, second = (each.state_dict()[name] for each in merged)
        torch.testing.assert_close(weight, (first + second) / 2, rtol=1e-5, atol=1e-5)
        differs += not torch.equal(weight, base[name])
    assert differs >= 12
    assert average_adapters(found)[0]["r"] == 7


def test_what_is_missing_is_not_zero(make_model, randomise, tmp_path) -> None:
    found = [save(make_model, randomise, tmp_path / str(n), Ia3Settings(), n) for n in range(2)]
    found[1].state.pop(sorted(found[1].state)[0])
    with pytest.raises(AdapterError, match=r"one only.*not zero"):
        average_adapters(found)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (Ia3Settings(targets="attention"), "different targets"),
        (LoraSettings(), "different methods"),
        (Ia3Settings(targets=["k_proj", "v_proj", "down_proj"], feedforward=[]), "different feed-forward modules"),
    ],
)
def test_unlike_adapters_are_refused(make_model, randomise, tmp_path, other, said) -> None:
    found = [
        save(make_model, randomise, tmp_path / "a", Ia3Settings(), 0),
        save(make_model, randomise, tmp_path / "b", other, 1),
    ]
    with pytest.raises(AdapterError, match=said):
        average_adapters(found)


def test_other_shapes_are_refused(make_model, randomise, tmp_path) -> None:
    for settings in (Ia3Settings(), LoraSettings()):
        model = attach_adapter(make_model("llama", intermediate_size=128), settings)
        (tmp_path / f"b{settings.method}").mkdir()
        save_adapter(model, tmp_path / f"b{settings.method}")
        one = save(make_model, randomise, tmp_path / f"a{settings.method}", settings, 0)
        with pytest.raises(AdapterError, match="different base models"):
            average_adapters([one, read(tmp_path / f"b{settings.method}")])


def test_held_and_free_queries_do_not_mix(make_model, randomise, tmp_path) -> None:
    found = [save(make_model, randomise, tmp_path / str(n), Ia3Settings(), n, "gpt_neox") for n in range(2)]
    found[1] = StoredAdapter("free", found[1].config, {}, found[1].state)
    with pytest.raises(AdapterError, match="held queries"):
        average_adapters(found)


def test_dora_has_no_low_rank_mean(make_model, randomise, tmp_path) -> None:
    found = [save(make_model, randomise, tmp_path / str(n), LoraSettings(dora=True), n) for n in range(2)]
    with pytest.raises(AdapterError, match="more than a plain low-rank update"):
        average_adapters(found)


@pytest.mark.parametrize(
    "more",
    [
        {"target_parameters": ["mlp.experts.down_proj"]},
        {"init_lora_weights": "pissa"},
        {"alpha_pattern": {"k_proj": 32}},
        {"rank_pattern": {"k_proj": 4}},
        {"lora_bias": True},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=lambda more: next(iter(more)),
)
def test_what_is_no_plain_low_rank_update_has_no_mean(make_model, randomise, tmp_path, more) -> None:
    found = [save(make_model, randomise, tmp_path / str(n), LoraSettings(), n) for n in range(2)]
    with pytest.raises(AdapterError, match=f"more than a plain low-rank update .*{next(iter(more))}"):
        average_adapters([found[0], replace(found[1], config={**found[1].config, **more})])


def test_one_adapter_has_no_mean(make_model, randomise, tmp_path) -> None:
    with pytest.raises(AdapterError, match="two adapters"):
        average_adapters([save(make_model, randomise, tmp_path / "a", Ia3Settings(), 0)])
