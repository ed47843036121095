"""Lean norms: the model's own values, autograd's gradients, the input kept as it came, and nothing else touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from benchmarks.kept import count_kept_bytes
from koat.adapters import norms
from koat.adapters.attach import attach_adapter
from koat.adapters.methods import Ia3Settings, LoraSettings
from koat.adapters.norms import LeanNorm, find_offset, refine_norms, release_norms

NORMS = {LlamaRMSNorm: 0.0, Olmo2RMSNorm: 0.0, Gemma2RMSNorm: 1.0}
WIDTH = 48
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "granite", "gpt_neox", "gpt2"]


def make_norm(kind: type[nn.Module], dtype: torch.dtype = torch.float32) -> Any:
    norm = kind(WIDTH, eps=1e-3).requires_grad_(False)  # type: ignore[call-arg]
    norm.weight.copy_(torch.randn(WIDTH, generator=torch.Generator().manual_seed(1)))
    return norm.to(dtype)


def draw(seed: int, dtype: torch.dtype = torch.float32, num_rows: int = 2) -> torch.Tensor:
    """Return rows of very different sizes `[R, 5, d]`, a fifth of them all zeros."""
    rows = torch.randn(num_rows, 5, WIDTH, generator=torch.Generator().manual_seed(seed))
    return (rows * torch.tensor([0.0, 1e-2, 1.0, 30.0, 1e3])[:, None]).to(dtype)


def differentiate(norm: nn.Module, x: torch.Tensor, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.detach().clone().requires_grad_()
    value = norm(x)
    value.backward(upstream.to(value.dtype))
    return value.detach(), x.grad


@pytest.mark.parametrize("kind", NORMS)
def test_values_are_the_norms_own_and_gradients_autograds(kind) -> None:
    plain, lean = make_norm(kind), nn.ModuleList([make_norm(kind)])
    refine_norms(lean)
    assert isinstance(lean[0], LeanNorm) and lean[0].offset == NORMS[kind]
    upstream = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(7))
    (expected, exact), (value, found) = (differentiate(norm, draw(0), upstream) for norm in (plain, lean[0]))
    assert torch.equal(value, expected)
    assert exact.norm() > 0
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("piece", [None, 3 * WIDTH])
def test_strided_inputs_and_gradients_in_pieces_or_at_once(monkeypatch, piece, kind, dtype) -> None:
    """Heads cut out of a fused projection lie apart; a gradient may come with rows for columns."""
    if piece:
        monkeypatch.setattr(norms, "PIECE", piece)
    plain, lean = make_norm(kind, dtype), nn.ModuleList([make_norm(kind, dtype)])
    refine_norms(lean)
    results = []
    for norm in (plain, lean[0]):
        drawn = torch.randn(10, 3 * WIDTH, generator=torch.Generator().manual_seed(0))
        x = drawn.to(dtype).requires_grad_()
        value = norm(x[:, WIDTH : 2 * WIDTH])
        value.backward(torch.randn(WIDTH, 10, generator=torch.Generator().manual_seed(1)).T.to(value.dtype))
        with torch.no_grad():
            unasked = norm(x[:, WIDTH : 2 * WIDTH])
        results.append((value.detach(), unasked, x.grad))
    (expected, _, exact), (value, unasked, gradient) = results
    assert torch.equal(value, expected) and torch.equal(unasked, expected)
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.01}
    torch.testing.assert_close(gradient, exact, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_rows_have_no_gradients(dtype) -> None:
    """A micro-batch in which nothing is predicted has them: some kernels end the process on no rows."""
    lean = nn.ModuleList([make_norm(LlamaRMSNorm, dtype)])
    refine_norms(lean)
    x = torch.zeros(2, 0, WIDTH, dtype=dtype, requires_grad=True)
    lean[0](x).sum().backward()
    assert x.grad.shape == x.shape and lean[0](x.detach()).shape == x.shape


@pytest.mark.parametrize("kind", NORMS)
def test_bfloat16_gradients_are_as_near_to_the_exact_ones_as_autograds(kind) -> None:
    plain, lean, exact = make_norm(kind), nn.ModuleList([make_norm(kind, torch.bfloat16)]), make_norm(kind)
    plain = plain.to(torch.bfloat16)
    exact.weight.copy_(plain.weight)
    refine_norms(lean)
    x, upstream = (draw(seed, torch.bfloat16, num_rows=200) for seed in (0, 3))
    (value, theirs), (mine, ours) = (differentiate(norm, x, upstream) for norm in (plain, lean[0]))
    _, wanted = differentiate(exact, x.float(), upstream.float())
    assert torch.equal(value, mine) and ours.dtype == torch.bfloat16
    assert (ours - wanted).norm() <= 1.01 * (theirs - wanted).norm()


@pytest.mark.parametrize("kind", NORMS)
def test_the_input_alone_is_kept_in_its_own_type(kind) -> None:
    plain, lean = make_norm(kind, torch.bfloat16), nn.ModuleList([make_norm(kind, torch.bfloat16)])
    refine_norms(lean)
    x = draw(0, torch.bfloat16).requires_grad_()
    kept = [count_kept_bytes(norm, lambda norm=norm: norm(x)) for norm in (lean[0], plain)]
    assert lean[0].rounds_first == (kind is LlamaRMSNorm)
    a_number_a_row = 4 * 10 if kind is LlamaRMSNorm else 0
    assert kept[0] == x.numel() * 2 + a_number_a_row
    assert kept[1] >= x.numel() * 4


def test_a_gain_that_is_trained_gets_its_gradient() -> None:
    lean = nn.ModuleList([make_norm(LlamaRMSNorm)])
    refine_norms(lean)
    lean[0].weight.requires_grad_()
    lean[0](draw(0).requires_grad_()).sum().backward()
    plain = make_norm(LlamaRMSNorm)
    plain.weight.requires_grad_()
    plain(draw(0).requires_grad_()).sum().backward()
    torch.testing.assert_close(lean[0].weight.grad, plain.weight.grad)


class ClippedRMSNorm(LlamaRMSNorm):
    """Named like one, and not one."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states).clamp(-1, 1)


