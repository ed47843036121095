"""One comparison of training: koat and its peers on the same examples at the same weights, in turns."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence as ListLike
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from benchmarks.machine import count_flops
from benchmarks.measure import Check, Findings, Result, check_equal, interleave
from benchmarks.peers import Peer, attach_peft, build_peft_peer, build_trl_peer
from benchmarks.workload import Absent, Options, build_base
from koat.adapters.attach import attach_adapter, read_adapter_state, write_adapter_state
from koat.core.config import Section
from koat.core.sequence import Sequence
from koat.core.settings import TrainingSettings
from koat.forest.score import Layout, cut_sequences, sum_by_owner, token_logprobs, unwrap
from koat.forest.verify import verify_layout
from koat.training.loop import train
from koat.training.sampler import plan_steps

STEP = 24
"""Examples per optimizer step, on every side."""
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""Largest difference allowed between two mean losses of one example."""
TARGETS = {
    "context QA": {"PEFT + Trainer": 6.0, "TRL packing": 3.0},
    "instructions": {"PEFT + Trainer": 2.0, "TRL packing": 1.2},
}


@dataclass
class Ours:
    """koat's side: an adapter on a model, verified, and how it trains."""

    model: Any
    layout: Layout
    settings: TrainingSettings
    accelerator: Accelerator

    def train_once(self, sequences: ListLike[Sequence], layout: Layout | None = None) -> float:
        """Train all examples once with koat's own loop and return its seconds."""
        began = time.perf_counter()
        train(self.model, sequences, layout or self.layout, self.settings, accelerator=self.accelerator)
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    @torch.no_grad()
    def measure_losses(self, sequences: ListLike[Sequence]) -> Tensor:
        """Return each example's mean loss `[N]` as the loop computes it."""
        self.model.eval()
        total = torch.zeros(len(sequences))
        for batch in cut_sequences(sequences, self.layout, self.settings.tokens_per_microbatch):
            with self.accelerator.autocast():
                logprobs = token_logprobs(self.model, batch.to(self.accelerator.device), self.layout)
            total -= sum_by_owner(logprobs, batch.owner.to(logprobs.device), len(sequences)).cpu()
        return total / torch.tensor([sequence.num_supervised for sequence in sequences])


