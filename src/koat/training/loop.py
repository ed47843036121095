"""The training loop. A step: take examples, cut them into forests, backward each, clip, step, record."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from koat.adapters.attach import Attached, read_adapter_state, write_adapter_state
from koat.core.seeding import seed_step
from koat.core.sequence import Sequence
from koat.core.settings import TrainingSettings
from koat.forest.pack import MicroBatch
from koat.forest.score import Layout, cut_sequences, sum_by_owner, token_logprobs
from koat.training.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from koat.training.choices import list_answers, make_objective
from koat.training.guard import LossGuard, check_validation
from koat.training.noise import add_noise
from koat.training.optimizer import build_optimizer
from koat.training.sampler import StepPlan, plan_steps


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one optimizer step did: a line of `metrics.jsonl`."""

    step: int
    num_steps: int
    epoch: float
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    """Tokens of the step's sequences as they are, before sharing."""
    unique_tokens: int
    """Tokens that went through the model."""
    seconds: float
    remark: str | None = None
    validation_loss: float | None = None


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """How a run ended; the model holds the adapter that was kept."""

    state: TrainingState
    last_loss: float | None
    kept_step: int


Validate = Callable[[nn.Module], float]
OnStep = Callable[[StepRecord], None]


def schedule_rate(settings: TrainingSettings, step: int, num_steps: int) -> float:
    """Return the learning rate of a step (counted from 0): linear warm-up, then the chosen shape to zero."""
    warmup = round(settings.warmup * num_steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, num_steps - warmup)
    shapes = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return settings.learning_rate * shapes[settings.schedule]


def accumulate_gradients(
    model: nn.Module,
    sequences: ListLike[Sequence],
    layout: Layout,
    settings: TrainingSettings,
    accelerator: Accelerator,
) -> tuple[float, int]:
    """Backward one step's examples; return (the step's loss, tokens through the model).

    Losses are divided once by the counts of the whole step, over all micro-batches and processes, so they do not
    depend on how the forest was cut: the mean per supervised token, and what `koat.training.choices` adds to it.
    """
    objective = make_objective(sequences, share_examples(sequences, accelerator), settings)
    answers, lengths = objective.sequences, list(map(len, objective.sequences))
    cut = cut_sequences(answers, layout, settings.tokens_per_microbatch, settings.max_row_length)
    # All at once: a copy to a GPU waits for the work that it was given before.
    batches = [batch.to(accelerator.device) for batch in cut]
    loss_sum, slope, losses = torch.zeros((), dtype=torch.float64), None, []

    def run(batch: MicroBatch) -> Tensor:
        with accelerator.autocast(), add_noise(model, settings.noise, batch, lengths):
            return token_logprobs(model, batch, layout)

    if settings.choice_loss and len(batches) > 1:
        slope, value = objective.weigh_answers(sum_answers(run, batches, len(answers), accelerator.device))
        loss_sum += value
    for batch in batches:
        logprobs = run(batch)
        if settings.choice_loss and slope is None:
            slope, value = objective.weigh_answers(sum_by_owner(logprobs.detach(), batch.owner, len(answers)))
            loss_sum += value
        loss = objective.measure(logprobs, batch.owner, slope)
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
    # Read at the end: a GPU that is asked for each loss waits while the next micro-batch is made ready.
    loss_sum = sum((each.cpu().double() for each in losses), loss_sum)
    num_tokens = sum(batch.num_tokens for batch in batches)
    if accelerator.num_processes > 1:
        loss_sum, num_tokens = sum_over_processes(model, loss_sum, num_tokens, accelerator)
    return float(loss_sum), num_tokens


