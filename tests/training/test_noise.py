"""NEFTune's noise: its size, its shared draw among siblings, and nothing at all at alpha 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from koat.core.sequence import Sequence
from koat.forest.score import Layout, cut_sequences, make_padded, token_logprobs
from koat.forest.verify import verify_layout
from koat.training.noise import add_noise

ALPHA = 5.0


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Any]) -> Any:
    """A tiny Llama."""
    return make_model("llama")


@pytest.fixture(scope="module")
def layouts(model: Any) -> dict[str, Layout]:
    """Both ways through the model."""
    forest, verification = verify_layout(model)
    assert verification.shares
    return {"forest": forest, "padded": make_padded()}


def supervise_all(*bodies: tuple[int, ...]) -> list[Sequence]:
    """Return sequences in which every token but the first is a target."""
    return [Sequence(body, (False,) + (True,) * (len(body) - 1)) for body in bodies]


def read_noise(model: Any, batch: Any, layout: Layout, alpha: float, lengths: list[int]) -> Tensor:
    """Return what is added to the embeddings of a micro-batch, `[rows, length, dimension]`."""
    seen: list[Tensor] = []
    embedding = model.get_input_embeddings()
    with torch.no_grad(), add_noise(model, alpha, batch, lengths):
        handle = embedding.register_forward_hook(lambda module, inputs, output: seen.append(output))
        token_logprobs(model, batch, layout)
        handle.remove()
    return seen[0] - embedding.weight[batch.token_ids]


@pytest.mark.parametrize("kind", ["forest", "padded"])
def test_noise_fills_its_range_and_no_more(kind: str, model: Any, layouts: dict[str, Layout]) -> None:
    rng = torch.Generator().manual_seed(0)
    bodies = [tuple(torch.randint(3, 300, (length,), generator=rng).tolist()) for length in (40, 9, 25)]
    sequences = supervise_all(*bodies, bodies[0][:30] + bodies[1])
    lengths = [len(sequence) for sequence in sequences]
    batches = list(cut_sequences(sequences, layouts[kind], 4096, max_row_length=45))
    seen = 0
    for batch in batches:
        noise = read_noise(model, batch, layouts[kind], ALPHA, lengths)
        for row, owners in zip(noise, batch.rows, strict=True):
            mean_length = sum(lengths[index] for index in owners) / len(owners)
            bound = ALPHA / (mean_length * row.shape[-1]) ** 0.5
            assert 0.97 * bound < float(row.abs().max()) <= bound * (1 + 1e-5)
            assert float(row.std()) == pytest.approx(bound / 3**0.5, rel=0.1)
            assert abs(float(row.mean())) < 0.1 * bound
            seen += len(owners)
    assert seen == len(sequences)


def test_siblings_share_one_draw_on_their_common_prefix(model: Any, layouts: dict[str, Layout]) -> None:
    trunk = tuple(range(20, 32))
    sequences = supervise_all((*trunk, 40, 41), (*trunk, 50, 51, 52), (60, 61, 62))
    lengths = [len(sequence) for sequence in sequences]

    def score(layout: Layout) -> tuple[Tensor, Tensor]:
        (batch,) = cut_sequences(sequences, layout, 4096)
        torch.manual_seed(1)
        with torch.no_grad(), add_noise(model, ALPHA, batch, lengths):
            values = token_logprobs(model, batch, layout)
        first, second = (values[batch.owner == owner] for owner in (0, 1))
        return first[: len(trunk) - 1], second[: len(trunk) - 1]

    shared = score(layouts["forest"])
    assert torch.equal(*shared)
    apart = score(layouts["padded"])
    assert float((apart[0] - apart[1]).abs().max()) > 1e-2


def test_draws_differ_from_pass_to_pass_and_follow_the_seed(model: Any, layouts: dict[str, Layout]) -> None:
    (batch,) = cut_sequences(supervise_all(tuple(range(5, 25))), layouts["forest"], 4096)
    torch.manual_seed(4)
    first, second = (read_noise(model, batch, layouts["forest"], ALPHA, [20]) for _ in range(2))
    torch.manual_seed(4)
    assert torch.equal(first, read_noise(model, batch, layouts["forest"], ALPHA, [20]))
    assert not torch.equal(first, second)


def test_no_noise_is_exactly_none(model: Any, layouts: dict[str, Layout]) -> None:
    (batch,) = cut_sequences(supervise_all(tuple(range(5, 25))), layouts["forest"], 4096)
    with torch.no_grad():
        expected = token_logprobs(model, batch, layouts["forest"])
        before = torch.get_rng_state()
        with add_noise(model, 0.0, batch, [20]):
            found = token_logprobs(model, batch, layouts["forest"])
    assert torch.equal(found, expected)
    assert torch.equal(before, torch.get_rng_state())


def test_the_noise_ends_with_the_block_even_on_an_error(model: Any, layouts: dict[str, Layout]) -> None:
    (batch,) = cut_sequences(supervise_all(tuple(range(5, 25))), layouts["forest"], 4096)
    with torch.no_grad():
        expected = token_logprobs(model, batch, layouts["forest"])
        noisy = add_noise(model, ALPHA, batch, [20])
        noisy.__enter__()
        assert not torch.equal(token_logprobs(model, batch, layouts["forest"]), expected)
        assert not noisy.__exit__(KeyError, KeyError("broken"), None)  # not swallowed
        assert torch.equal(token_logprobs(model, batch, layouts["forest"]), expected)
