"""Scoring 10-shot HellaSwag and 5-shot MMLU by log-likelihood, against lm-evaluation-harness' own `HFLM`."""

from __future__ import annotations

import gc
from collections.abc import Sequence as ListLike
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from torch import Tensor

from benchmarks.choice_prompts import Question, read_hellaswag, read_mmlu
from benchmarks.command import main
from benchmarks.machine import count_flops
from benchmarks.measure import Findings, Result, check_equal, interleave, time_once
from benchmarks.peers import count_padded
from benchmarks.workload import VOCABULARY, Absent, Options, build_base, open_tokenizer
from koat.core.sequence import supervise_from
from koat.evaluation.protocol import ChoiceRequest
from koat.evaluation.scorer import score_requests
from koat.forest.score import Layout, cut_sequences
from koat.forest.verify import verify_layout

TASKS = {"HellaSwag, 10 shots": (read_hellaswag, 10, 4, 1), "MMLU, 5 shots": (read_mmlu, 5, 96, 64)}
"""Reader, shots, items at 25 minutes, items at least."""
BATCH_SIZES = (1, 4, 8, 16, 32)
TOKEN_BUDGET = 4096
TOLERANCE = {"float32": 1e-3, "bfloat16": 1.0}
"""Largest difference allowed between two log-probabilities of one continuation (a sum over its tokens)."""
TARGET = 5.0


@dataclass
class Ours:
    """koat's side: strings to log-probabilities, tokenising included, as the peer's `loglikelihood` does."""

    model: Any
    layout: Layout
    tokenizer: Any
    questions: ListLike[Question]

    def encode(self) -> list[ChoiceRequest]:
        """Tokenise each context once and each context with its continuation, and cut as the harness cuts."""
        contexts = self.tokenizer([question.context for question in self.questions])["input_ids"]
        texts = [question.context + text for question in self.questions for text in question.continuations]
        wholes = iter(self.tokenizer(texts)["input_ids"])
        return [
            ChoiceRequest(
                str(number),
                tuple(context),
                tuple(tuple(next(wholes)[len(context) :]) for _ in question.continuations),
                question.gold,
            )
            for number, (question, context) in enumerate(zip(self.questions, contexts, strict=True))
        ]

    def score(self, layout: Layout | None = None) -> Tensor:
        """Return every continuation's log-probability `[N]`."""
        scored = score_requests(self.model, layout or self.layout, self.encode(), token_budget=TOKEN_BUDGET)
        return torch.tensor([value for item in scored.scores for value in item.choice_logprobs], dtype=torch.float64)


def make_instances(questions: ListLike[Question]) -> list[Any]:
    """Return the harness' requests for these questions."""
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type="loglikelihood", doc={}, arguments=(question.context, text), idx=number)
        for question in questions
        for number, text in enumerate(question.continuations)
    ]


def build_peer(model: Any, tokenizer: Any, device: torch.device) -> Any:
    """Build the harness' `HFLM` around a model. Raises Absent when it is not installed."""
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise Absent(f"lm-evaluation-harness is not installed ({error}); it comes with the extra `bench`") from error
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device=str(device), max_length=4096)


def run_peer(peer: Any, instances: ListLike[Any], batch_size: int) -> Tensor:
    """Return every continuation's log-probability `[N]` from the harness."""
    peer.batch_size_per_gpu = batch_size
    return torch.tensor([value for value, _ in peer.loglikelihood(instances, disable_tqdm=True)], dtype=torch.float64)


def count_peer_tokens(requests: ListLike[ChoiceRequest], batch_size: int) -> tuple[int, int]:
    """Return (tokens, tokens with padding) that the harness computes: equal inputs are merged by it."""
    inputs = {(request.context_ids + choice)[:-1] for request in requests for choice in request.choices}
    lengths = sorted(map(len, inputs), reverse=True)
    return sum(lengths), count_padded(lengths, batch_size)


