"""Choice scores against plain passes of one sequence, in any order and any cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from koat.core.errors import ModelError
from koat.core.sequence import supervise_from
from koat.evaluation import scorer
from koat.evaluation.catalogue import load_task
from koat.evaluation.harvest import draw_shots, read_items
from koat.evaluation.protocol import ChoiceRequest, build_requests
from koat.evaluation.scorer import score_requests
from koat.evaluation.task import adjust_task
from koat.forest.score import make_padded
from koat.forest.verify import verify_layout

LABELS = {"0": " 부정", "1": " 긍정", "2": " 또 보고 싶다"}


@pytest.fixture(scope="module")
def requests(reviews: dict[str, str], tokenizer: Any) -> list[ChoiceRequest]:
    """Twenty items with two shots each and three choices, of which one is several tokens long."""
    task = adjust_task(load_task("nsmc-prompt1"), num_shots=2).model_copy(update={"labels": LABELS})
    items = read_items(reviews["test"], task).items[:20]
    shots = draw_shots(read_items(reviews["train"], task).items, task, len(items))
    return build_requests(task, items, shots, tokenizer).requests


def list_values(scored: Any) -> Any:
    return torch.tensor([score.choice_logprobs for score in scored.scores])


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("shared", [True, False])
def test_choices_score_as_in_a_plain_pass(
    family: str, shared: bool, make_model: Callable[..., Any], score_singly: Callable[..., Any],
    requests: list[ChoiceRequest], tokenizer: Any,
) -> None:  # fmt: skip
    model = make_model(family, vocab_size=len(tokenizer), max_position_embeddings=2048)
    layout = verify_layout(model)[0]
    assert layout.shares
    scored = score_requests(model, layout if shared else make_padded(True), requests)
    for request, score in zip(requests, scored.scores, strict=True):
        start = len(request.context_ids)
        singly = score_singly(model, [supervise_from(request.context_ids + ids, start) for ids in request.choices])
        expected = [float(values[start:].sum()) for values in singly]
        assert score.choice_logprobs == pytest.approx(expected, abs=1e-5 * max(1.0, max(map(abs, expected))))
        assert score.choice_num_tokens == tuple(map(len, request.choices))
        given = torch.tensor([request.context_ids])
        generated = model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=1, do_sample=False, pad_token_id=0
        )
        assert score.greedy_token_id == int(generated[0, -1])


def test_scores_do_not_move_with_budget_order_or_company(
    model: Any, requests: list[ChoiceRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = verify_layout(model)[0]
    whole = score_requests(model, layout, requests)
    assert len({score.greedy_token_id for score in whole.scores}) > 1
    order = torch.randperm(len(requests), generator=torch.Generator().manual_seed(3)).tolist()
    for block in (256, 3):
        monkeypatch.setattr(scorer, "BLOCK", block)
        for budget in (1, 200, 100_000):
            moved = score_requests(model, layout, [requests[index] for index in order], token_budget=budget)
            assert torch.allclose(list_values(moved), list_values(whole)[order], atol=1e-5, rtol=1e-5)
            greedy = [score.greedy_token_id for score in moved.scores]
            assert greedy == [whole.scores[index].greedy_token_id for index in order]
    alone = [score_requests(model, layout, [request]).scores[0] for request in requests[:3]]
    assert torch.allclose(
        torch.tensor([score.choice_logprobs for score in alone]), list_values(whole)[:3], atol=1e-5, rtol=1e-5
    )


def test_choices_of_an_item_share_its_context(model: Any, requests: list[ChoiceRequest]) -> None:
    layout = verify_layout(model)[0]
    scored = score_requests(model, layout, requests)
    pairs = [len(request.context_ids) + len(choice) for request in requests for choice in request.choices]
    once = sum(len(request.context_ids) + sum(map(len, request.choices)) for request in requests)
    assert scored.num_tokens == sum(pairs)
    assert scored.num_unique_tokens <= once < scored.num_tokens / 2
    assert score_requests(model, make_padded(), requests).num_unique_tokens == sum(pairs) - len(
        pairs
    )  # last tokens predict nothing


def test_requests_that_are_equal_get_equal_scores(model: Any, requests: list[ChoiceRequest]) -> None:
    layout = verify_layout(model)[0]
    twice = score_requests(model, layout, [requests[0], requests[1], requests[0]])
    assert twice.scores[0] == twice.scores[2] != twice.scores[1]


def test_progress_counts_up_to_all(model: Any, requests: list[ChoiceRequest], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer, "BLOCK", 8)
    seen: list[tuple[int, int]] = []
    score_requests(model, verify_layout(model)[0], requests, on_progress=lambda *counts: seen.append(counts))
    assert seen == [(8, 20), (16, 20), (20, 20)]


def test_dropout_is_off_while_scoring_and_back_afterwards(
    make_model: Callable[..., Any], requests: list[ChoiceRequest], tokenizer: Any
) -> None:
    noisy = make_model("gpt_neox", vocab_size=len(tokenizer), hidden_dropout=0.5).train()
    layout = verify_layout(noisy)[0]
    first, second = (score_requests(noisy, layout, requests[:4]) for _ in range(2))
    assert first == second
    assert noisy.training


def test_broken_weights_are_an_error_not_a_score(
    make_model: Callable[..., Any], requests: list[ChoiceRequest], tokenizer: Any
) -> None:
    broken = make_model("llama", vocab_size=len(tokenizer))
    layout = verify_layout(broken)[0]
    broken.model.norm.weight.data[0] = float("nan")
    with pytest.raises(ModelError, match="not numbers"):
        score_requests(broken, layout, requests[:2])


def test_an_empty_context_is_refused(model: Any) -> None:
    layout = make_padded()
    for request in (ChoiceRequest("a", (), ((1,), (2,)), 0), ChoiceRequest("a", (1,), ((1,), ()), 0)):
        with pytest.raises(ValueError, match="empty context or choice"):
            score_requests(model, layout, [request])
