"""The head, row by row and in chunks, against a plain log-softmax of a model's own logits."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from koat.forest import head as koats_head
from koat.forest.head import compute_logits, gather_logprobs, head_logprobs, head_scores
from koat.forest.pack import find_distinct

FAMILIES = ["gpt_neox", "llama", "gpt2", "gemma2", "granite"]
ROW_BYTES = 4 * 300


def draw_predictions(model, seed: int = 0):
    """Return hidden states `[24, 64]` and 40 predictions from 13 of them, unsorted, many from one row."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(24, 64, generator=generator)
    rows = torch.randperm(24, generator=generator)[:13]
    source = torch.cat([rows, rows[torch.randint(0, 13, (27,), generator=generator)]])
    return hidden, source, torch.randint(0, 300, (40,), generator=generator)


def apply_own_head(model, hidden):
    """Return the logits that the model's own forward pass makes of given last hidden states `[N, d]`."""
    hook = model.base_model.register_forward_hook(lambda *_: _replace_last(_[-1], hidden[None]))
    try:
        return model(input_ids=torch.zeros(1, len(hidden), dtype=torch.long), use_cache=False).logits[0]
    finally:
        hook.remove()


def _replace_last(output, hidden):
    output.last_hidden_state = hidden
    return output


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_models_own(make_model, family) -> None:
    model = make_model(family)
    hidden, _, _ = draw_predictions(model)
    assert torch.equal(compute_logits(model, hidden), apply_own_head(model, hidden))


def test_gather_is_a_log_softmax() -> None:
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(0)) * 50
    row, target = torch.tensor([4, 0, 0, 2]), torch.tensor([29, 0, 7, 11])
    expected = torch.log_softmax(logits, -1)[row, target]
    torch.testing.assert_close(gather_logprobs(logits, row, target), expected, rtol=1e-6, atol=1e-6)
    halved = gather_logprobs(logits.bfloat16(), row, target)
    expected = torch.log_softmax(logits.bfloat16().float(), -1)[row, target]
    assert halved.dtype == torch.float32
    torch.testing.assert_close(halved, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cached_rows", [1, 2, 5, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_gradient_is_a_log_softmaxs_however_few_rows_fit_the_cache(monkeypatch, cached_rows, dtype) -> None:
    monkeypatch.setattr("koat.forest.head.CACHE_BYTES", cached_rows * 4 * 30)
    generator = torch.Generator().manual_seed(2)
    logits, weight = (torch.randn(5, 30, generator=generator) * 5).to(dtype), torch.randn(6, generator=generator)
    row, target = torch.tensor([4, 0, 0, 2, 4, 4]), torch.tensor([29, 7, 7, 11, 0, 29])  # row 0 has one target twice
    ours, plain = logits.clone().requires_grad_(), logits.float().requires_grad_()
    (gather_logprobs(ours, row, target) * weight).sum().backward()
    (torch.log_softmax(plain, -1)[row, target] * weight).sum().backward()
    assert ours.grad.dtype == dtype
    assert not ours.grad[1].any() and not ours.grad[3].any()
    rounding = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-2}
    torch.testing.assert_close(ours.grad.float(), plain.grad, **rounding)


@pytest.mark.parametrize("rows_at_once", [0.5, 1, 2, 5, 12, 13, 100])
@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_change_neither_values_nor_gradients(make_model, family, rows_at_once) -> None:
    model = make_model(family)
    hidden, source, target = draw_predictions(model)
    weight = torch.randn(40, generator=torch.Generator().manual_seed(1))
    head = model.get_output_embeddings().weight.requires_grad_(True)

    plain = hidden.clone().requires_grad_(True)
    expected = torch.log_softmax(apply_own_head(model, plain), -1)[source, target]
    expected_gradients = torch.autograd.grad((expected * weight).sum(), [plain, head])

    again = hidden.clone().requires_grad_(True)
    found = head_logprobs(model, again, source, target, chunk_bytes=int(rows_at_once * ROW_BYTES))
    gradients = torch.autograd.grad((found * weight).sum(), [again, head])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("rows_at_once", [1, 4, 100])
def test_scores_and_the_likeliest_token(make_model, rows_at_once) -> None:
    model = make_model("gemma2")
    hidden, source, target = draw_predictions(model)
    logits = apply_own_head(model, hidden)
    logprobs, greedy = head_scores(model, hidden, source, target, chunk_bytes=rows_at_once * ROW_BYTES)
    expected = torch.log_softmax(logits, -1)[source, target]
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(greedy, logits[source].argmax(-1))