class GatedRMSNorm(LlamaRMSNorm):
    """Takes something beside its input."""

    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(hidden_states)


@pytest.mark.parametrize("kind", [ClippedRMSNorm, GatedRMSNorm])
def test_what_is_no_plain_norm_stays_as_it_is(kind) -> None:
    holder = nn.ModuleList([make_norm(kind)])
    assert find_offset(holder[0]) is None
    refine_norms(holder)
    assert type(holder[0]) is kind


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_rms_norm_of_a_family_is_refined_and_once(make_model, family, device) -> None:
    model = make_model(family).to(device)
    num_norms = sum(type(module).__name__.endswith("RMSNorm") for module in model.modules())
    assert (num_norms > 0) == (family not in ("gpt_neox", "gpt2"))
    refine_norms(model)
    refine_norms(model)
    names = [type(module).__name__ for module in model.modules() if isinstance(module, LeanNorm)]
    assert len(names) == num_norms and all(name.count("LeanNorm") == 1 for name in names)


@pytest.mark.parametrize("settings", [LoraSettings(), Ia3Settings()])
def test_adapters_get_the_gradients_of_the_plain_model(make_model, settings) -> None:
    ids = torch.randint(3, 300, (2, 17), generator=torch.Generator().manual_seed(0))
    gradients = []
    for lean in (True, False):
        model = attach_adapter(make_model("llama"), settings)
        for module in model.modules():
            if isinstance(module, LeanNorm) and not lean:
                release_norms(module)
        assert any(isinstance(module, LeanNorm) for module in model.modules()) == lean
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad})
    ours, theirs = gradients
    assert ours.keys() == theirs.keys() and any(gradient.norm() > 0 for gradient in theirs.values())
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6)


def test_pytorch_s_own_norm_is_tried_at_its_width() -> None:
    """Models that bring their own code use it; it takes rows of its own width alone."""
    plain, lean = (nn.RMSNorm(WIDTH, eps=1e-3).requires_grad_(False) for _ in range(2))
    holder = nn.ModuleList([lean])
    refine_norms(holder)
    assert isinstance(holder[0], LeanNorm)
    upstream = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(7))
    (expected, exact), (value, found) = (differentiate(norm, draw(0), upstream) for norm in (plain, holder[0]))
    assert torch.equal(value, expected)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)