@torch.no_grad()
def sum_answers(
    run: Callable[[MicroBatch], Tensor], batches: ListLike[MicroBatch], num_sequences: int, device: torch.device
) -> Tensor:
    """Return the log-probability of each sequence `[S]`, from a pass that draws what the next one will draw again."""
    sums = torch.zeros(num_sequences, device=device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for batch in batches:
            sums += sum_by_owner(run(batch), batch.owner, num_sequences)
    return sums


def share_examples(sequences: ListLike[Sequence], accelerator: Accelerator) -> ListLike[Sequence]:
    """Return this process' part of a step: a run of neighbours, so that shared prefixes stay together."""
    count, rank = accelerator.num_processes, accelerator.process_index
    return sequences[len(sequences) * rank // count : len(sequences) * (rank + 1) // count]


def sum_over_processes(
    model: nn.Module, loss_sum: Tensor, num_tokens: int, accelerator: Accelerator
) -> tuple[Tensor, int]:
    """Sum adapter gradients, losses and tokens over processes in one flat all-reduce."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    counts = torch.tensor([float(loss_sum), num_tokens], dtype=torch.float32, device=accelerator.device)
    flat = torch.cat([*(g.float().flatten() for g in gradients), counts])
    flat = accelerator.reduce(flat, reduction="sum")
    offset = 0
    for parameter in parameters:
        parameter.grad = flat[offset : offset + parameter.numel()].view_as(parameter).to(parameter.dtype)
        offset += parameter.numel()
    return flat[-2].cpu().double(), int(flat[-1])


def train(
    model: Attached,
    sequences: ListLike[Sequence],
    layout: Layout,
    settings: TrainingSettings,
    *,
    accelerator: Accelerator,
    checkpoints: Path | None = None,
    resume_from: Path | None = None,
    validate: Validate | None = None,
    on_step: OnStep = lambda record: None,
) -> TrainingResult:
    """Train a model's adapter on `sequences` and leave the adapter that is to be kept in the model.

    With `checkpoints` states are saved there; with `resume_from` training goes on as if it had never stopped.
    Raises TrainingError when the loss is no longer a number.
    """
    plan, trained = plan_training(sequences, settings), [p for p in model.parameters() if p.requires_grad]
    optimizer = build_optimizer(trained, settings)
    state = load_checkpoint(resume_from, model, optimizer) if resume_from else TrainingState()
    guard, fence, loss = LossGuard(), Fence(plan, settings, checkpoints, validate, accelerator), None
    model.train()
    for indices in plan.walk_steps(state.step):
        began, step, examples = time.monotonic(), state.step, [sequences[index] for index in indices]
        seed_step(settings.seed, step, accelerator.process_index)
        loss, unique_tokens = accumulate_gradients(model, examples, layout, settings, accelerator)
        norm, rate = clip_gradients(optimizer, settings.max_grad_norm), schedule_rate(settings, step, plan.num_steps)
        remark = guard.judge(step + 1, loss, norm, starts_epoch=plan.begins_epoch(step))
        update_parameters(optimizer, rate)
        num_tokens = sum(len(answer) for answers in list_answers(examples, settings) for answer in answers)
        state.count_step(num_tokens, unique_tokens, time.monotonic() - began)
        validation_loss = fence.validate_step(model, state)
        on_step(
            StepRecord(
                state.step, plan.num_steps, state.step / plan.steps_per_epoch, loss, rate, norm, num_tokens,
                unique_tokens, time.monotonic() - began, remark, validation_loss,
            )
        )  # fmt: skip
        fence.save_step(model, optimizer, state)  # after its record: what a checkpoint holds is in the metrics
    return TrainingResult(state, loss, keep_adapter(model, state, settings.keep))


def plan_training(sequences: ListLike[Sequence], settings: TrainingSettings) -> StepPlan:
    """Plan the steps that the settings ask for."""
    return plan_steps(
        sequences, settings.sampler, settings.batch_size, settings.epochs, settings.max_steps, settings.seed
    )


def update_parameters(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Step at a learning rate, and drop the gradients."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float) -> float:
    """Clip gradients to `max_norm` (0: leave them) and return their norm before."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return float(torch.nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else math.inf))


def keep_adapter(model: Attached, state: TrainingState, keep: str) -> int:
    """Leave the best adapter in the model, if that is wanted and known; return the step it comes from."""
    if keep == "best" and state.best and state.best_step is not None:
        write_adapter_state(model, state.best)
        return state.best_step
    return state.step


@dataclass(slots=True)
class Fence:
    """Validation and checkpoints, kept off the loop."""

    plan: StepPlan
    settings: TrainingSettings
    checkpoints: Path | None
    validate: Validate | None
    accelerator: Accelerator

    @property
    def every(self) -> int:
        """Steps between validations."""
        return self.settings.validate_every or max(1, self.plan.num_steps // 10)

    def validate_step(self, model: Attached, state: TrainingState) -> float | None:
        """Validate where the settings say so, keep the best adapter, and return the loss if there is one."""
        if self.validate is None or (state.step < self.plan.num_steps and state.step % self.every):
            return None
        model.eval()
        loss = self.validate(model)
        model.train()
        check_validation(state.step, loss)
        if state.best_loss is None or loss < state.best_loss:
            state.best_loss, state.best_step = loss, state.step
            state.best = {name: tensor.clone() for name, tensor in read_adapter_state(model).items()}
        return loss

    def save_step(self, model: Attached, optimizer: torch.optim.Optimizer, state: TrainingState) -> None:
        """Save a checkpoint where the settings say so."""
        due = state.step == self.plan.num_steps or state.step % (self.settings.save_every or self.every) == 0
        if self.checkpoints is not None and due and self.accelerator.is_main_process:
            save_checkpoint(self.checkpoints, model, optimizer, state, self.settings.keep_checkpoints)


@torch.no_grad()
def measure_loss(
    model: nn.Module,
    sequences: ListLike[Sequence],
    layout: Layout,
    settings: TrainingSettings,
    accelerator: Accelerator,
) -> float:
    """Return the mean loss per supervised token of `sequences`, in rows as training has them, drawing nothing."""
    total = 0.0
    for batch in cut_sequences(sequences, layout, settings.tokens_per_microbatch, settings.max_row_length):
        with accelerator.autocast():
            total -= float(token_logprobs(model, batch.to(accelerator.device), layout).sum())
    return total / max(1, sum(sequence.num_supervised for sequence in sequences))
