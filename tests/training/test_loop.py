"""The loop against a plain one: PEFT's own layers, one sequence at a time, gradients summed, AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from koat.adapters.attach import attach_adapter, read_adapter_state
from koat.adapters.methods import Ia3Settings, LoraSettings
from koat.core.errors import TrainingError
from koat.core.sequence import Sequence, supervise_from
from koat.core.settings import TrainingSettings
from koat.forest.score import Layout, cut_sequences, make_padded
from koat.forest.verify import verify_layout
from koat.training.checkpoint import TrainingState
from koat.training.loop import Fence, accumulate_gradients, measure_loss, plan_training, schedule_rate, train
from koat.training.sampler import plan_steps
from koat.workflows.training.prepare import enable_checkpointing

TARGETS = ["k_proj", "v_proj", "down_proj"]
METHODS = {
    "ia3": (
        Ia3Settings(targets=TARGETS, feedforward=["down_proj"]),
        IA3Config(task_type="CAUSAL_LM", target_modules=TARGETS, feedforward_modules=["down_proj"]),
    ),
    "lora": (
        LoraSettings(targets=TARGETS, r=4, alpha=8),
        LoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS, r=4, lora_alpha=8),
    ),
}


@pytest.fixture(scope="module")
def layout(make_model: Callable[..., Any]) -> Layout:
    """The verified forest layout of the tiny Llama."""
    found, verification = verify_layout(make_model("llama"))
    assert verification.shares
    return found


def group_by_opening(sequences: list[Sequence]) -> list[Sequence]:
    """Name the group of each sequence after its first tokens."""
    return [Sequence(s.token_ids, s.supervised, group=str(s.token_ids[:2])) for s in sequences]


@pytest.fixture(scope="module")
def examples(make_sequences: Callable[..., list[Sequence]]) -> list[Sequence]:
    """Sequences of every shape, grouped by article; single tokens have nothing to learn and are left out."""
    return group_by_opening([s for s in make_sequences("mixed", seed=3) if s.num_supervised])


def sum_losses(model: Any, sequences: list[Sequence]) -> torch.Tensor:
    """Return the summed loss of the supervised tokens from one plain pass per sequence."""
    total = torch.zeros(())
    for sequence in sequences:
        ids = torch.tensor([sequence.token_ids])
        labels = torch.where(torch.tensor([sequence.supervised]), ids, -100)
        logits = model(input_ids=ids, use_cache=False).logits
        total = total + torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")
    return total


def copy_steps(examples: list[Sequence], settings: TrainingSettings) -> list[list[Sequence]]:
    """Return the examples of each step of a run."""
    plan = plan_steps(
        examples, settings.sampler, settings.batch_size, settings.epochs, settings.max_steps, settings.seed
    )
    indices = [step for epoch in range(9) for step in plan.order_epoch(epoch)][: plan.num_steps]
    return [[examples[index] for index in step] for step in indices]


def train_plainly(model: PeftModel, steps: list[list[Sequence]], settings: TrainingSettings) -> list[float]:
    """Train as a textbook would, with a cosine after one step of warm-up; return the losses."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1.0, betas=(0.9, 0.999), weight_decay=settings.weight_decay)
    losses = []
    for number, step in enumerate(steps):
        progress = (number - 1) / (len(steps) - 1)
        share = 0.5 if number == 0 else 0.5 + 0.5 * math.cos(math.pi * progress)
        optimizer.param_groups[0]["lr"] = settings.learning_rate * share
        optimizer.zero_grad()
        loss = sum_losses(model, step) / sum(s.num_supervised for s in step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("method", METHODS)
def test_five_steps_reach_the_adapter_of_a_plain_peft_loop(
    method: str,
    make_model: Callable[..., Any],
    make_settings: Callable[..., Any],
    measure_distance: Callable[..., float],
    examples: list[Sequence],
    layout: Layout,
    accelerator: Any,
) -> None:
    ours, theirs = METHODS[method]
    settings = make_settings(warmup=0.2, weight_decay=0.01, max_grad_norm=0.5, batch_size=7)
    steps = copy_steps(examples, settings)
    start = read_adapter_state(attach_adapter(make_model("llama"), ours))
    plain = get_peft_model(make_model("llama"), theirs)
    set_peft_model_state_dict(plain, start)
    losses = train_plainly(plain, steps, settings)
    expected = {name: tensor.detach() for name, tensor in get_peft_model_state_dict(plain).items()}
    assert measure_distance(start, expected) > 1e-3

    for options in ({}, {"tokens_per_microbatch": 64}, {"tokens_per_microbatch": 64, "max_row_length": 20}):
        model = attach_adapter(make_model("llama"), ours)
        records: list[Any] = []
        cut = settings.model_copy(update=options)
        result = train(model, examples, layout, cut, accelerator=accelerator, on_step=records.append)
        assert measure_distance(read_adapter_state(model), expected) < 1e-5
        assert [record.loss for record in records] == pytest.approx(losses, rel=1e-5)
        assert [record.tokens for record in records] == [sum(map(len, step)) for step in steps]
        assert result.state.step == result.kept_step == 5
        assert sum(record.unique_tokens for record in records) < sum(record.tokens for record in records)


def test_layout_and_grouping_do_not_change_what_is_learned(
    make_model: Callable[..., Any],
    make_settings: Callable[..., Any],
    measure_distance: Callable[..., float],
    examples: list[Sequence],
    layout: Layout,
    accelerator: Any,
) -> None:
    # With every example in every step, grouped and shuffled differ in nothing but order.
    settings = make_settings(batch_size=len(examples), max_steps=3, tokens_per_microbatch=100)
    states = []
    for sampler, chosen in (("grouped", layout), ("shuffled", layout), ("shuffled", None)):
        model = attach_adapter(make_model("llama"), METHODS["ia3"][0])
        chosen = chosen or make_padded()
        train(model, examples, chosen, settings.model_copy(update={"sampler": sampler}), accelerator=accelerator)
        states.append(read_adapter_state(model))
    assert measure_distance(states[1], states[0]) < 1e-5
    assert measure_distance(states[2], states[0]) < 1e-5


def test_loss_is_divided_once_by_the_supervised_tokens_of_the_step(
    make_model: Callable[..., Any], make_settings: Callable[..., Any], layout: Layout, accelerator: Any
) -> None:
    # Micro-batches of 1 and of 40 supervised tokens: the mean of their means is far from the mean.
    rng = torch.Generator().manual_seed(0)
    lengths = [(42, 2), (3, 2), (4, 3), (44, 5), (41, 40)]
    sequences = [
        supervise_from(tuple(torch.randint(3, 300, (length,), generator=rng).tolist()), start)
        for length, start in lengths
    ]
    model = attach_adapter(make_model("llama"), METHODS["ia3"][0])
    mean = sum_losses(model, sequences) / sum(s.num_supervised for s in sequences)
    mean.backward()
    expected = float(mean.detach())
    vectors = [p for p in model.parameters() if p.requires_grad]
    gradients = [vector.grad.clone() for vector in vectors]
    means = sum(float(sum_losses(model, [s]).detach()) / s.num_supervised for s in sequences) / len(sequences)
    assert abs(means - expected) > 0.05
    for budget in (10, 50, 4096):
        model.zero_grad()
        settings = make_settings(tokens_per_microbatch=budget)
        loss, num_tokens = accumulate_gradients(model, sequences, layout, settings, accelerator)
        assert loss == pytest.approx(expected, rel=1e-5)
        assert num_tokens == sum(len(s) - 1 for s in sequences)  # nothing is predicted from a last token
        for vector, gradient in zip(vectors, gradients, strict=True):
            torch.testing.assert_close(vector.grad, gradient, rtol=1e-4, atol=1e-7)


def test_measured_loss_is_the_mean_over_supervised_tokens(
    make_model: Callable[..., Any],
    make_settings: Callable[..., Any],
    examples: list[Sequence],
    layout: Layout,
    accelerator: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, settings = make_model("llama"), make_settings(tokens_per_microbatch=64, max_row_length=24)
    asked: list[int | None] = []

    def cut(sequences: Any, layout: Any, budget: int, longest: int | None = None) -> Any:
        asked.append(longest)
        return cut_sequences(sequences, layout, budget, longest)

    monkeypatch.setattr("koat.training.loop.cut_sequences", cut)
    expected = float(sum_losses(model, examples)) / sum(s.num_supervised for s in examples)
    before = torch.get_rng_state()
    assert measure_loss(model, examples, layout, settings, accelerator) == pytest.approx(expected, rel=1e-5)
    assert torch.equal(before, torch.get_rng_state())
    assert asked == [24]  # rows as long as training's: dense masks cost the square


@pytest.mark.parametrize("num_steps", [1, 10, 37])
@pytest.mark.parametrize("warmup", [0.0, 0.2, 1.0])
def test_learning_rates_follow_their_formulas(num_steps: int, warmup: float, make_settings: Callable[..., Any]) -> None:
    rates = {}
    for schedule in ("constant", "linear", "cosine"):
        settings = make_settings(schedule=schedule, warmup=warmup, learning_rate=3.0)
        rates[schedule] = [schedule_rate(settings, step, num_steps) for step in range(num_steps)]
    rising = round(warmup * num_steps)
    for step in range(num_steps):
        if step < rising:
            expected = [3.0 * (step + 1) / (rising + 1)] * 3
        else:
            left = (num_steps - step) / (num_steps - rising)
            expected = [3.0, 3.0 * left, 3.0 * math.sin(math.pi / 2 * left) ** 2]
        assert [rates[name][step] for name in rates] == pytest.approx(expected)
    assert all(0 < rate <= 3.0 for values in rates.values() for rate in values)


@pytest.mark.parametrize(
    "settings", [METHODS["ia3"][0], LoraSettings(targets=TARGETS, r=4, dropout=0.5)], ids=["ia3", "lora-dropout"]
)
def test_activation_checkpointing_changes_no_gradient(
    settings: Any,
    make_model: Callable[..., Any],
    make_settings: Callable[..., Any],
    randomise: Callable[..., None],
    examples: list[Sequence],
    layout: Layout,
    accelerator: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gradients, calls, moved = [], [], []

    class Recorded(torch.autograd.graph.save_on_cpu):
        def __init__(self, **_: Any) -> None:
            super().__init__()  # there is no pinned memory without a GPU
            pack = self.pack_hook
            self.pack_hook = lambda tensor: moved.append(tensor.shape) or pack(tensor)

    monkeypatch.setattr("transformers.modeling_utils.save_on_cpu", Recorded)
    for checkpointing, offload in ((False, False), (True, False), (True, True)):
        model = attach_adapter(make_model("llama"), settings)
        randomise(model)
        if checkpointing:
            enable_checkpointing(model, offload)
        assert not moved
        count: list[int] = []
        # Before, not after: recomputing stops as soon as all that the backward pass wants is there.
        layer = model.get_base_model().model.layers[1]
        layer.mlp.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        model.train()
        torch.manual_seed(3)
        accumulate_gradients(model, examples, layout, make_settings(), accelerator)
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        calls.append(len(count))
    assert calls[1] == calls[2] == 2 * calls[0] > 0
    # A hidden state per layer and pass goes to the CPU, and nothing else; PyTorch before 2.13 also keeps empty tensors.
    moved = [shape for shape in moved if shape.numel()]
    assert len(moved) == 3 * calls[0] and all(shape[-1] == 64 for shape in moved)
    for plain, recomputed, offloaded in zip(*gradients, strict=True):
        assert torch.equal(offloaded, recomputed)
        torch.testing.assert_close(recomputed, plain, rtol=1e-6, atol=1e-9)


def test_the_best_adapter_is_kept_unless_the_last_is_wanted(
    make_model: Callable[..., Any],
    make_settings: Callable[..., Any],
    examples: list[Sequence],
    layout: Layout,
    accelerator: Any,
) -> None:
    scores = [0.9, 0.4, 0.6, 0.5, 0.7]
    for keep, step in (("best", 2), ("last", 5)):
        model = attach_adapter(make_model("llama"), METHODS["ia3"][0])
        states: list[dict[str, torch.Tensor]] = []
        training: list[bool] = []

        def validate(model: Any, states: Any = states, training: Any = training) -> float:
            training.append(model.training)
            states.append({name: tensor.clone() for name, tensor in read_adapter_state(model).items()})
            return scores[len(states) - 1]

        settings = make_settings(keep=keep, validate_every=1)
        records: list[Any] = []
        result = train(
            model, examples, layout, settings, accelerator=accelerator, validate=validate, on_step=records.append
        )
        kept = read_adapter_state(model)
        assert [record.validation_loss for record in records] == scores
        assert training == [False] * 5
        assert (result.kept_step, result.state.best_step, result.state.best_loss) == (step, 2, 0.4)
        assert all(torch.equal(kept[name], tensor) for name, tensor in states[step - 1].items())
        assert not all(torch.equal(states[1][name], tensor) for name, tensor in states[4].items())


def test_a_validation_loss_that_is_no_number_ends_the_run(
    make_model: Callable[..., Any],
    make_settings: Callable[..., Any],
    examples: list[Sequence],
    layout: Layout,
    accelerator: Any,
) -> None:
    """Kept as the best, it would stay the best: no number is less than one that is none."""
    scores = iter([0.5, math.nan, 0.1])
    settings = make_settings(validate_every=1)
    with pytest.raises(TrainingError, match="Step 2: validation loss nan"):
        train(
            attach_adapter(make_model("llama"), METHODS["ia3"][0]), examples, layout, settings,
            accelerator=accelerator, validate=lambda model: next(scores),
        )  # fmt: skip


def test_a_training_loss_that_is_no_number_ends_the_run_before_anything_moves(
    make_model: Callable[..., Any],
    make_settings: Callable[..., Any],
    examples: list[Sequence],
    layout: Layout,
    accelerator: Any,
) -> None:
    model = attach_adapter(make_model("llama"), METHODS["ia3"][0])
    model.get_base_model().model.norm.weight.data.fill_(math.nan)
    start = {name: tensor.clone() for name, tensor in read_adapter_state(model).items()}
    records: list[Any] = []
    with pytest.raises(TrainingError, match="Step 1: loss nan"):
        train(model, examples, layout, make_settings(), accelerator=accelerator, on_step=records.append)
    assert start and not records
    assert all(torch.equal(start[name], tensor) for name, tensor in read_adapter_state(model).items())


def test_the_guard_is_told_where_a_pass_begins_and_its_remarks_are_recorded(
    make_model: Callable[..., Any],
    make_settings: Callable[..., Any],
    examples: list[Sequence],
    layout: Layout,
    accelerator: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, bool]] = []
    judged: list[tuple[float, float]] = []

    def judge(guard: Any, step: int, loss: float, gradient_norm: float, starts_epoch: bool) -> str:
        seen.append((step, starts_epoch))
        judged.append((loss, gradient_norm))
        return f"about step {step}"

    monkeypatch.setattr("koat.training.guard.LossGuard.judge", judge)
    records: list[Any] = []
    settings = make_settings(batch_size=4, max_steps=5)
    model = attach_adapter(make_model("llama"), METHODS["ia3"][0])
    train(model, examples[:8], layout, settings, accelerator=accelerator, on_step=records.append)
    # Eight examples, four to a step: the third step begins the second pass, the fifth the third.
    assert seen == [(1, False), (2, False), (3, True), (4, False), (5, True)]
    assert [(record.loss, record.gradient_norm) for record in records] == judged
    assert [record.remark for record in records] == [f"about step {step}" for step in (1, 2, 3, 4, 5)]


@pytest.mark.parametrize(
    ("num_steps", "options", "validated", "saved"),
    [
        (40, {}, [*range(4, 41, 4)], [*range(4, 41, 4)]),
        (25, {"validate_every": 10}, [10, 20, 25], [10, 20, 25]),
        (3, {}, [1, 2, 3], [1, 2, 3]),
        (29, {"validate_every": 8, "save_every": 9}, [8, 16, 24, 29], [9, 18, 27, 29]),
        (12, {"save_every": 100}, [*range(1, 13)], [12]),
    ],
)
def test_a_run_is_validated_and_saved_where_the_settings_say_and_at_its_end(
    num_steps: int,
    options: dict[str, int],
    validated: list[int],
    saved: list[int],
    make_settings: Callable[..., Any],
    examples: list[Sequence],
    accelerator: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Unless they say otherwise, ten times a run."""
    kept: list[int] = []
    monkeypatch.setattr("koat.training.loop.save_checkpoint", lambda *given: kept.append(given[3].step))
    monkeypatch.setattr("koat.training.loop.read_adapter_state", lambda model: {})
    settings, model, state = make_settings(max_steps=num_steps, **options), torch.nn.Linear(1, 1), TrainingState()
    fence = Fence(plan_training(examples, settings), settings, tmp_path, lambda model: 0.5, accelerator)
    losses: dict[int, float | None] = {}
    for step in range(1, num_steps + 1):
        state.step = step
        losses[step] = fence.validate_step(model, state)
        fence.save_step(model, None, state)
    assert [step for step, loss in losses.items() if loss is not None] == validated
    assert kept == saved


def test_gradients_are_clipped_and_their_norm_reported(
    make_model: Callable[..., Any],
    make_settings: Callable[..., Any],
    examples: list[Sequence],
    layout: Layout,
    accelerator: Any,
) -> None:
    model = attach_adapter(make_model("llama"), METHODS["ia3"][0])
    accumulate_gradients(model, examples, layout, make_settings(), accelerator)
    expected = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.requires_grad))
    for max_norm in (0.0, 1e-3):
        model = attach_adapter(make_model("llama"), METHODS["ia3"][0])
        records: list[Any] = []
        settings = make_settings(max_steps=1, batch_size=len(examples), max_grad_norm=max_norm)
        train(model, examples, layout, settings, accelerator=accelerator, on_step=records.append)
        assert records[0].gradient_norm == pytest.approx(expected, rel=1e-5)
