"""The peers of training, each at its best settings: PEFT with transformers' Trainer, and TRL's SFTTrainer packing.

Both get the adapter configuration that koat uses and the same base weights. Their layers, losses and loops are
untouched; logging, saving and evaluation are off; the clock runs from the first step to the last.
"""

from __future__ import annotations

import copy
import tempfile
import time
import warnings
from collections.abc import Callable
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from peft import get_peft_model, set_peft_model_state_dict
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from benchmarks.workload import Absent
from koat.core.sequence import Sequence

IGNORED = -100
BATCH_SIZES = (4, 8, 16)


@dataclass
class Peer:
    """One peer, built: `train` runs all examples once and returns its seconds, `losses` are per example `[N]`."""

    name: str
    model: Any
    settings: str
    train: Callable[[], float]
    losses: Callable[[], Tensor]
    num_tokens: int
    """Tokens that go through the model in one pass over the examples, with padding."""


class StepClock(TrainerCallback):
    """Measures the seconds from the beginning of training to its end, set-up left out."""

    seconds = 0.0

    def on_train_begin(self, *arguments: Any, **keywords: Any) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_train_end(self, *arguments: Any, **keywords: Any) -> None:
        """Stop the clock when the device is done."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self._began


def attach_peft(base: Any, config: Any, state: dict[str, Tensor]) -> Any:
    """Wrap a base model with PEFT's own layers under koat's configuration and adapter weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, copy.deepcopy(config))
    set_peft_model_state_dict(model, state)
    return model


def make_row(sequence: Sequence) -> dict[str, list[int]]:
    """Return a sequence as a row of labelled token ids, the prompt's labels ignored."""
    labels = [
        token if marked else IGNORED for token, marked in zip(sequence.token_ids, sequence.supervised, strict=True)
    ]
    return {"input_ids": list(sequence.token_ids), "labels": labels}


