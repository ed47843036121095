"""Forest log-probabilities and adapter gradients against one plain pass per sequence."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from koat.adapters.attach import attach_adapter
from koat.adapters.methods import Ia3Settings, LoraSettings
from koat.core.sequence import Sequence
from koat.forest.head import head_logprobs
from koat.forest.pack import RowCost
from koat.forest.score import Layout, cut_sequences, make_padded, score_tokens, sum_by_owner, token_logprobs
from koat.forest.verify import verify_layout

TABLED = ["gpt_neox", "llama", "mistral", "qwen2", "qwen2-window", "qwen3", "gpt2"]
FAMILIES = [*TABLED, "gemma2"]
KINDS = ["shared", "chat", "unrelated", "mixed"]
# (token budget, longest row): one row, two rows, many rows side by side, many micro-batches.
CUTS = {"one row": (9999, 9999), "two rows": (9999, 140), "many rows": (9999, 24), "small budget": (50, 50)}
SETTINGS = {
    **{f"ia3 {targets}": Ia3Settings(targets=targets) for targets in ("paper", "attention", "all-linear", "peft")},
    **{f"lora {targets}": LoraSettings(targets=targets) for targets in ("attention", "all-linear")},
    "ia3 named": Ia3Settings(targets=["k_proj", "v_proj", "down_proj"], feedforward=["down_proj"]),
    "lora named": LoraSettings(targets=["q_proj", "v_proj", "o_proj"]),
}
TOLERANCE = 1e-5


def choose_settings(family: str, name: str):
    """Return the settings; a family that is not in the table has its layers named."""
    return SETTINGS[name if family in TABLED else f"{name.split()[0]} named"]


def share(model) -> Layout:
    """Return the forest layout of a model, with attention free of charge so that rows grow long."""
    layout, _ = verify_layout(model)
    assert layout.shares
    return replace(layout, cost=RowCost(0.0))


def draw_weights(sequences: list[Sequence]) -> list[torch.Tensor]:
    """Return a weight per token, different for each, so that no two predictions can be mistaken."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(len(sequence), generator=generator) for sequence in sequences]


def take_gradients(model) -> dict[str, torch.Tensor]:
    taken = {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad.float()
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }
    model.zero_grad(set_to_none=True)
    return taken


def run_single(model, sequences, score_singly):
    """Return the oracle's log-probabilities, one list entry per sequence, and its adapter gradients."""
    model.zero_grad(set_to_none=True)
    logprobs = []
    for sequence, weight in zip(sequences, draw_weights(sequences), strict=True):
        (found,) = score_singly(model, [sequence])
        marks = torch.tensor(sequence.supervised)
        if marks.any():
            (found * weight * marks).sum().backward()
        logprobs.append(found.detach()[marks])
    return logprobs, take_gradients(model)


def run_layout(model, sequences, layout, token_budget, max_row_length):
    """Return the same from koat's micro-batches; each prediction is placed by its owner and its depth."""
    model.zero_grad(set_to_none=True)
    weights = draw_weights(sequences)
    table = [torch.full((len(sequence),), float("nan")) for sequence in sequences]
    for batch in cut_sequences(sequences, layout, token_budget, max_row_length):
        found = token_logprobs(model, batch, layout)
        places = list(zip(batch.owner.tolist(), (batch.position.flatten()[batch.source] + 1).tolist(), strict=True))
        if places:
            (found * torch.stack([weights[owner][at] for owner, at in places])).sum().backward()
        for value, (owner, at) in zip(found.detach(), places, strict=True):
            assert table[owner][at].isnan()
            table[owner][at] = value
    logprobs = [row[torch.tensor(s.supervised)] for row, s in zip(table, sequences, strict=True)]
    return logprobs, take_gradients(model)


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    """Within `tolerance` of the norm as a whole, and entry by entry."""
    assert found.shape == expected.shape
    assert expected.norm() > 0
    assert (found - expected).norm() <= tolerance * expected.norm()
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def assert_same(found, expected) -> None:
    """Log-probabilities of every sequence and gradients of every adapter tensor are equal to rounding."""
    assert_near(torch.cat(found[0]), torch.cat(expected[0]))
    for one, other in zip(found[0], expected[0], strict=True):
        assert one.shape == other.shape
    assert found[1].keys() == expected[1].keys() != set()
    for name in expected[1]:
        assert_near(found[1][name], expected[1][name])


