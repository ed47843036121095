"""Checkpoints: everything comes back, whatever is broken is named, and nothing is ever half there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from koat.adapters.attach import attach_adapter, read_adapter_state
from koat.adapters.methods import FullSettings, Ia3Settings, LoraSettings
from koat.core.errors import RunFolderError
from koat.core.run_folder import RunFolder
from koat.forest.verify import verify_layout
from koat.training.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from koat.training.loop import train

METHODS = {"ia3": Ia3Settings(), "lora": LoraSettings(r=4, dropout=0.3), "full": FullSettings()}


@pytest.fixture(params=METHODS)
def model(request: pytest.FixtureRequest, make_model: Callable[..., Any], randomise: Callable[..., None]) -> Any:
    """A tiny Llama with an adapter that has moved."""
    made = attach_adapter(make_model("llama"), METHODS[request.param])
    randomise(made)
    return made


def make_optimizer(model: Any, *, steps: int = 3) -> torch.optim.Optimizer:
    """Return an AdamW that has taken some steps on random gradients."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return optimizer


def test_everything_comes_back(tmp_path: Path, model: Any) -> None:
    optimizer = make_optimizer(model)
    best = {name: tensor + 1 for name, tensor in read_adapter_state(model).items()}
    state = TrainingState(7, 100, 60, 1.5, 0.25, 4, best)
    path = save_checkpoint(tmp_path, model, optimizer, state, keep=2)
    assert path == tmp_path / "step-000007"
    adapter = {name: tensor.clone() for name, tensor in read_adapter_state(model).items()}
    moments = copy.deepcopy(optimizer.state_dict()["state"])

    other_optimizer = make_optimizer(model, steps=1)
    found = load_checkpoint(path, model, other_optimizer)
    assert (found.step, found.tokens, found.unique_tokens, found.seconds) == (7, 100, 60, 1.5)
    assert (found.best_loss, found.best_step) == (0.25, 4)
    assert all(torch.equal(found.best[name], tensor) for name, tensor in best.items())
    assert all(torch.equal(read_adapter_state(model)[name], tensor) for name, tensor in adapter.items())
    restored = other_optimizer.state_dict()["state"]
    assert restored.keys() == moments.keys()
    for number, expected in moments.items():
        assert all(torch.equal(restored[number][key], expected[key]) for key in expected)


def test_holds_tensors_and_json_alone(tmp_path: Path, model: Any) -> None:
    path = save_checkpoint(tmp_path, model, make_optimizer(model), TrainingState(step=1), keep=1)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    assert load_file(path / "adapter.safetensors").keys() == read_adapter_state(model).keys()


def test_only_the_newest_are_kept(tmp_path: Path, model: Any) -> None:
    optimizer = make_optimizer(model)
    for step in (1, 2, 3, 10, 100):
        save_checkpoint(tmp_path, model, optimizer, TrainingState(step=step), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000010", "step-000100"]


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "done.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "other"])
def test_a_broken_checkpoint_is_named(name: str, damage: str, tmp_path: Path, model: Any) -> None:
    optimizer = make_optimizer(model)
    path = save_checkpoint(tmp_path, model, optimizer, TrainingState(step=1), keep=1)
    if damage == "gone":
        (path / name).unlink()
    else:
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[: len(content) // 2] if damage == "cut" else b'{"flavour": 3}')
    with pytest.raises(RunFolderError, match="step-000001 cannot be read"):
        load_checkpoint(path, model, optimizer)


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "done.json"])
def test_a_refused_write_leaves_the_checkpoint_before(
    name: str, tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path)
    optimizer = make_optimizer(model)
    save_checkpoint(run.checkpoints, model, optimizer, TrainingState(step=1), keep=1)

    def refuse(what: Any, path: Path, *arguments: Any, **options: Any) -> None:
        if Path(path).name == name:
            raise OSError(28, "No space left on device")
        save(what, path, *arguments, **options)

    import koat.training.checkpoint as module

    save, write = module.save_file, Path.write_text
    monkeypatch.setattr(module, "save_file", refuse)
    if name == "done.json":
        monkeypatch.setattr(Path, "write_text", lambda self, *a, **o: refuse(None, self))
    with pytest.raises(RunFolderError, match="the disk is full"):
        save_checkpoint(run.checkpoints, model, optimizer, TrainingState(step=2), keep=1)
    monkeypatch.setattr(Path, "write_text", write)
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-000001"]
    assert run.latest_checkpoint() == run.checkpoint(1)
    assert load_checkpoint(run.checkpoint(1), model, optimizer).step == 1


@pytest.mark.parametrize("method", METHODS)
def test_training_goes_on_as_if_it_had_never_stopped(
    method: str,
    tmp_path: Path,
    make_model: Callable[..., Any],
    make_settings: Callable[..., Any],
    make_sequences: Callable[..., list[Any]],
    accelerator: Any,
) -> None:
    sequences = make_sequences("shared") + make_sequences("chat") + make_sequences("unrelated")
    layout, _ = verify_layout(make_model("llama"))
    settings = make_settings(max_steps=12, batch_size=5, save_every=1, keep_checkpoints=99, noise=2.0)

    def go(folder: Path, resume_from: Path | None = None) -> tuple[dict[str, torch.Tensor], list[Any]]:
        model = attach_adapter(make_model("llama"), METHODS[method], seed=3)
        losses: list[Any] = []
        scores = iter([0.5, 0.9, 0.7] * 9)
        train(
            model,
            sequences,
            layout,
            settings,
            accelerator=accelerator,
            checkpoints=folder,
            resume_from=resume_from,
            validate=lambda model: next(scores),
            on_step=lambda record: losses.append((record.step, record.loss, record.learning_rate)),
        )
        return read_adapter_state(model), losses

    whole, losses = go(tmp_path / "whole")
    for step in (1, 4, 5, 11, 12):
        torch.manual_seed(step)
        state, rest = go(tmp_path / str(step), tmp_path / "whole" / f"step-{step:06d}")
        assert rest == losses[step:]
        assert all(torch.equal(state[name], tensor) for name, tensor in whole.items())


def test_the_oldest_checkpoint_goes_when_steps_get_a_digit_more(tmp_path, monkeypatch) -> None:
    for step in (999_998, 999_999):
        (tmp_path / f"step-{step:06d}").mkdir()
    for name in ("read_adapter_state", "flatten_optimizer"):
        monkeypatch.setattr(f"koat.training.checkpoint.{name}", lambda *_: {"a": torch.zeros(1)})
    save_checkpoint(tmp_path, None, None, TrainingState(step=1_000_000), keep=2)
    assert {path.name for path in tmp_path.iterdir()} == {"step-999999", "step-1000000"}
