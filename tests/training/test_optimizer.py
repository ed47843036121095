"""Optimizers: 8-bit moments stay near 32-bit ones, and every one goes on exactly from its saved state."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from koat.core.errors import TrainingError
from koat.core.settings import TrainingSettings
from koat.training.optimizer import build_optimizer, check_optimizer, flatten_optimizer, restore_optimizer

OPTIMIZERS = ["adamw", "adamw-8bit"]


def make_parameters() -> list[nn.Parameter]:
    """Return one tensor large enough for 8-bit moments and one too small."""
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((80, 64), (7, 5))]


def take_steps(parameters, optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator) + parameter.detach()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


class Paged(torch.optim.SGD):
    """Hands out pages as bitsandbytes' paged optimizers do, and like them loads ordinary tensors."""

    is_paged = True

    def get_state_buffer(self, parameter: nn.Parameter, dtype: torch.dtype) -> torch.Tensor:
        page = torch.zeros_like(parameter, dtype=dtype)
        page.is_page = True
        return page


def test_moments_of_a_paged_optimizer_lie_in_pages_again() -> None:
    parameters = make_parameters()
    optimizer = Paged(parameters)
    tensors = {f"{number}.state1": torch.full_like(p, 2.0 + number) for number, p in enumerate(parameters)}
    restore_optimizer(optimizer, tensors)
    for number, parameter in enumerate(parameters):
        moment = optimizer.state[parameter]["state1"]
        assert getattr(moment, "is_page", False) and torch.equal(moment, tensors[f"{number}.state1"])


@pytest.fixture(params=OPTIMIZERS)
def settings(request) -> TrainingSettings:
    if request.param != "adamw":
        pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")
    return TrainingSettings(optimizer=request.param, learning_rate=1e-2, weight_decay=0.1, betas=(0.8, 0.95))


def test_it_goes_on_bit_for_bit(settings, tmp_path) -> None:
    whole = make_parameters()
    take_steps(whole, build_optimizer(whole, settings), 0, 9)

    before = make_parameters()
    optimizer = build_optimizer(before, settings)
    take_steps(before, optimizer, 0, 4)
    save_file(flatten_optimizer(optimizer), tmp_path / "optimizer.safetensors")
    after = copy.deepcopy(before)
    optimizer = build_optimizer(after, settings)
    restore_optimizer(optimizer, load_file(tmp_path / "optimizer.safetensors"))
    take_steps(after, optimizer, 4, 9)
    assert all(torch.equal(one, other) for one, other in zip(after, whole, strict=True))
    # What was saved is a copy: going on did not change it.
    assert {int(step) for key, step in load_file(tmp_path / "optimizer.safetensors").items() if "step" in key} == {4}


def test_it_is_adamw(settings) -> None:
    """Against the formula, in 32 bits; moments in 8 bits stay within a few hundredths of the path."""
    found, expected = make_parameters(), make_parameters()
    start = copy.deepcopy(expected)
    optimizer = build_optimizer(found, settings)
    take_steps(found, optimizer, 0, 6)
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in expected]
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        for parameter, (mean, square) in zip(expected, moments, strict=True):
            gradient = torch.randn(parameter.shape, generator=generator) + parameter.detach()
            mean.mul_(0.8).add_(0.2 * gradient)
            square.mul_(0.95).add_(0.05 * gradient**2)
            update = mean / (1 - 0.8 ** (step + 1)) / ((square / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
            parameter.data = parameter.data * (1 - 1e-2 * 0.1) - 1e-2 * update
    for large, (one, other, origin) in zip((True, False), zip(found, expected, start, strict=True), strict=True):
        allowed = 0.05 if large and settings.optimizer == "adamw-8bit" else 1e-5
        assert (one - other).norm() <= allowed * (other - origin).norm()


def test_eight_bits_are_a_quarter() -> None:
    pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")
    sizes = {}
    for name in OPTIMIZERS:
        parameters = make_parameters()[:1]
        optimizer = build_optimizer(parameters, TrainingSettings(optimizer=name))
        take_steps(parameters, optimizer, 0, 1)
        tensors = flatten_optimizer(optimizer)
        sizes[name] = sum(tensor.nbytes for key, tensor in tensors.items() if "qmap" not in key)
    assert sizes["adamw-8bit"] < 0.27 * sizes["adamw"]


def test_paging_needs_a_gpu() -> None:
    with pytest.raises(TrainingError, match=r"adamw-paged needs a CUDA GPU.*run is on cpu"):
        check_optimizer(TrainingSettings(optimizer="adamw-paged"), torch.device("cpu"))


def test_a_missing_library_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(TrainingError, match=r"adamw-8bit needs bitsandbytes.*koat\[quant\].*training.optimizer=adamw"):
        build_optimizer(make_parameters(), TrainingSettings(optimizer="adamw-8bit"))
    build_optimizer(make_parameters(), TrainingSettings())