@pytest.mark.parametrize("rows_at_once", [1, 4, 13])
def test_only_wanted_rows_go_through_the_head(make_model, rows_at_once) -> None:
    model = make_model("llama")
    hidden, source, target = draw_predictions(model)
    sizes: list[int] = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    with torch.no_grad():
        head_logprobs(model, hidden, source, target, chunk_bytes=rows_at_once * ROW_BYTES)
    hook.remove()
    assert sum(sizes) == 13
    assert max(sizes) == rows_at_once


def test_nothing_to_predict(make_model) -> None:
    model = make_model("llama")
    none = torch.empty(0, dtype=torch.long)
    assert head_logprobs(model, torch.randn(4, 64), none, none).shape == (0,)
    assert [len(part) for part in head_scores(model, torch.randn(4, 64), none, none)] == [0, 0]


@pytest.mark.parametrize("num_times", [1, 300])
@pytest.mark.parametrize("margin", [2.0, 6.0, 9.0])
def test_nearly_sure_and_repeated_targets_keep_their_gradient_in_bfloat16(margin, num_times) -> None:
    """`1 - p` is small there: rounded before the difference is taken, nothing right is left of it."""
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(3)).bfloat16()
    logits[torch.arange(4), torch.arange(4)] += margin
    row = target = torch.arange(4).repeat(num_times)
    ours, plain = logits.clone().requires_grad_(), logits.float().requires_grad_()
    gather_logprobs(ours, row, target).sum().backward()
    torch.log_softmax(plain, -1)[row, target].sum().backward()
    torch.testing.assert_close(ours.grad.float(), plain.grad, rtol=2**-8, atol=0)


@pytest.mark.parametrize("rows_at_once", [1, 4, 13])
def test_rows_known_beforehand_change_no_bit(make_model, rows_at_once, monkeypatch) -> None:
    """And nothing is asked of a GPU but the chunks' bounds, once."""
    model = make_model("llama").requires_grad_(True)
    hidden, source, target = draw_predictions(model)
    ask, asked, results = torch.Tensor.tolist, [], []
    for distinct in (None, find_distinct(source)):
        model.zero_grad(set_to_none=True)
        states = hidden.clone().requires_grad_(True)
        found = head_logprobs(model, states, source, target, rows_at_once * ROW_BYTES, distinct)
        found.square().sum().backward()
        scores = head_scores(model, hidden, source, target, rows_at_once * ROW_BYTES, distinct)
        results.append([found, states.grad, model.get_output_embeddings().weight.grad, *scores])
        monkeypatch.setattr("torch.unique", lambda *_, **__: pytest.fail("a GPU would be waited for"))
    monkeypatch.setattr(torch.Tensor, "tolist", lambda each: asked.append(each) or ask(each))
    monkeypatch.setattr(torch.Tensor, "__index__", lambda each: pytest.fail("a GPU would be waited for"))
    head_logprobs(model, hidden, source, target, rows_at_once * ROW_BYTES, find_distinct(source))
    assert len(asked) == (rows_at_once < 13)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("draws", [False, True])
def test_chunks_that_are_computed_again_draw_what_they_drew(make_model, monkeypatch, draws) -> None:
    model = make_model("llama").requires_grad_(True)
    if draws:
        config = LoraConfig(
            task_type="CAUSAL_LM", target_modules=["lm_head"], lora_dropout=0.5, init_lora_weights=False
        )
        model = get_peft_model(model, config).get_base_model()
    model.train()
    hidden, source, target = draw_predictions(model)
    kept, results, again = [], [], koats_head.checkpoint
    monkeypatch.setattr(koats_head, "checkpoint", lambda *given, **more: kept.append(more) or again(*given, **more))
    for _ in range(2):
        torch.manual_seed(5)
        states = hidden.clone().requires_grad_(True)
        head_logprobs(model, states, source, target, 4 * ROW_BYTES).sum().backward()
        results.append(states.grad)
        monkeypatch.setattr(koats_head, "checkpoint", lambda compute, *given, **_: compute(*given))
    assert torch.equal(*results)
    assert {options["preserve_rng_state"] for options in kept} == {draws}