def build_ours(family: str, precision: str, adapter: Section, options: Options) -> Ours:
    """Attach an adapter to a random base, move it away from the identity, and verify the layout."""
    model = attach_adapter(build_base(family, options, precision), adapter, seed=options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    # Ones are IA3's. An update by LoRA moves each loss by 0.1 to 0.3; one three times as large made bfloat16's own
    # rounding of losses reach the tolerance, plain PEFT's as much as koat's (docs/log.md).
    state = {
        name: tensor + (0.1 if 1 in tensor.shape else 0.03) * torch.randn(tensor.shape, generator=generator)
        for name, tensor in read_adapter_state(model).items()
    }
    write_adapter_state(model, state)
    layout, found = verify_layout(model)
    if not found.shares:
        raise RuntimeError(f"koat refuses to share prefixes on {family} {precision}: {found.reason}")
    settings = TrainingSettings(
        batch_size=STEP, epochs=1, sampler="grouped", learning_rate=1e-4, schedule="constant", warmup=0
    )
    return Ours(model, layout, settings, make_accelerator(options))


def make_accelerator(options: Options) -> Accelerator:
    """Return an accelerator without autocast: weights have the type of the run, so nothing is cast twice.

    Accelerate keeps one state for a process and refuses another precision; the peers' trainers reset it too.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(mixed_precision="no", cpu=options.device.type == "cpu")


@dataclass(frozen=True)
class Work:
    """What koat computes for one pass over the examples."""

    num_original: int
    num_unique: int
    num_padded: int
    num_keys: int
    num_head_rows: int


def count_work(ours: Ours, sequences: ListLike[Sequence]) -> Work:
    """Count the tokens, keys and head rows of one pass, cut as the loop cuts it."""
    settings = ours.settings
    plan = plan_steps(
        sequences, settings.sampler, settings.batch_size, settings.epochs, settings.max_steps, settings.seed
    )
    batches = [
        batch
        for step in plan.order_epoch(0)
        for batch in cut_sequences(
            [sequences[index] for index in step],
            ours.layout,
            settings.tokens_per_microbatch,
            settings.max_row_length,
        )
    ]
    num_unique = sum(batch.num_tokens for batch in batches)
    return Work(
        sum(len(sequence) for sequence in sequences),
        num_unique,
        sum(batch.token_ids.numel() for batch in batches),
        # A token sees its ancestors and itself; padding stands at position 0.
        sum(int(batch.position.sum()) for batch in batches) + num_unique,
        sum(len(batch.source.unique()) for batch in batches),
    )


def build_peers(
    ours: Ours, family: str, precision: str, sequences: ListLike[Sequence], tokenizer: Any, options: Options
) -> tuple[list[Peer], list[str]]:
    """Build both peers with koat's adapter configuration and weights; return them and why one is missing."""
    config, state = ours.model.peft_config["default"], read_adapter_state(ours.model)
    autocasts = (False,) if precision == "float32" else (False, True)
    peers, skipped = [], []

    def fresh() -> Any:
        return attach_peft(build_base(family, options, precision), config, state)

    peers.append(build_peft_peer(fresh(), sequences, step=STEP, autocasts=autocasts))
    try:
        peers.append(build_trl_peer(fresh(), sequences, tokenizer, step=STEP, autocasts=autocasts))
    except Absent as reason:
        skipped.append(str(reason))
    return peers, skipped


def compare_training(
    benchmark: str,
    family: str,
    precision: str,
    adapter: Section,
    sequences: ListLike[Sequence],
    tokenizer: Any,
    options: Options,
    matrix_rate: float,
) -> Findings:
    """Check that koat and its peers compute the same losses, then time them in turns."""
    gc.collect()  # trainers refer to themselves in circles: the last comparison's models go only now
    ours = build_ours(family, precision, adapter, options)
    state = read_adapter_state(ours.model)
    peers, skipped = build_peers(ours, family, precision, sequences, tokenizer, options)
    checks = {}
    found = ours.measure_losses(sequences)
    for peer in peers:
        # The short runs that chose the settings moved the peer's adapter: put the common weights back.
        _restore(peer, state)
        checks[peer.name] = check_equal("losses per example", found, peer.losses(), TOLERANCE[precision])
    all_rows = replace(ours.layout, split_head=False)
    ours.train_once(sequences[: 2 * STEP])
    sides = {
        "koat": lambda: ours.train_once(sequences),
        "all head rows": lambda: ours.train_once(sequences, all_rows),
    }
    sides |= {peer.name: peer.train for peer in peers if checks[peer.name].passed}
    seconds = interleave(sides, options.rounds, options.device)
    work = count_work(ours, sequences)
    name = f"{family} {options.size}"
    results = [
        make_result(benchmark, name, precision, adapter, ours, peer, checks[peer.name], seconds, work, matrix_rate)
        for peer in peers
    ]
    return Findings(results, skipped=[f"{benchmark}: {reason}" for reason in skipped])


def _restore(peer: Peer, state: dict[str, Tensor]) -> None:
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(peer.model, state)


def make_result(
    benchmark: str,
    model: str,
    precision: str,
    adapter: Section,
    ours: Ours,
    peer: Peer,
    check: Check,
    seconds: dict[str, float],
    work: Work,
    matrix_rate: float,
) -> Result:
    """Turn counts and seconds into a line, the ratio broken into its four factors."""
    method = str(adapter.method)  # type: ignore[attr-defined]
    settings = f"{peer.name}: {peer.settings}"
    result = Result(benchmark, model, precision, method, peer.name, str(check), check.passed, settings)
    result.target = TARGETS[benchmark][peer.name]
    if not check.passed:
        return result
    ratio = seconds[peer.name] / seconds["koat"]
    padding = (peer.num_tokens / work.num_original) / (work.num_padded / work.num_unique)
    sharing = work.num_original / work.num_unique
    head = seconds["all head rows"] / seconds["koat"]
    result.rate = work.num_original / seconds["koat"]
    result.peer_rate = work.num_original / seconds[peer.name]
    result.factors = {
        "padding": padding, "sharing": sharing, "head": head, "kernel": ratio / (padding * sharing * head),
    }  # fmt: skip
    result.machine_share = count_pass_flops(ours, work) / seconds["koat"] / matrix_rate
    pads = work.num_padded / work.num_unique - 1
    result.notes = f"{work.num_original:,} original, {work.num_unique:,} unique tokens; koat pads {pads:.1%}"
    return result


def count_pass_flops(ours: Ours, work: Work) -> float:
    """Return the FLOPs of one pass over the examples, a low-rank update's own weights trained."""
    named = ours.model.named_parameters()
    matrices = sum(p.numel() for name, p in named if p.requires_grad and p.ndim == 2 and "lora_" in name)
    return count_flops(
        unwrap(ours.model),
        num_tokens=work.num_unique,
        num_keys=work.num_keys,
        num_head_rows=work.num_head_rows,
        trains=True,
        num_adapter_weights=matrices,
    )
