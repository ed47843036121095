"""T-Few's losses against their formulas, from one plain pass per answer."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from koat.adapters.attach import attach_adapter
from koat.adapters.methods import FullSettings, Ia3Settings, LoraSettings
from koat.core.sequence import Sequence, supervise_from
from koat.forest.score import make_padded
from koat.forest.verify import verify_layout
from koat.training.loop import accumulate_gradients

METHODS = {"ia3": Ia3Settings(), "lora": LoraSettings(r=4), "full": FullSettings()}
PROMPT = (5, 9, 17, 3, 88)
EXAMPLES = [
    supervise_from((*PROMPT, 41, 7, 2), 5),
    Sequence((*PROMPT, 12, 41, 2), (False,) * 5 + (True,) * 3, "a", ((12, 50, 51, 2), (60, 2))),
    Sequence((*PROMPT, 99, 30, 2), (False,) * 6 + (True,) * 2, "a", ((31, 2),)),
    Sequence((7, 8, 30, 2), (False,) * 2 + (True,) * 2, "b", ((31, 77, 78, 2), (30, 30, 2), (32, 2))),
]


def compute_loss(model: Any, unlikelihood: float, choice_loss: float) -> torch.Tensor:
    """Return the step's loss as the paper writes it, answer after answer."""

    def score(given: tuple[int, ...], answer: tuple[int, ...]) -> torch.Tensor:
        logits = model(input_ids=torch.tensor([given + answer]), use_cache=False).logits[0]
        places = range(len(given) - 1, len(given) + len(answer) - 1)
        return torch.stack([logits[at].log_softmax(-1)[token] for at, token in zip(places, answer, strict=True)])

    right, wrong, contrasts = [], [], []
    for example in EXAMPLES:
        start = example.supervised.index(True)
        given, answer = example.token_ids[:start], example.token_ids[start:]
        right.append(score(given, answer))
        others = [score(given, other) for other in example.alternatives]
        wrong += others
        if others:
            means = torch.stack([scores.mean() for scores in (right[-1], *others)])
            contrasts.append(-(means[0].exp() / means.exp().sum()).log())
    mean_unlikely = -torch.log(1 - torch.cat(wrong).exp() + 0.01).mean()
    return -torch.cat(right).mean() + unlikelihood * mean_unlikely + choice_loss * torch.stack(contrasts).mean()


def compute_gradients(
    model: Any, unlikelihood: float, choice_loss: float
) -> tuple[float, list[Any], list[torch.Tensor]]:
    """Return the formulas' loss, the weights that are trained, and their gradients."""
    expected = compute_loss(model.get_base_model(), unlikelihood, choice_loss)
    expected.backward()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return float(expected.detach()), trained, [weight.grad.clone() for weight in trained]


@pytest.mark.parametrize(("unlikelihood", "choice_loss"), [(1.0, 0.0), (0.0, 1.0), (0.5, 2.0)])
@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradient_are_the_formulas(
    method: str,
    unlikelihood: float,
    choice_loss: float,
    make_model: Callable[..., Any],
    make_settings: Callable[..., Any],
    randomise: Callable[..., None],
    accelerator: Any,
) -> None:
    model = attach_adapter(make_model("llama"), METHODS[method])
    randomise(model, spread=0.1)
    expected, trained, gradients = compute_gradients(model, unlikelihood, choice_loss)
    forest, _ = verify_layout(model)
    for layout in (forest, make_padded()):
        for budget in (4096, 16, 5):
            model.zero_grad()
            weights = {"unlikelihood": unlikelihood, "choice_loss": choice_loss}
            settings = make_settings(tokens_per_microbatch=budget, **weights)
            loss, _ = accumulate_gradients(model, EXAMPLES, layout, settings, accelerator)
            assert loss == pytest.approx(expected, rel=1e-5)
            far = sum(float((w.grad - g).square().sum()) for w, g in zip(trained, gradients, strict=True))
            assert far**0.5 < 1e-5 * sum(float(gradient.square().sum()) for gradient in gradients) ** 0.5


def pretend_process(rank: int, accelerator: Any) -> Any:
    """Return one of two processes that each keep their own part of what is summed: the parts add up outside."""
    return SimpleNamespace(
        num_processes=2,
        process_index=rank,
        device=accelerator.device,
        autocast=accelerator.autocast,
        reduce=lambda tensor, reduction: tensor if reduction == "sum" else tensor / 2,
    )


@pytest.mark.parametrize(("unlikelihood", "choice_loss"), [(0.0, 0.0), (0.5, 2.0)])
@pytest.mark.parametrize("method", METHODS)
def test_the_parts_of_two_processes_add_up_to_the_whole_step(
    method: str,
    unlikelihood: float,
    choice_loss: float,
    make_model: Callable[..., Any],
    make_settings: Callable[..., Any],
    randomise: Callable[..., None],
    accelerator: Any,
) -> None:
    """The first has six of ten supervised tokens and one of three choices: no count of its own is half the step's."""
    model = attach_adapter(make_model("llama"), METHODS[method])
    randomise(model, spread=0.1)
    expected, trained, gradients = compute_gradients(model, unlikelihood, choice_loss)
    settings = make_settings(unlikelihood=unlikelihood, choice_loss=choice_loss)
    layout, _ = verify_layout(model)
    losses, parts = [], []
    for rank in (0, 1):
        model.zero_grad()
        losses.append(accumulate_gradients(model, EXAMPLES, layout, settings, pretend_process(rank, accelerator))[0])
        parts.append([weight.grad.clone() for weight in trained])
    assert sum(losses) == pytest.approx(expected, rel=1e-5)
    far = sum(float((a + b - g).square().sum()) for a, b, g in zip(*parts, gradients, strict=True))
    assert far**0.5 < 1e-5 * sum(float(gradient.square().sum()) for gradient in gradients) ** 0.5


def test_both_passes_draw_the_same_dropout(
    make_model: Callable[..., Any], make_settings: Callable[..., Any], accelerator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import koat.training.loop as loop

    model = attach_adapter(make_model("llama"), LoraSettings(r=4, dropout=0.5)).train()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_()
    seen: list[torch.Tensor] = []
    score = loop.token_logprobs
    monkeypatch.setattr(loop, "token_logprobs", lambda *given: seen.append(score(*given)) or seen[-1])
    layout, _ = verify_layout(model)
    settings = make_settings(tokens_per_microbatch=8, choice_loss=1.0, noise=2.0)
    accumulate_gradients(model, EXAMPLES, layout, settings, accelerator)
    half = len(seen) // 2
    assert half > 1
    for first, second in zip(seen[:half], seen[half:], strict=True):
        assert torch.equal(first, second.detach()) and second.requires_grad and not first.requires_grad


def test_without_weights_wrong_answers_cost_nothing(
    make_model: Callable[..., Any], make_settings: Callable[..., Any], accelerator: Any
) -> None:
    model = attach_adapter(make_model("llama"), Ia3Settings())
    layout, _ = verify_layout(model)
    plain = [Sequence(each.token_ids, each.supervised, each.group) for each in EXAMPLES]
    found = [accumulate_gradients(model, each, layout, make_settings(), accelerator) for each in (EXAMPLES, plain)]
    assert found[0] == found[1]
