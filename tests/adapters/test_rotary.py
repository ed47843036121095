"""Lean rotary positions: the model's own bits forwards and backwards, in layers that are known to turn so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gpt_neox import modeling_gpt_neox as gpt_neox
from transformers.models.llama import modeling_llama as llama

from benchmarks.kept import count_kept_bytes
from koat.adapters import rotary
from koat.adapters.attach import attach_adapter
from koat.adapters.merge import merge_adapter
from koat.adapters.methods import Ia3Settings, LoraSettings
from koat.adapters.rotary import LeanRotary, make_rotation, refine_rotary, release_rotary, swap_halves, turns_alike
from tests.family_models import FAMILIES, make_family

TURNED = {name for name in FAMILIES if not name.startswith(("bloom", "gpt2", "gpt_bigcode", "gptj", "opt"))}
IDS = torch.randint(3, 300, (2, 17), generator=torch.Generator().manual_seed(0))


def list_lean(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, LeanRotary)]


def draw_angles(rows: int, length: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return cosines and sines whose halves differ, which no model has: a half that is mixed up shows."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, length, width, generator=generator).to(dtype) for _ in range(2)]


def differentiate(rotation: Any, layout: str, width: int, angles: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return turned queries and keys and the gradient of the projection that they were cut out of."""
    generator, dtype = torch.Generator().manual_seed(0), angles[0].dtype
    shape = (2, 9, 4, 3 * width)
    projected = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    query, key, _ = projected.transpose(1, 2).chunk(3, -1)
    if layout == "shared keys":
        key = key[:, :2]
    turned = rotation(query, key, *angles)
    upstream = [torch.randn(each.shape, generator=generator).to(dtype) for each in turned]
    return [*(each.detach() for each in turned), *torch.autograd.grad(turned, projected, upstream)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("layout", ["a key for each query", "shared keys"])
@pytest.mark.parametrize(("width", "turned"), [(16, 16), (24, 24), (64, 16), (12, 6)])
def test_values_and_gradients_are_transformers_to_the_bit(width, turned, layout, rows, dtype) -> None:
    angles = draw_angles(rows, 9, turned, dtype)
    plain = gpt_neox.apply_rotary_pos_emb if turned < width else llama.apply_rotary_pos_emb
    expected = differentiate(plain, layout, width, angles)
    found = differentiate(make_rotation(plain, takes_parts=True), layout, width, angles)
    assert rotary.is_served(found[0], found[1], *angles, takes_parts=True)
    assert all(torch.equal(mine, right) for mine, right in zip(found, expected, strict=True))


@pytest.mark.parametrize("size", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", ["whole", "cut out", "begins in between"])
def test_halves_change_places(size, form) -> None:
    rows = torch.arange(3 * 64, dtype=torch.float32).to(size).view(3, 64)
    given = {"whole": rows, "cut out": rows[:, 16:48], "begins in between": rows.flatten()[1:65].view(2, 32)}[form]
    half = given.shape[-1] // 2
    assert torch.equal(swap_halves(given), torch.cat((given[:, half:], given[:, :half]), -1))


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_that_turns_so_is_refined_and_no_other(name) -> None:
    model = make_family(name)
    classes = {type(module) for module in model.modules()}
    refine_rotary(model)
    refine_rotary(model)
    lean = list_lean(model)
    assert len(lean) == (model.config.num_hidden_layers if name in TURNED else 0)
    assert all(type(module).__name__.count("LeanRotary") == 1 for module in lean)
    release_rotary(model)
    assert {type(module) for module in model.modules()} == classes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(TURNED))
def test_a_model_computes_the_same_bits(name, dtype, monkeypatch) -> None:
    turned: list[int] = []
    turn = rotary.turn
    monkeypatch.setattr(rotary, "turn", lambda *given, **options: turned.append(1) or turn(*given, **options))
    results = []
    for refines in (False, True):
        model = make_family(name).to(dtype)
        if refines:
            assert not turned, "another model is left alone"
            refine_rotary(model)
            turned.clear()  # it tries functions that it does not know yet
        embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits
        logits.float().square().mean().backward()
        results.append((logits.detach(), embedded.grad))
    # OLMo 2 turns in float32 whatever its type; Falcon with ALiBi has the function and does not call it.
    assert bool(turned) == (name != "falcon-alibi" and (name, dtype) != ("olmo2", torch.bfloat16))
    (expected, exact), (logits, gradient) = results
    assert torch.equal(logits, expected) and torch.equal(gradient, exact)


def test_what_is_kept_stays_the_same(make_model) -> None:
    kept = []
    for refines in (False, True):
        model = make_model("gpt_neox")
        if refines:
            refine_rotary(model)
        embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
        kept.append(count_kept_bytes(model, lambda model=model, x=embedded: model(inputs_embeds=x, use_cache=False)))
    assert kept[0] >= kept[1] > 0


@pytest.mark.parametrize("settings", [LoraSettings(), Ia3Settings()])
def test_adapters_are_trained_on_it_and_merged_models_are_plain(make_model, settings) -> None:
    model = attach_adapter(make_model("llama"), settings)
    assert list_lean(model)
    merged = merge_adapter(model)
    assert not list_lean(merged)
    assert {type(layer.self_attn) for layer in merged.model.layers} == {llama.LlamaAttention}


def test_a_type_or_a_call_that_is_not_known_goes_to_the_models_own(monkeypatch) -> None:
    asked: list[Any] = []

    def plain(query, key, cos, sin, unsqueeze_dim=1):
        asked.append(unsqueeze_dim)
        return llama.apply_rotary_pos_emb(query, key, cos, sin, unsqueeze_dim)

    rotate = make_rotation(plain, takes_parts=False)
    wide, short = draw_angles(2, 9, 16, torch.float32), draw_angles(2, 9, 16, torch.bfloat16)
    heads = torch.randn(2, 4, 9, 16)
    assert torch.equal(rotate(heads, heads, *wide)[0], llama.apply_rotary_pos_emb(heads, heads, *wide)[0])
    assert asked == []
    rotate(heads.bfloat16(), heads.bfloat16(), *wide)  # cosines in float32: products are float32
    rows = heads.transpose(1, 2)
    assert torch.equal(rotate(rows, rows, *wide, unsqueeze_dim=2)[0], plain(rows, rows, *wide, unsqueeze_dim=2)[0])
    with pytest.raises(RuntimeError, match="must match"):
        rotate(torch.randn(2, 4, 9, 32), heads, *wide)
    rotate(heads[0], heads[0], *(each[:1, None] for each in wide), 0)
    assert asked == [1, 2, 2, 1, 0]
    rotate(heads.bfloat16(), heads.bfloat16(), *short)
    assert asked == [1, 2, 2, 1, 0]


def turn_neighbours(query: Any, key: Any, cos: Any, sin: Any) -> Any:
    """Turn number 2 i with number 2 i + 1, as GPT-J does."""

    def turn(x: torch.Tensor) -> torch.Tensor:
        crossed = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        return x * cos[:, None] + crossed * sin[:, None]

    return turn(query), turn(key)


def turn_on_a_gpu(query: Any, key: Any, cos: Any, sin: Any) -> Any:
    assert query.is_cuda
    return query, key


OTHERS = [turn_neighbours, turn_on_a_gpu, lambda query, key: (query, key), lambda *given: given[0], None]


@pytest.mark.parametrize("other", OTHERS)
def test_what_turns_otherwise_is_found_out(other) -> None:
    assert turns_alike(llama.apply_rotary_pos_emb, 1.0) and not turns_alike(llama.apply_rotary_pos_emb, 0.5)
    assert turns_alike(gpt_neox.apply_rotary_pos_emb, 1.0) and turns_alike(gpt_neox.apply_rotary_pos_emb, 0.5)
    assert not turns_alike(other, 1.0)
