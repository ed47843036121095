"""Ask a model one of lm-evaluation-harness' tasks, and put what comes back into koat's own form."""

from __future__ import annotations

import logging
import time

from koat.evaluation.harness.contract import describe_shots, make_harness_contract
from koat.evaluation.harness.lm import KoatLM
from koat.evaluation.harness.samples import predict_samples, sort_metrics, sort_samples
from koat.evaluation.harness.tasks import HarnessTask, import_lm_eval
from koat.evaluation.metrics import score_values
from koat.evaluation.result import TaskResult

log = logging.getLogger(__name__)


def evaluate_harness(lm: KoatLM, asked: HarnessTask, limit: int | None, *, chat_template: bool = False) -> TaskResult:
    """Ask a model the first `limit` items of a task (None: all) and score its answers by the task's own metrics.

    `lm` is asked nothing else, as its counts become the result's.
    """
    if chat_template:
        lm.chat_template(chat_template)
    started = time.perf_counter()
    found = import_lm_eval("lm_eval.evaluator").evaluate(
        lm=lm,
        task_dict={"tasks": {asked.name: asked.task}},
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=chat_template,
        fewshot_as_multiturn=chat_template,
    )
    seconds = time.perf_counter() - started
    samples = sort_samples(asked.task, found["samples"][asked.name])
    metrics = sort_metrics(samples, found["results"][asked.name])
    shots = describe_shots(asked)
    contracts = {name: make_harness_contract(asked, samples, name, shots) for name in metrics.by_item}
    notes = [*note_cuts(lm), *metrics.notes]
    for note in note_cuts(lm):
        log.warning("%s: %s", asked.name, note)
    return TaskResult(
        task=asked.name,
        num_shots=asked.num_shots,
        shot_seed=asked.seed,
        scores={name: score_values(name.partition(",")[0], values) for name, values in metrics.by_item.items()},
        values=metrics.overall,
        predictions=predict_samples(samples, metrics.by_item),
        contracts=contracts,
        conditions=lm.describe(),
        notes=notes,
        kept_out=[],
        seconds=seconds,
        num_tokens=lm.tally.num_tokens,
        num_unique_tokens=lm.tally.num_unique_tokens,
    )


def note_cuts(lm: KoatLM) -> list[str]:
    """Say how many requests were cut because they do not fit the model's context; nothing when all fit."""
    tally = lm.tally
    if not tally.num_cut:
        return []
    return [
        f"{tally.num_cut} of {tally.num_requests} requests do not fit the model's context of {lm.max_length} tokens "
        f"(the longest has {tally.longest}) and were cut from the left, as lm-eval does: {tally.num_tokens_cut} tokens "
        "were not seen. Fewer shots fit."
    ]
