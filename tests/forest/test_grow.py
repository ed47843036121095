"""Prompts that grow as a forest write what transformers' own greedy search writes behind each prompt alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from koat.core.sequence import supervise_from
from koat.forest.grow import grow_forest
from koat.forest.probe import single_logprobs
from koat.forest.twin import make_twin
from koat.forest.verify import verify_layout
from koat.forest.verify_growth import verify_growth

FAMILIES = ["gpt_neox", "llama", "mistral", "qwen2-window", "qwen3", "gpt2", "gemma2", "granite", "opt"]
NUM_NEW = 10


def draw_prompts(seed: int) -> list[tuple[int, ...]]:
    """Return prompts of two articles, one prompt inside another, one twice, and a stranger."""
    rng = np.random.default_rng(seed)

    def draw(length: int) -> tuple[int, ...]:
        return tuple(int(token) for token in rng.integers(2, 90, length))

    articles = [draw(14), draw(9)]
    prompts = [article + draw(int(rng.integers(1, 7))) for article in articles for _ in range(3)]
    return [*prompts, articles[0], prompts[1], draw(5)]


def write_singly(model, prompt: tuple[int, ...]) -> list[int]:
    """Return what plain passes over the whole text find likeliest, token by token."""
    ids = list(prompt)
    model.config._attn_implementation = "eager" if model.config._attn_implementation == "eager" else "sdpa"
    with torch.no_grad():
        for _ in range(NUM_NEW):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def go_on(places: list[int], written: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(places), dtype=torch.bool)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_writes_what_single_prompts_are_continued_with(make_model, family: str) -> None:
    capped = family == "gemma2"  # SDPA would leave the caps out: koat loads it with eager attention
    model, prompts = make_model(family, "eager" if capped else None), draw_prompts(1)
    layout, _ = verify_layout(model)
    assert verify_growth(model, layout)
    for budget in (4096, 40):
        grown, _ = grow_forest(model, layout, prompts, NUM_NEW, go_on, token_budget=budget)
        assert [each.token_ids for each in grown] == [write_singly(model, prompt) for prompt in prompts]
    wholes = [supervise_from(p + tuple(g.token_ids), len(p)) for p, g in zip(prompts, grown, strict=True)]
    for each, expected in zip(grown, single_logprobs(model, wholes), strict=True):
        assert each.logprobs == pytest.approx(expected.tolist(), rel=1e-5, abs=1e-5)


def test_each_prompt_ends_at_its_own_token(make_model) -> None:
    model, prompts = make_model("llama"), draw_prompts(2)
    layout, _ = verify_layout(model)
    whole = [each.token_ids for each in grow_forest(model, layout, prompts, NUM_NEW, go_on)[0]]
    lengths = [1 + number % NUM_NEW for number in range(len(prompts))]

    def is_done(places: list[int], written: torch.Tensor) -> torch.Tensor:
        return torch.tensor([written.shape[1] == lengths[place] for place in places])

    cut = [each.token_ids for each in grow_forest(model, layout, prompts, NUM_NEW, is_done, token_budget=50)[0]]
    assert cut == [ids[:length] for ids, length in zip(whole, lengths, strict=True)]


def test_prompts_that_do_not_grow_together_keep_their_places(make_model) -> None:
    """With 5 tokens a pass for 10 new ones, prompts grow two at a time: the rest wait, and each gets its own."""
    model, prompts = make_model("llama"), draw_prompts(4)
    layout, _ = verify_layout(model)
    asked: list[tuple[int, ...]] = []

    def is_done(places: list[int], written: torch.Tensor) -> torch.Tensor:
        asked.append(tuple(places))
        return go_on(places, written)

    grown, _ = grow_forest(model, layout, prompts, NUM_NEW, is_done, token_budget=5)
    assert [each.token_ids for each in grown] == [write_singly(model, prompt) for prompt in prompts]
    together = list(dict.fromkeys(asked))
    assert sorted(place for places in together for place in places) == list(range(len(prompts)))
    assert len(together) >= 5 and max(map(len, together)) <= 2


def test_what_prompts_share_goes_through_the_model_once(make_model) -> None:
    model, article = make_model("llama"), tuple(range(2, 42))
    prompts = [(*article, 50 + number, 60) for number in range(6)]
    layout, _ = verify_layout(model)
    seen: list[int] = []
    handle = model.get_input_embeddings().register_forward_hook(lambda m, i, o: seen.append(o.shape[:-1].numel()))
    _, num_tokens = grow_forest(model, layout, prompts, 3, go_on)
    assert seen == [40 + 6 * 2, 6, 6]
    assert num_tokens == sum(seen)
    seen.clear()
    # All but the last prompt are done after a token; they go on with it, and are counted.
    grown, num_tokens = grow_forest(
        model, layout, prompts, 3, lambda places, ids: torch.tensor([place < 5 for place in places])
    )
    handle.remove()
    assert [len(each.token_ids) for each in grown] == [1] * 5 + [3]
    assert num_tokens == sum(seen) == 40 + 6 * 2 + 6 + 6


def test_growth_is_refused_where_it_is_not_exact(make_model, monkeypatch, caplog) -> None:
    """A soft prompt, a layout without sharing, and a mask that shows a prompt what its neighbour writes."""
    model = make_model("llama")
    layout, _ = verify_layout(model)
    assert not verify_growth(model, replace(layout, plan=None))
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    assert not verify_growth(get_peft_model(make_model("llama"), config), layout)
    ones = torch.ones
    assert not caplog.text
    monkeypatch.setattr("koat.forest.grow.torch.eye", lambda size, **options: ones(size, size, **options))
    assert not verify_growth(model, layout)
    assert "left-padded batches" in caplog.text and "log-probabilities differ by" in caplog.text


def test_growth_that_fails_is_said_with_what_is_done_instead(make_model, monkeypatch, caplog) -> None:
    def fail(*given, **more):
        raise TypeError("no caches\nhere")

    model = make_model("llama")
    layout, _ = verify_layout(model)
    monkeypatch.setattr("koat.forest.verify_growth.grow_forest", fail)
    assert not verify_growth(model, layout)
    assert "left-padded batches" in caplog.text and "TypeError: no caches here" in caplog.text


def test_growth_is_judged_once_for_a_model_and_layout(make_model, monkeypatch) -> None:
    """Of memory that ran out nothing is remembered."""
    twins: list[object] = []

    def count(*given, **more):
        twins.append(given)
        if len(twins) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return make_twin(*given, **more)

    monkeypatch.setattr("koat.forest.verify_growth.make_twin", count)
    model = make_model("llama")
    layout, _ = verify_layout(model)
    with pytest.raises(torch.OutOfMemoryError):
        verify_growth(model, layout)
    assert verify_growth(model, layout)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    assert verify_growth(model, replace(layout)) and verify_growth(adapted, layout)
    assert len(twins) == 2
    assert verify_growth(model, replace(layout, max_row_length=layout.max_row_length + 1))
    assert verify_growth(make_model("llama"), layout)
    assert len(twins) == 4


@pytest.mark.parametrize("spoilt", [0, 1, 4])
def test_growth_without_finite_numbers_is_not_exact(make_model, monkeypatch, spoilt: int) -> None:
    def spoil(*given, **more):
        grown, num_tokens = grow_forest(*given, **more)
        grown[spoilt].logprobs[-1] = float("nan")
        return grown, num_tokens

    model = make_model("llama")
    layout, _ = verify_layout(model)
    assert verify_growth(model, layout)
    monkeypatch.setattr("koat.forest.verify_growth.grow_forest", spoil)
    assert not verify_growth(make_model("llama"), layout)