def pad_rows(rows: ListLike[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Pad rows on the right to the longest of them."""
    longest = max(len(row["input_ids"]) for row in rows)

    def pad(name: str, value: int) -> Tensor:
        return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    mask = (torch.arange(longest) < lengths[:, None]).long()
    return {"input_ids": pad("input_ids", 0), "attention_mask": mask, "labels": pad("labels", IGNORED)}


def count_padded(lengths: ListLike[int], batch_size: int) -> int:
    """Return how many tokens batches of neighbours hold when each is padded to its longest."""
    cuts = range(0, len(lengths), batch_size)
    return sum(max(part) * len(part) for part in (lengths[at : at + batch_size] for at in cuts))


def make_arguments(kind: Any, *, batch_size: int, accumulate: int, autocast: bool, cpu: bool, **extra: Any) -> Any:
    """Return training arguments without anything that costs time beside the training itself."""
    return kind(
        output_dir=tempfile.gettempdir(),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulate,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        bf16=autocast,
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_nan_inf_filter=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=not cpu,
        use_cpu=cpu,
        **{"num_train_epochs": 1, **extra},
    )


def add_clock(trainer: Trainer) -> StepClock:
    """Silence a trainer and put a clock on it."""
    for noisy in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(noisy)
    clock = StepClock()
    trainer.add_callback(clock)
    return clock


def run_trainer(trainer: Trainer, clock: StepClock) -> float:
    """Train from step 0 and return the seconds between first and last step."""
    trainer.train()
    return clock.seconds


def fits_memory(model: Any, num_tokens: int) -> bool:
    """Whether the logits of a padded batch fit: as they are, in float32, their softmax and their gradient."""
    vocabulary = model.get_output_embeddings().weight.shape[0]
    device = next(model.parameters()).device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return 16 * num_tokens * vocabulary < 0.5 * free


def choose(
    estimate: Callable[[int, bool], float], sizes: ListLike[int], usual: int, autocasts: tuple[bool, ...]
) -> tuple[int, bool, str]:
    """Return the fastest size and autocast by short runs, and what was tried in words. A run before warms up."""
    estimate(usual, autocasts[0])
    by_autocast = {autocast: estimate(usual, autocast) for autocast in autocasts}
    autocast = min(by_autocast, key=lambda key: by_autocast[key])
    by_size = {size: estimate(size, autocast) for size in sizes}
    tried = ", ".join(f"{size}: {seconds:.1f} s" for size, seconds in by_size.items())
    return min(by_size, key=lambda key: by_size[key]), autocast, tried


class PaddedRuns:
    """Runs of transformers' Trainer over examples sorted by length, padded to the longest of each batch."""

    def __init__(self, model: Any, sequences: ListLike[Sequence], step: int) -> None:
        self.model, self.step = model, step
        self.device = next(model.parameters()).device
        self.ordered = sorted(sequences, key=len, reverse=True)
        middle = max(0, (len(self.ordered) - max(BATCH_SIZES)) // 2)
        self.sample = self.ordered[middle : middle + max(BATCH_SIZES)]

    def build(self, batch_size: int, autocast: bool, chosen: ListLike[Sequence]) -> tuple[Trainer, StepClock]:
        """Return a trainer over some of the examples, and its clock."""
        arguments = make_arguments(
            TrainingArguments,
            batch_size=batch_size,
            accumulate=max(1, self.step // batch_size),
            autocast=autocast,
            cpu=self.device.type == "cpu",
        )
        rows: Any = [make_row(sequence) for sequence in chosen]
        trainer = Trainer(model=self.model, args=arguments, train_dataset=rows, data_collator=pad_rows)
        return trainer, add_clock(trainer)

    def count(self, chosen: ListLike[Sequence], batch_size: int) -> int:
        """Return how many tokens some of the examples take, with padding."""
        return count_padded([len(sequence) for sequence in chosen], batch_size)

    def estimate(self, batch_size: int, autocast: bool) -> float:
        """Return the seconds that all examples would take, by those of some in the middle."""
        seconds = run_trainer(*self.build(batch_size, autocast, self.sample))
        return seconds / self.count(self.sample, batch_size) * self.count(self.ordered, batch_size)

    def list_sizes(self) -> list[int]:
        """Return the batch sizes that are no more than a step and fit."""
        longest = len(self.ordered[0])
        fitting = [size for size in BATCH_SIZES if size <= self.step and fits_memory(self.model, size * longest)]
        return fitting or [BATCH_SIZES[0]]


def build_peft_peer(model: Any, sequences: ListLike[Sequence], *, step: int, autocasts: tuple[bool, ...]) -> Peer:
    """Build PEFT with transformers' Trainer: examples sorted by length, padded to the longest of each batch.

    Sorting the whole set is the limit of `group_by_length`. Batch size and autocast are chosen by a short run;
    an optimizer step takes `step` examples by gradient accumulation, as koat's does.
    """
    runs = PaddedRuns(model, sequences, step)
    usual = BATCH_SIZES[len(BATCH_SIZES) // 2]
    batch_size, autocast, tried = choose(runs.estimate, runs.list_sizes(), usual, autocasts)
    trainer, clock = runs.build(batch_size, autocast, runs.ordered)
    settings = (
        f"sorted by length, padded to the longest of a batch of {batch_size} (tried {tried}), "
        f"{step} examples a step, bf16={autocast}, gradient checkpointing off, no workers, no logging"
    )
    return Peer(
        "PEFT + Trainer",
        model,
        settings,
        lambda: run_trainer(trainer, clock),
        lambda: measure_padded_losses(trainer, sequences, batch_size),
        runs.count(runs.ordered, batch_size),
    )


@torch.no_grad()
def measure_padded_losses(trainer: Trainer, sequences: ListLike[Sequence], batch_size: int) -> Tensor:
    """Return each example's mean loss `[N]` from padded batches through the trainer's model and autocast."""
    model: Any = trainer.model
    device = next(model.parameters()).device
    model.eval()
    losses = []
    for at in range(0, len(sequences), batch_size):
        batch = pad_rows([make_row(sequence) for sequence in sequences[at : at + batch_size]])
        batch = {name: value.to(device) for name, value in batch.items()}
        labels = batch.pop("labels")[:, 1:]
        with trainer.compute_loss_context_manager():
            logits = model(**batch, use_cache=False).logits[:, :-1]
        picked = torch.nn.functional.cross_entropy(
            logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
        )
        losses.append(picked.sum(1) / (labels != IGNORED).sum(1))
    return torch.cat(losses).cpu()


class PackedRuns:
    """Runs of TRL's SFTTrainer over examples packed whole into rows ("bfd"), one row a batch.

    Raises Absent when TRL is not installed.
    """

    def __init__(self, model: Any, sequences: ListLike[Sequence], tokenizer: Any, step: int) -> None:
        try:
            from datasets import Dataset, disable_progress_bars
        except ImportError as error:
            raise Absent(f"TRL is not installed ({error}); it comes with the extra `bench`") from error
        disable_progress_bars()
        self.model, self.tokenizer, self.step = model, tokenizer, step
        self.lengths = [len(sequence) for sequence in sequences]
        marked = [[int(mark) for mark in sequence.supervised] for sequence in sequences]
        self.data = Dataset.from_dict(
            {"input_ids": [list(sequence.token_ids) for sequence in sequences], "completion_mask": marked}
        )

    def build(self, length: int, autocast: bool, **extra: Any) -> tuple[Trainer, StepClock]:
        """Return a trainer over rows of a length, and its clock."""
        try:
            from trl import SFTConfig, SFTTrainer
        except ImportError as error:
            raise Absent(f"TRL is not installed ({error}); it comes with the extra `bench`") from error
        num_rows = max(1, -(-sum(self.lengths) // length))
        accumulate = max(1, round(num_rows * self.step / len(self.lengths)))
        arguments = make_arguments(
            SFTConfig,
            batch_size=1,
            autocast=autocast,
            cpu=next(self.model.parameters()).device.type == "cpu",
            **{"accumulate": accumulate, **extra},
            packing=True,
            packing_strategy="bfd",
            max_length=length,
            completion_only_loss=True,
        )
        trainer = SFTTrainer(model=self.model, args=arguments, train_dataset=self.data, processing_class=self.tokenizer)
        return trainer, add_clock(trainer)

    def estimate(self, length: int, autocast: bool) -> float:
        """Return the seconds that all examples would take, by those of the first row."""
        trainer, clock = self.build(length, autocast, accumulate=1, max_steps=1)
        first = len(trainer.train_dataset[0]["input_ids"])  # type: ignore[index]
        return run_trainer(trainer, clock) / first * sum(self.lengths)

    def list_lengths(self) -> list[int]:
        """Return lengths of rows to try, the shortest that holds every example first."""
        shortest = -(-max(self.lengths) // 128) * 128
        return [length for length in (shortest, 2 * shortest, 4 * shortest) if length <= 4096] or [shortest]


def build_trl_peer(
    model: Any, sequences: ListLike[Sequence], tokenizer: Any, *, step: int, autocasts: tuple[bool, ...]
) -> Peer:
    """Build TRL's SFTTrainer with packing ("bfd", whole examples) and completion-only loss.

    TRL lays a batch of packed rows end to end in one row. Without flash attention, transformers sees from the
    position ids where examples begin and masks them from each other (dense, SDPA), so a batch of one packed row
    is best; its length is chosen by a short run. Raises Absent when TRL is not installed.
    """
    runs = PackedRuns(model, sequences, tokenizer, step)
    lengths = runs.list_lengths()
    length, autocast, tried = choose(runs.estimate, lengths, lengths[0], autocasts)
    trainer, clock = runs.build(length, autocast)
    settings = (
        f"packing=bfd in rows of {length} (tried {tried}), one row a batch, about {step} examples a step, "
        f"completion_only_loss, attention {model.config._attn_implementation} with the packed mask, "
        f"bf16={autocast}, gradient checkpointing off"
    )
    return Peer(
        "TRL packing",
        model,
        settings,
        lambda: run_trainer(trainer, clock),
        lambda: measure_packed_losses(trainer, sequences),
        sum(runs.lengths),
    )


@torch.no_grad()
def measure_packed_losses(trainer: Any, sequences: ListLike[Sequence]) -> Tensor:
    """Return each example's mean loss `[N]` from TRL's own packed batches and its own head."""
    places: dict[tuple[int, ...], list[int]] = {}
    for index, sequence in enumerate(sequences):
        places.setdefault(sequence.token_ids, []).append(index)
    losses = torch.full((len(sequences),), float("nan"))
    model = trainer.model.eval()
    for batch in trainer.get_train_dataloader():
        ids, starts = batch["input_ids"][0], (batch["position_ids"][0] == 0).nonzero().squeeze(1).tolist()
        with trainer.compute_loss_context_manager():
            logprobs = model(**batch, use_cache=False, fused_lm_head=True).log_probs[0].float()
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            index = places[tuple(ids[start:end].tolist())].pop()
            losses[index] = -logprobs[start : end - 1].sum().cpu() / sequences[index].num_supervised
    return losses
