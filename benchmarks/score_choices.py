"""Scoring 10-shot HellaSwag and 5-shot MMLU by log-likelihood, against lm-evaluation-harness' own `HFLM`."""

from __future__ import annotations

import gc
from collections.abc import Sequence as ListLike
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.choice_prompts import Question, read_hellaswag, read_mmlu
from benchmarks.command import main
from benchmarks.measure import Findings, Result, check_equal, interleave
from benchmarks.scoring import (
    TOLERANCE,
    Timing,
    build_peer,
    count_work,
    fill_result,
    find_layout,
    pick_batch_size,
    run_peer,
    void,
)
from benchmarks.workload import Options, build_base, open_tokenizer
from koat.evaluation.protocol import ChoiceRequest
from koat.evaluation.scorer import BLOCK, order_requests, score_requests
from koat.evaluation.spans import Span
from koat.forest.score import Layout

TASKS = {"HellaSwag, 10 shots": (read_hellaswag, 10, 4, 1), "MMLU, 5 shots": (read_mmlu, 5, 96, 64)}
"""Reader, shots, items in all, items at least."""
TOKEN_BUDGET = 4096
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


def list_spans(requests: ListLike[ChoiceRequest]) -> list[Span]:
    """Return every choice behind its context."""
    return [Span(request.context_ids, choice) for request in requests for choice in request.choices]


def compare_scoring(
    task: str, family: str, precision: str, tokenizer: Any, options: Options, matrix_rate: float
) -> Result:
    """Check that both sides give the same log-probabilities, then time them in turns."""
    gc.collect()
    read, num_shots, num_items, least = TASKS[task]
    questions = read(options, options.scale(num_items, least), num_shots)
    model = build_base(family, options, precision)
    ours, peer = Ours(model, find_layout(model), tokenizer, questions), build_peer(model, tokenizer, options.device)
    requests, instances = ours.encode(), make_instances(questions)
    run_peer(peer, instances[:1], 1)
    batch_size, settings = pick_batch_size(peer, instances, list_spans(requests), options.device)
    check = check_equal("log-probabilities", ours.score(), run_peer(peer, instances, batch_size), TOLERANCE[precision])
    result = Result(
        "scoring",
        f"{family} {options.size}",
        precision,
        task,
        "lm-eval HFLM",
        str(check),
        check.passed,
        f"{settings}, {precision}",
    )
    result.target = TARGET
    if not check.passed:
        return result
    sides = {
        "koat": lambda: void(ours.score()),
        "all_head_rows": lambda: void(ours.score(replace(ours.layout, split_head=False))),
        "peer": lambda: void(run_peer(peer, instances, batch_size)),
    }
    seconds = interleave(sides, options.rounds, options.device)
    timing = Timing.of(seconds, list_spans(requests), batch_size)
    ordered = [requests[at] for at in order_requests(requests, ours.layout)]
    blocks = [list_spans(ordered[start : start + BLOCK]) for start in range(0, len(ordered), BLOCK)]
    fill_result(result, model, count_work(blocks, ours.layout, TOKEN_BUDGET), timing, len(requests), matrix_rate)
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