@pytest.fixture(scope="module")
def prepare(make_model, randomise):
    """`prepare(family, adapter, attention=None)`: a tiny model with a random adapter."""

    def build(family: str, adapter: str = "ia3 paper", attention: str | None = None):
        model = attach_adapter(make_model(family, attention), choose_settings(family, adapter)).eval()
        randomise(model)
        return model

    return build


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_shape_of_data(prepare, make_sequences, score_singly, family, kind) -> None:
    model, sequences = prepare(family), make_sequences(kind)
    expected = run_single(model, sequences, score_singly)
    assert_same(run_layout(model, sequences, share(model), *CUTS["one row"]), expected)


def join_rows(layout):
    """Make starting a micro-batch so dear that rows of any length share one, padding and all."""
    return replace(layout, cost=replace(layout.cost, start_up=1e9))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_cut(prepare, make_sequences, score_singly, family) -> None:
    model, sequences = prepare(family, "lora all-linear"), make_sequences("mixed")
    layout = join_rows(share(model))
    expected = run_single(model, sequences, score_singly)
    counts = []
    for cut in CUTS.values():
        batches = list(cut_sequences(sequences, layout, *cut))
        counts.append((len(batches), sum(len(batch.rows) for batch in batches)))
        assert_same(run_layout(model, sequences, layout, *cut), expected)
    assert counts[:2] == [(1, 1), (1, 2)]
    assert counts[2][0] == 1 < 5 < counts[2][1]
    assert counts[3][0] > 3


@pytest.mark.parametrize("adapter", [name for name in SETTINGS if "named" not in name])
@pytest.mark.parametrize("family", TABLED)
def test_every_adapter(prepare, make_sequences, score_singly, family, adapter) -> None:
    model, sequences = prepare(family, adapter), make_sequences("chat")
    expected = run_single(model, sequences, score_singly)
    assert_same(run_layout(model, sequences, share(model), *CUTS["one row"]), expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kernel(prepare, make_sequences, score_singly, family, attention) -> None:
    model, sequences = prepare(family, "ia3 all-linear", attention), make_sequences("mixed")
    layout, _ = verify_layout(model, attention)
    assert layout.plan.kernel == attention
    expected = run_single(model, sequences, score_singly)
    assert_same(run_layout(model, sequences, layout, *CUTS["many rows"]), expected)


@pytest.mark.parametrize("split_head", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_rows(prepare, make_sequences, score_singly, family, split_head) -> None:
    model, sequences = prepare(family), make_sequences("mixed")
    layout = make_padded(split_head)
    expected = run_single(model, sequences, score_singly)
    assert_same(run_layout(model, sequences, layout, 120, None), expected)


@pytest.mark.parametrize("family", ["gpt_neox", "gemma2"])
def test_whole_head(prepare, make_sequences, score_singly, family) -> None:
    model, sequences = prepare(family), make_sequences("mixed")
    layout = replace(share(model), split_head=False)
    expected = run_single(model, sequences, score_singly)
    assert_same(run_layout(model, sequences, layout, *CUTS["two rows"]), expected)


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "gemma2"])
def test_head_in_chunks(prepare, make_sequences, score_singly, monkeypatch, family) -> None:
    model, sequences = prepare(family, "lora attention"), make_sequences("mixed")
    layout = share(model)
    expected = run_single(model, sequences, score_singly)
    whole = run_layout(model, sequences, layout, *CUTS["one row"])
    monkeypatch.setattr("koat.forest.score.head_logprobs", partial(head_logprobs, chunk_bytes=7 * 4 * 300))
    chunked = run_layout(model, sequences, layout, *CUTS["one row"])
    assert_same(chunked, expected)
    assert_same(chunked, whole)


@pytest.mark.parametrize("adapter", ["ia3 paper", "lora all-linear"])
@pytest.mark.parametrize("family", FAMILIES)
def test_activation_checkpointing(prepare, make_sequences, score_singly, family, adapter) -> None:
    model, sequences = prepare(family, adapter), make_sequences("mixed")
    expected = run_single(model, sequences, score_singly)
    layout = join_rows(share(model))
    model.train()
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    passes = count_layer_passes(model)
    found = run_layout(model, sequences, layout, *CUTS["two rows"])
    assert len(passes) == 6  # each of three layers ran once more in the backward pass
    assert_same(found, expected)