def pick_batch_size(
    peer: Any, questions: ListLike[Question], requests: ListLike[ChoiceRequest], device: torch.device
) -> tuple[int, str]:
    """Return the harness' fastest batch size on the first few questions, and what was tried, in words.

    Sizes grow until one is clearly slower than the best, or its logits would fill half the free memory.
    """
    longest = max(request.num_tokens for request in requests)
    tried: dict[int, float] = {}
    for size in BATCH_SIZES:
        # Float32 logits and their log-softmax exist at once.
        if tried and 8 * size * longest * VOCABULARY > 0.5 * psutil.virtual_memory().available:
            break
        count = -(-min(size, 8) // len(questions[0].continuations))
        some, asked = questions[:count], requests[:count]
        seconds = time_once(lambda: void(run_peer(peer, make_instances(some), size)), device)  # noqa: B023
        tried[size] = seconds / count_peer_tokens(asked, size)[0]
        if tried[size] > 1.1 * min(tried.values()):
            break
    best = min(tried, key=lambda size: tried[size])
    return best, ", ".join(f"{size}: {1 / seconds:,.0f} tok/s" for size, seconds in tried.items())


def void(value: Any) -> None:
    """Drop a value: what is timed returns nothing."""


def compare_scoring(
    task: str, family: str, precision: str, tokenizer: Any, options: Options, matrix_rate: float
) -> Result:
    """Check that both sides give the same log-probabilities, then time them in turns."""
    gc.collect()
    read, num_shots, num_items, least = TASKS[task]
    questions = read(options, options.scale(num_items, least), num_shots)
    model = build_base(family, options, precision)
    layout, found = verify_layout(model)
    if not found.shares:
        raise RuntimeError(f"koat refuses to share prefixes on {family} {precision}: {found.reason}")
    ours, peer = Ours(model, layout, tokenizer, questions), build_peer(model, tokenizer, options.device)
    requests, instances = ours.encode(), make_instances(questions)
    run_peer(peer, instances[:1], 1)
    batch_size, tried = pick_batch_size(peer, questions, requests, options.device)
    check = check_equal("log-probabilities", ours.score(), run_peer(peer, instances, batch_size), TOLERANCE[precision])
    settings = f"HFLM: batch size {batch_size} (tried {tried}), sorted by length, one-token choices merged, {precision}"
    result = Result(
        "scoring",
        f"{family} {options.size}",
        precision,
        task,
        "lm-eval HFLM",
        str(check),
        check.passed,
        settings,
    )
    result.target = TARGET
    if not check.passed:
        return result
    sides = {
        "koat": lambda: void(ours.score()),
        "all head rows": lambda: void(ours.score(replace(layout, split_head=False))),
        "peer": lambda: void(run_peer(peer, instances, batch_size)),
    }
    seconds = interleave(sides, options.rounds, options.device)
    return fill_result(result, ours, requests, batch_size, seconds, matrix_rate)


def fill_result(
    result: Result,
    ours: Ours,
    requests: ListLike[ChoiceRequest],
    batch_size: int,
    seconds: dict[str, float],
    matrix_rate: float,
) -> Result:
    """Turn counts and seconds into rates, factors and the share of the machine's rate."""
    sequences = [
        supervise_from(request.context_ids + choice, len(request.context_ids))
        for request in requests
        for choice in request.choices
    ]
    batches = list(cut_sequences(sequences, ours.layout, TOKEN_BUDGET))
    unique = sum(batch.num_tokens for batch in batches)
    padded = sum(batch.token_ids.numel() for batch in batches)
    original = sum(map(len, sequences))
    peer_tokens, peer_padded = count_peer_tokens(requests, batch_size)
    result.rate, result.peer_rate = original / seconds["koat"], original / seconds["peer"]
    padding, sharing = (peer_padded / peer_tokens) / (padded / unique), peer_tokens / unique
    head = seconds["all head rows"] / seconds["koat"]
    kernel = seconds["peer"] / seconds["koat"] / (padding * sharing * head)
    result.factors = {"padding": padding, "sharing": sharing, "head": head, "kernel": kernel}
    flops = count_flops(
        ours.model,
        num_tokens=unique,
        num_keys=sum(int(batch.position.sum()) for batch in batches) + unique,
        num_head_rows=sum(len(batch.source.unique()) for batch in batches),
        trains=False,
    )
    result.machine_share = flops / seconds["koat"] / matrix_rate
    result.notes = (
        f"{len(requests)} items, {original:,} tokens, {peer_tokens:,} at the peer (merged), {unique:,} unique; "
        f"{seconds['koat'] / len(requests):.2f} against {seconds['peer'] / len(requests):.2f} s an item"
    )
    return result


def run(options: Options, rates: dict[str, float]) -> Findings:
    """Compare both tasks on every family; in bfloat16 only where it alone was asked for.

    The harness scores in the type that the weights have, and only float32 tells equal from nearly equal.
    """
    tokenizer = open_tokenizer(options)
    findings = Findings()
    for task in TASKS:
        for family in options.families:
            for precision in [kind for kind in options.precisions if kind == "float32"] or options.precisions:
                result = compare_scoring(task, family, precision, tokenizer, options, rates[precision])
                print(result.describe(), flush=True)
                findings.results.append(result)
    return findings


if __name__ == "__main__":
    main(run, __doc__)
