"""The parts of a plan's memory against formulas, and every family planned without its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from koat.adapters.attach import attach_adapter
from koat.adapters.methods import METHODS, FullSettings, Ia3Settings, LoraSettings
from koat.core.config import Section
from koat.core.sequence import supervise_from
from koat.core.settings import ModelSettings, TrainingSettings
from koat.forest.score import cut_sequences, token_logprobs
from koat.forest.verify import verify_layout
from koat.training.optimizer import build_optimizer
from koat.workflows.planning.memory import LENGTHS, Curve, count_optimizer_bytes, measure_base, measure_footprint
from koat.workflows.planning.simulate import LiveBytes
from tests.family_models import FAMILIES, make_family, make_family_config
from tests.tiny_base import call_koat

CPU = ModelSettings(base="none", device="cpu", dtype="float32")
PLANNED = ("ia3", "lora", "prompt")
QUICK = {("bloom", "ia3"), ("falcon-alibi", "prompt"), ("mixtral", "lora"), ("qwen3_moe", "prompt"), ("gemma2", "ia3")}
"""What every run of the tests tries; `make soak` tries all."""


def list_cases() -> list[object]:
    cases = [(family, method) for family in FAMILIES for method in PLANNED]
    return [pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.soak]) for case in cases]


@pytest.mark.parametrize(("family", "method"), list_cases())
def test_every_family_is_planned(tmp_path: Path, family: str, method: str) -> None:
    make_family_config(family).save_pretrained(tmp_path)
    status, out, error = call_koat("plan", "--base", tmp_path, "--method", method, "model.dtype=float32")
    assert status == 0, error
    assert "memory while training" in out
    base = measure_base(CPU, TrainingSettings(), make_family_config(family))
    assert base.num_parameters == sum(weight.numel() for weight in make_family(family).parameters())
    assert base.weight_bytes == 4 * base.num_parameters


def test_a_curve_goes_through_its_points_and_beyond() -> None:
    def value(length: float) -> float:
        return 7 + 3 * length + 0.5 * length**2

    curve = Curve.through(value(length) for length in LENGTHS)
    assert curve.at(1, 1000) == pytest.approx(value(1000))
    assert curve.at(3, 10) == pytest.approx(7 + 3 * (value(10) - 7))


def test_living_bytes_are_those_that_somebody_holds() -> None:
    own = torch.zeros(10)
    with LiveBytes([own]) as count:
        view = own[2:]
        held = torch.zeros(100)
        torch.zeros(300)
        again = held.view(10, 10)
        assert (count.live, count.peak) == (400, 1600)
        del held
        assert count.live == 400
        del again
    assert (count.live, count.peak) == (0, 1600)
    assert view.shape == (8,)


@pytest.mark.parametrize("name", ["adamw", "adamw-8bit"])
def test_moments_take_what_the_optimizer_holds(name: str) -> None:
    if name != "adamw":
        pytest.importorskip("bitsandbytes")
    sizes = [100, 4096, 70_000]
    weights = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    optimizer = build_optimizer(weights, TrainingSettings(optimizer=name))
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    kept = {
        value.untyped_storage()._cdata: value.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for key, value in state.items()
        # Steps are numbers, and tables of code values are the same for all tensors.
        if isinstance(value, torch.Tensor) and value.ndim and "qmap" not in key
    }
    assert count_optimizer_bytes(sizes, name) == sum(kept.values())


def test_a_dense_square_grows_and_a_walk_does_not() -> None:
    training, adapter = TrainingSettings(), Ia3Settings()
    config = make_family_config("llama")
    walked = measure_footprint(measure_base(CPU, training, config), adapter, training)
    dense = CPU.model_copy(update={"attention": "sdpa"})
    masked = measure_footprint(measure_base(dense, training, config), adapter, training)
    assert walked.kept.square == pytest.approx(0, abs=1e-6) and not walked.squares
    # Each of two layers keeps an additive float32 mask of its own.
    assert masked.kept.square == pytest.approx(2 * 4, abs=1e-6) and masked.squares


@pytest.mark.parametrize("dropped", [0.0, 0.1])
def test_attention_that_is_dropped_in_training_is_planned_on_dense_masks(dropped: float) -> None:
    training, config = TrainingSettings(), make_family_config("gpt2")
    config.attn_pdrop = dropped
    found = measure_footprint(measure_base(CPU, training, config), Ia3Settings(), training)
    assert found.squares is (dropped > 0)
    assert (found.kept.square > 1) is (dropped > 0)


@pytest.mark.parametrize("offload", [False, True])
def test_checkpointing_keeps_a_hidden_state_a_layer_or_offloads_it(offload: bool) -> None:
    training = TrainingSettings(activation_checkpointing=True, activation_offload=offload)
    config = make_family_config("llama")
    curves = []
    for depth in (2, 3):
        config.num_hidden_layers = depth
        curves.append(measure_footprint(measure_base(CPU, training, config), LoraSettings(), training).kept)
    assert curves[1].linear - curves[0].linear == pytest.approx(0 if offload else 32 * 4)


def test_a_head_works_in_chunks() -> None:
    training = TrainingSettings()
    found = measure_footprint(measure_base(CPU, training, make_family_config("llama")), Ia3Settings(), training)
    assert found.head_rows == 2**27 // (4 * 300)
    bounded = found.count_head(1, 10 * found.head_rows) - found.count_head(1, found.head_rows)
    assert bounded == 9 * found.head_rows * 2 * 32 * 4


def test_a_trained_head_has_its_gradient_in_the_plan_and_many_logits_as_a_frozen_one() -> None:
    """The gradient is made beside the logits and given up again before the next chunk's."""
    training, config = TrainingSettings(), make_family_config("llama")
    trained, frozen = (
        measure_footprint(measure_base(CPU, training, config), adapter, training).trace_head
        for adapter in (FullSettings(), Ia3Settings())
    )
    logits = 4 * config.vocab_size
    assert trained(1).peak - frozen(1).peak == pytest.approx(logits * config.hidden_size, rel=0.1)
    for trace in (trained, frozen):
        assert trace(100_000).peak == pytest.approx(2 * 100_000 * logits, rel=0.1)


def test_methods_of_the_table_are_all_here() -> None:
    assert set(PLANNED) <= set(METHODS)


@pytest.mark.parametrize("adapter", [FullSettings(), LoraSettings()], ids=["full", "lora"])
def test_autocast_keeps_short_activations_and_casts_of_the_weights(adapter: Section) -> None:
    training = TrainingSettings(precision="bfloat16")
    footprint = measure_footprint(measure_base(CPU, training, make_family_config("llama")), adapter, training)
    model = attach_adapter(make_family("llama"), adapter).train()
    layout, _ = verify_layout(model)
    ids = torch.randint(0, 300, (513,), generator=torch.Generator().manual_seed(0))
    batch = next(cut_sequences([supervise_from(tuple(ids.tolist()), 1)], layout, 1000))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trained:
        weight.grad = torch.zeros_like(weight)
    with LiveBytes([*model.parameters(), *model.buffers(), *(weight.grad for weight in trained)]) as live:
        with torch.autocast("cpu", torch.bfloat16):
            loss = -token_logprobs(model, batch, layout).sum()
        loss.backward()
    fixed = 4 * sum(weight.numel() for weight in model.parameters()) + 12 * sum(weight.numel() for weight in trained)
    assert footprint.train_peak(1, 512) == pytest.approx(fixed + live.peak, rel=0.1)
