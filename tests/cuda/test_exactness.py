"""On a CUDA GPU: forests, gradients and growth against plain passes of one sequence on a processor."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from koat.adapters.attach import attach_adapter
from koat.adapters.methods import METHODS
from koat.core.sequence import supervise_from
from koat.forest.attend import AttentionPlan
from koat.forest.score import cut_sequences, sum_by_owner, token_logprobs, unwrap
from koat.forest.stream import score_forest
from koat.forest.verify import list_candidates, verify_layout
from koat.forest.verify_growth import verify_growth
from koat.model import pick_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA GPU")

FAMILIES = [
    "gpt_neox",
    "llama",
    "mistral",
    "qwen2",
    "qwen2-window",
    "qwen3",
    "gpt2",
    "gemma2",
    "granite",
    "gptj",
    "opt",
]
APART = ["bloom", "mamba", "phi3-longrope"]
"""Families whose prefixes cannot be shared."""
EAGER = ["gemma2", "gptj"]
"""Families with capped scores, or without SDPA."""
CUDA = torch.device("cuda")


def put_on_gpu(model: Any) -> Any:
    """Move a model to the GPU, with the attention that loading picks there."""
    attention = pick_attention("auto", model.config)
    if attention:
        model.set_attn_implementation(attention)
    return model.to(CUDA)


def score(model: Any, layout: Any, sequences: list[Any]) -> torch.Tensor:
    """Return the summed log-probability of each sequence."""
    total = torch.zeros(len(sequences))
    for batch in cut_sequences(sequences, layout, 256):
        batch = batch.to(CUDA)
        total += sum_by_owner(token_logprobs(model, batch, layout), batch.owner, len(sequences)).cpu()
    return total


def sum_singly(score_singly, model, sequences) -> torch.Tensor:
    """Return the oracle's sums, on the processor."""
    each = score_singly(model, sequences)
    return torch.stack([(row * torch.tensor(one.supervised)).sum() for row, one in zip(each, sequences, strict=True)])


@pytest.mark.parametrize("family", [*FAMILIES, *APART])
def test_forests_are_exact(make_model, make_sequences, score_singly, family) -> None:
    model, sequences = make_model(family), make_sequences("mixed")
    if family == "gemma2":  # SDPA leaves its caps out
        model.set_attn_implementation("eager")
    expected = sum_singly(score_singly, model, sequences)
    layout, found = verify_layout(put_on_gpu(model))
    assert found.shares == (family not in APART), found.reason
    if found.shares:
        assert found.kernel == ("eager" if family in EAGER else "tree"), found.reason
    with torch.no_grad():
        torch.testing.assert_close(score(model, layout, sequences), expected, atol=2e-4, rtol=1e-5)
    if found.streams:
        sums = torch.zeros(len(sequences))
        for part in score_forest(model, layout, sequences, 24):
            sums += sum_by_owner(part.logprobs, part.owner, len(sequences)).cpu()
        torch.testing.assert_close(sums, expected, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "gemma2"])
def test_what_grows_is_what_plain_passes_find_likeliest(make_model, family) -> None:
    model = put_on_gpu(make_model(family))
    layout, _ = verify_layout(model)
    assert verify_growth(model, layout)


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "gpt2"])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "qlora"])
def test_gradients_are_a_processors(make_model, make_sequences, score_singly, randomise, method, family) -> None:
    model = attach_adapter(make_model(family), METHODS[method].settings())
    randomise(model)
    sequences = make_sequences("mixed")
    there = put_on_gpu_attached(copy.deepcopy(model))
    causal_only = method not in {"prompt", "p_tuning", "prefix"}
    layout, found = verify_layout(there)
    assert found.kernel == ("sdpa" if method == "prefix" else "tree"), found.reason
    there.train()
    loss = -score_with_grad(there, layout, sequences)
    loss.backward()
    model.train()
    if causal_only:
        expected = -sum_singly(score_singly, unwrap(model), sequences).sum()
    else:
        here, _ = verify_layout(model)
        model.train()
        expected = -sum(token_logprobs(model, batch, here).sum() for batch in cut_sequences(sequences, here, 256))
    expected.backward()
    torch.testing.assert_close(loss.detach().cpu(), expected.detach(), rtol=1e-5, atol=1e-3)
    pairs = zip(there.named_parameters(), model.parameters(), strict=True)
    compared = 0
    for (name, mine), exact in pairs:
        if exact.grad is not None and float(exact.grad.norm()) > 0:
            error = (mine.grad.cpu() - exact.grad).norm() / exact.grad.norm()
            assert error < 1e-4, (name, float(error), found)
            compared += 1
    assert compared


def put_on_gpu_attached(model: Any) -> Any:
    """Move a model with its adapter to the GPU."""
    attention = pick_attention("auto", unwrap(model).config)
    if attention:
        unwrap(model).set_attn_implementation(attention)
    return model.to(CUDA)


def score_with_grad(model: Any, layout: Any, sequences: list[Any]) -> torch.Tensor:
    """Return the sum of all log-probabilities, with its graph."""
    return sum(token_logprobs(model, batch.to(CUDA), layout).sum() for batch in cut_sequences(sequences, layout, 256))  # type: ignore[return-value]


@pytest.mark.parametrize("head", [64, 128, 256])
def test_own_attention_has_dense_masks_gradients_on_long_rows(make_model, head) -> None:
    """In bfloat16, on many blocks, at the widths of heads that real models have."""
    shape = {"hidden_size": 2 * head, "num_attention_heads": 2, "max_position_embeddings": 2048}
    model = put_on_gpu(make_model("gpt_neox", **shape)).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 300, (length,), generator=generator).tolist())

    trunk = draw(200)
    sequences = [supervise_from(trunk + draw(150), 250) for _ in range(6)]
    results = {}
    for kernel in ("tree", "sdpa"):
        layout = next(each for each in list_candidates(model.config, kernel) if isinstance(each.plan, AttentionPlan))
        vectors = attach_adapter(copy.deepcopy(model), METHODS["ia3"].settings()).to(CUDA)
        value = torch.zeros((), device=CUDA)
        for batch in cut_sequences(sequences, layout, 2048):
            value = value + token_logprobs(vectors, batch.to(CUDA), layout).sum()
        value.backward()
        gradients = [p.grad.flatten() for p in vectors.parameters() if p.requires_grad]
        results[kernel] = (value.detach(), torch.cat(gradients))
    torch.testing.assert_close(results["tree"][0], results["sdpa"][0], rtol=5e-3, atol=0)
    error = (results["tree"][1] - results["sdpa"][1]).norm() / results["sdpa"][1].norm()
    assert error < 3e-2
