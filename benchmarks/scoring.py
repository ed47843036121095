"""What the scoring benchmarks share: lm-evaluation-harness' `HFLM` at its best, and what either side computes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.measure import Result, time_once
from benchmarks.peers import count_padded
from benchmarks.workload import Absent
from koat.core.sequence import supervise_from
from koat.evaluation.spans import Span
from koat.forest.build import build_forest
from koat.forest.score import Layout, cut_sequences
from koat.forest.verify import verify_layout

BATCH_SIZES = (1, 4, 8, 16, 32)
CONTEXT = 8192
"""Room for 25 shots."""
TOLERANCE = {"float32": 1e-3, "bfloat16": 1.0}
"""Largest difference allowed between two log-probabilities of one continuation (a sum over its tokens)."""


def build_peer(model: Any, tokenizer: Any, device: torch.device) -> Any:
    """Build the harness' `HFLM` around a model. Raises Absent when it is not installed."""
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise Absent(f"lm-evaluation-harness is not installed ({error}); it comes with the extra `bench`") from error
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device=str(device), max_length=CONTEXT)


def ask_lm(lm: Any, instances: ListLike[Any]) -> Tensor:
    """Return every continuation's log-probability `[N]` from a model of the harness, HFLM or koat's."""
    return torch.tensor([value for value, _ in lm.loglikelihood(instances, disable_tqdm=True)], dtype=torch.float64)


def run_peer(peer: Any, instances: ListLike[Any], batch_size: int) -> Tensor:
    """Return every continuation's log-probability `[N]` from `HFLM` at a batch size."""
    peer.batch_size_per_gpu = batch_size
    return ask_lm(peer, instances)


def find_layout(model: Any) -> Layout:
    """Return a model's verified layout. Raises RuntimeError when it does not share prefixes."""
    layout, found = verify_layout(model)
    if not found.shares:
        raise RuntimeError(f"koat refuses to share prefixes on {model.config.model_type}: {found.reason}")
    return layout


def count_peer_tokens(spans: Iterable[Span], batch_size: int) -> tuple[int, int]:
    """Return (tokens, tokens with padding) that the harness computes: equal inputs are merged by it."""
    lengths = sorted(map(len, {span.token_ids[:-1] for span in spans}), reverse=True)
    return sum(lengths), count_padded(lengths, batch_size)


def count_requests(spans: ListLike[Span], batch_size: int, num_tokens: int = 2000) -> int:
    """Return how many of the first requests fill a batch with inputs that differ, and take a moment to compute."""
    inputs: set[tuple[int, ...]] = set()
    total = 0
    for number, span in enumerate(spans, 1):
        if span.token_ids[:-1] not in inputs:
            inputs.add(span.token_ids[:-1])
            total += len(span.token_ids) - 1
        if len(inputs) >= batch_size and total >= num_tokens:
            return number
    return len(spans)


def pick_batch_size(
    peer: Any, instances: ListLike[Any], spans: ListLike[Span], device: torch.device
) -> tuple[int, str]:
    """Return the harness' fastest batch size on its first requests, and its settings in words.

    `spans` are the instances as tokens. Sizes grow until one is slower than the best, or its logits would fill
    half the free memory.
    """
    longest = max(len(span.token_ids) for span in spans)
    tried: dict[int, float] = {}
    for size in BATCH_SIZES:
        # Float32 logits and their log-softmax exist at once.
        if tried and 8 * size * longest * peer.model.config.vocab_size > 0.5 * psutil.virtual_memory().available:
            break
        count = count_requests(spans, size)
        seconds = time_once(lambda: void(run_peer(peer, instances[:count], size)), device)  # noqa: B023
        tried[size] = seconds / count_peer_tokens(spans[:count], size)[0]
        if count == len(spans) or tried[size] > 1.03 * min(tried.values()):
            break
    best = min(tried, key=lambda size: tried[size])
    rates = ", ".join(f"{size}: {1 / seconds:,.0f} tok/s" for size, seconds in tried.items())
    return best, f"HFLM: batch size {best} (tried {rates}), sorted by length, one-token choices merged"


def void(value: Any) -> None:
    """Drop a value: what is timed returns nothing."""


@dataclass
class Work:
    """What koat computes: distinct tokens, the same with padding, the keys they see, rows of the head."""

    num_tokens: int = 0
    num_padded: int = 0
    num_keys: int = 0
    num_head_rows: int = 0

    def add(self, num_tokens: int, num_padded: int, position: Any, source: Any) -> None:
        """Count a forest or a micro-batch: its tokens stand at `position`, predictions come from `source`."""
        self.num_tokens += num_tokens
        self.num_padded += num_padded
        self.num_keys += int(position.sum()) + num_tokens
        self.num_head_rows += len(set(source.tolist()))

    def count_flops(self, model: Any) -> float:
        """Return the FLOPs that this takes, however it is laid out."""
        return machine.count_flops(
            model, num_tokens=self.num_tokens, num_keys=self.num_keys, num_head_rows=self.num_head_rows, trains=False
        )


def count_work(blocks: Iterable[ListLike[Span]], layout: Layout, token_budget: int) -> Work:
    """Count what koat computes for blocks of spans that are laid out together."""
    work = Work()
    for block in blocks:
        sequences = [supervise_from(span.token_ids, len(span.context_ids)) for span in block]
        if layout.streams:
            forest = build_forest(sequences)
            work.add(len(forest), len(forest), forest.position, forest.source)
            continue
        for batch in cut_sequences(sequences, layout, token_budget):
            work.add(batch.num_tokens, batch.token_ids.numel(), batch.position, batch.source)
    return work


@dataclass(frozen=True)
class Timing:
    """Median seconds: koat, koat with all rows of the head, the peer; and what the peer computed."""

    koat: float
    all_head_rows: float
    peer: float
    peer_tokens: int
    peer_padded: int
    num_tokens: int
    """Every context with its continuation, before sharing."""

    @classmethod
    def of(cls, seconds: Mapping[str, float], spans: ListLike[Span], batch_size: int) -> Timing:
        """Put what `interleave` returned beside what the peer computed at its batch size."""
        num_tokens = sum(len(span.token_ids) for span in spans)
        return cls(
            seconds["koat"], seconds["all_head_rows"], seconds["peer"],
            *count_peer_tokens(spans, batch_size), num_tokens,
        )  # fmt: skip


def fill_result(result: Result, model: Any, work: Work, timing: Timing, num_items: int, matrix_rate: float) -> None:
    """Turn counts and seconds into rates, factors and the share of the machine's rate."""
    result.rate, result.peer_rate = timing.num_tokens / timing.koat, timing.num_tokens / timing.peer
    padding = (timing.peer_padded / timing.peer_tokens) / (work.num_padded / work.num_tokens)
    sharing, head = timing.peer_tokens / work.num_tokens, timing.all_head_rows / timing.koat
    kernel = timing.peer / timing.koat / (padding * sharing * head)
    result.factors = {"padding": padding, "sharing": sharing, "head": head, "kernel": kernel}
    result.machine_share = work.count_flops(model) / timing.koat / matrix_rate
    result.notes = (
        f"{num_items} items, {timing.num_tokens:,} tokens, {timing.peer_tokens:,} at the peer (merged), "
        f"{work.num_tokens:,} unique; {timing.koat / num_items:.2f} against {timing.peer / num_items:.2f} s an item"
    )