def count_layer_passes(model) -> list[int]:
    """Return a list that grows whenever a feed-forward layer is entered."""
    passes: list[int] = []
    for name, module in model.named_modules():
        if name.endswith(".mlp"):
            module.register_forward_pre_hook(lambda *_: passes.append(1))
    return passes


@pytest.mark.parametrize("adapter", ["ia3 paper", "ia3 all-linear", "lora all-linear"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_no_further_off_than_rounding(prepare, make_sequences, score_singly, family, adapter) -> None:
    """The forest's bfloat16 error is that of one-sequence passes in bfloat16, both against float32."""
    model, sequences = prepare(family, adapter), make_sequences("mixed")
    for weight in model.parameters():
        if not weight.requires_grad:
            weight.data = weight.data.bfloat16().float()
    exact = run_single(model, sequences, score_singly)
    for weight in model.parameters():
        if not weight.requires_grad:
            weight.data = weight.data.bfloat16()
    single = run_single(model, sequences, score_singly)
    forest = run_layout(model, sequences, share(model), *CUTS["two rows"])
    for truth, one, other in zip(flatten(exact), flatten(single), flatten(forest), strict=True):
        rounding = (one - truth).norm()
        assert 1e-4 * truth.norm() < rounding < 0.1 * truth.norm()
        assert (other - truth).norm() <= 1.3 * rounding
        assert (other - one).norm() <= 1.5 * rounding


def flatten(result) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all log-probabilities and all gradients of a run, each in one row."""
    return torch.cat(result[0]), torch.cat([gradient.flatten() for gradient in result[1].values()])


@pytest.mark.parametrize("family", ["gpt_neox", "gemma2"])
def test_each_distinct_token_is_computed_once(prepare, make_sequences, family) -> None:
    model, sequences = prepare(family), make_sequences("mixed")
    inputs = [s.token_ids[: max((i for i, mark in enumerate(s.supervised) if mark), default=1)] for s in sequences]
    distinct = {ids[: end + 1] for ids in inputs for end in range(len(ids))}
    seen: list[int] = []
    embedding = model.get_base_model().get_input_embeddings()
    embedding.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].numel()))
    layout = share(model)
    seen.clear()
    run_layout(model, sequences, layout, *CUTS["one row"])
    assert seen == [len(distinct)]
    assert len(distinct) < 0.6 * sum(len(sequence) for sequence in sequences)


@pytest.mark.parametrize("split_head", [True, False])
@pytest.mark.parametrize("shares", [True, False])
def test_scores_and_greedy_tokens(prepare, make_sequences, score_singly, shares, split_head) -> None:
    model, sequences = prepare("gemma2"), make_sequences("mixed")
    layout = replace(share(model) if shares else make_padded(), split_head=split_head)
    scored = 0
    for batch in cut_sequences(sequences, layout, 200):
        logprobs, greedy = score_tokens(model, batch, layout)
        for row, owner in enumerate(batch.owner.tolist()):
            at = int(batch.position.flatten()[batch.source[row]]) + 1
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([sequences[owner].token_ids[:at]])).logits[0, -1]
            expected = torch.log_softmax(logits, -1)
            assert int(greedy[row]) == int(expected.argmax())
            assert float(logprobs[row]) == pytest.approx(float(expected[sequences[owner].token_ids[at]]), rel=1e-5)
            scored += 1
    assert scored == sum(sequence.num_supervised for sequence in sequences)


def test_sums_per_owner() -> None:
    values, owner = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([2, 0, 2, 2])
    assert sum_by_owner(values, owner, 4).tolist() == [2.0, 0.0, 13.0, 0.0]


@pytest.mark.soak
@pytest.mark.parametrize("seed", [1])
@pytest.mark.parametrize("cut", list(CUTS))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("adapter", [name for name in SETTINGS if "named" not in name])
@pytest.mark.parametrize("family", FAMILIES)
def test_everything_with_everything(
    make_model, randomise, make_sequences, score_singly, family, adapter, attention, kind, cut, seed
) -> None:
    model = attach_adapter(make_model(family, attention, seed), choose_settings(family, adapter), seed).eval()
    randomise(model, seed)
    sequences = make_sequences(kind, seed)
    expected = run_single(model, sequences, score_singly)
    assert_same(run_layout(model, sequences, share(model), *CUTS[cut]), expected)
