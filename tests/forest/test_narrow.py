"""The last layer computes what predicts something, and nothing that is asked changes by it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PromptTuningConfig, get_peft_model

from koat.core.sequence import Sequence
from koat.forest.build import build_forest
from koat.forest.narrow import find_last_layer
from koat.forest.pieces import cut_row
from koat.forest.score import cut_sequences, token_logprobs
from koat.forest.verify import verify_layout
from koat.forest.walk import Walk


def make_sequences() -> list[Sequence]:
    """Return six answers of two tokens behind one context of thirty."""
    context = tuple(range(10, 40))
    return [Sequence((*context, 50 + n, 60 + n, 70), (False,) * 31 + (True,) * 2) for n in range(6)]


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "gpt2", "gemma2", "qwen2-window"])
def test_log_probabilities_and_gradients_stay(make_model, family) -> None:
    model, sequences = make_model(family), make_sequences()
    layout, _ = verify_layout(model)
    assert layout.narrow
    weight = find_last_layer(model).get_submodule("mlp")
    results = []
    for each in (layout, replace(layout, narrow=False)):
        model.zero_grad(set_to_none=True)
        model.requires_grad_(True)
        (batch,) = cut_sequences(sequences, each, 4096)
        values = token_logprobs(model, batch, each)
        values.sum().backward()
        results.append([values.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > len(list(weight.parameters()))
    for left, right in zip(*results, strict=True):
        assert float((left - right).abs().max()) <= 1e-5 * max(1.0, float(right.abs().max()))


def test_the_last_block_sees_predicting_tokens_alone(make_model) -> None:
    model = make_model("llama")
    layout, _ = verify_layout(model)
    (batch,) = cut_sequences(make_sequences(), layout, 4096)
    seen: list[int] = []
    layers = model.model.layers
    handles = [layer.mlp.act_fn.register_forward_hook(lambda m, i, output: seen.append(output.shape[:-1].numel()))
               for layer in layers]  # fmt: skip
    with torch.no_grad():
        token_logprobs(model, batch, layout)
    for handle in handles:
        handle.remove()
    # Thirty of context, two a question of which each predicts: the last token is never an input.
    assert seen == [42] * (len(layers) - 1) + [12]


def test_the_last_layer_s_attention_answers_predicting_tokens_alone(make_model, monkeypatch) -> None:
    model = make_model("llama")
    layout, _ = verify_layout(model)
    assert layout.plan is not None and layout.plan.kernel == "walk"
    (batch,) = cut_sequences(make_sequences(), layout, 4096)
    answered: dict[int | None, set[int]] = {}
    attend = Walk.attend

    def watch(walk, query, key, value, window, scaling, layer):
        pieces = walk.list_pieces(window, layer)
        places = [range(p.start, p.stop) if p.queries is None else p.queries.tolist() for p in pieces]
        answered.setdefault(layer, set()).update(place for each in places for place in each)
        return attend(walk, query, key, value, window, scaling, layer)

    monkeypatch.setattr(Walk, "attend", watch)
    with torch.no_grad():
        token_logprobs(model, batch, layout)
    predicting = set(batch.source.tolist())
    assert len(predicting) == 12 and batch.token_ids.shape == (1, 42)
    assert answered == {0: set(range(42)), 1: set(range(42)), 2: predicting}


def test_it_stands_back_where_layers_are_computed_again(make_model) -> None:
    model = make_model("llama")
    layout, _ = verify_layout(model)
    (batch,) = cut_sequences(make_sequences(), layout, 4096)
    expected = token_logprobs(model.requires_grad_(True), batch, layout)
    expected.sum().backward()
    gradient = model.model.layers[-1].mlp.up_proj.weight.grad.clone()
    model.zero_grad(set_to_none=True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    found = token_logprobs(model, batch, layout)
    found.sum().backward()
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(model.model.layers[-1].mlp.up_proj.weight.grad, gradient, atol=1e-5)


def test_pieces_answer_only_who_asks() -> None:
    bodies = [tuple(range(300)) + (1000 + branch,) * 40 for branch in range(3)]
    forest = build_forest([Sequence(body, (False,) * 339 + (True,)) for body in bodies])
    asking = np.zeros(len(forest), dtype=bool)
    asking[forest.source] = True
    seen = torch.zeros(len(forest), len(forest), dtype=torch.int)
    for piece in cut_row(0, forest.position, forest.subtree_end, None, asking):
        keys = torch.arange(len(forest))[piece.keys]
        visible = torch.ones(len(piece.queries), len(keys)) if piece.adds else piece.mask == 0
        for row, query in enumerate(piece.queries.tolist()):
            seen[query].index_add_(0, keys, visible[row].int())
    for query in range(len(forest)):
        ancestors = (forest.subtree_end > query) & (np.arange(len(forest)) <= query)
        assert seen[query].tolist() == (ancestors & asking[query]).astype(int).tolist()


@pytest.mark.parametrize("prompted", [False, True])
def test_what_predicts_is_found_once_and_on_the_processor(make_model, monkeypatch, prompted) -> None:
    model = make_model("llama")
    if prompted:
        model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    layout, _ = verify_layout(model)
    assert layout.narrow
    batches = list(cut_sequences([*make_sequences(), Sequence((5, 6, 7, 8), (False, True, True, True))], layout, 4096))
    with torch.no_grad():
        expected = [token_logprobs(model, replace(batch, distinct=None), layout) for batch in batches]
        monkeypatch.setattr("torch.unique", lambda *_, **__: pytest.fail("a GPU would be waited for"))
        found = [token_logprobs(model, batch, layout) for batch in batches]
    assert len(found) and all(map(torch.equal, found, expected))
