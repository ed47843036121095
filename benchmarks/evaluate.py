"""koat's model of lm-evaluation-harness against the harness' own `HFLM`: the same tasks, the same request objects."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from benchmarks.command import main
from benchmarks.evaluate_growth import Growth, Point, draw_growth, tabulate
from benchmarks.evaluate_tasks import EXAMS, SMALL_HEAD, build_instances, gather_texts, train_small_tokenizer
from benchmarks.measure import Check, Findings, Result, check_equal, interleave
from benchmarks.scoring import (
    CONTEXT,
    TOLERANCE,
    Timing,
    ask_lm,
    build_peer,
    count_work,
    fill_result,
    find_layout,
    pick_batch_size,
    run_peer,
)
from benchmarks.workload import ROOT, Options, build_base, open_tokenizer
from koat.evaluation.spans import BLOCK, Span, order_tokens

PRECISION = "float32"
"""Only here does a difference of log-probabilities tell equal from nearly equal."""
ROUNDS = 2
"""A B A B: a run of the peer takes so long that its noise averages out."""
GROWTH = "MMLU, 5 shots"
ITEMS, SHOTS = (8, 16, 32, 64), (0, 1, 2, 3, 5)
"""Where time is measured along either axis; the other stays at 5 shots, or at 16 items."""


@dataclass
class Sitting:
    """Both sides before one list of requests, which `spans` holds as tokens."""

    koat: Any
    peer: Any
    instances: list[Any]
    spans: list[Span]
    batch_size: int
    settings: str

    @property
    def sides(self) -> dict[str, Callable[[], Tensor]]:
        """What each side does, from texts to log-probabilities `[N]`, tokenising included."""
        whole = type(self.koat)(self.koat.model, replace(self.koat.layout, split_head=False), self.koat.tokenizer)
        return {
            "koat": lambda: ask_lm(self.koat, self.instances),
            "all_head_rows": lambda: ask_lm(whole, self.instances),
            "peer": lambda: run_peer(self.peer, self.instances, self.batch_size),
        }

    def list_blocks(self) -> list[list[Span]]:
        """Return the spans as koat lays them out together."""
        order = order_tokens([span.token_ids for span in self.spans], self.koat.layout)
        return [[self.spans[at] for at in order[start : start + BLOCK]] for start in range(0, len(order), BLOCK)]


def sit_down(model: Any, tokenizer: Any, instances: list[Any], options: Options) -> Sitting:
    """Put both sides before requests, warmed up, the peer at its best batch size."""
    peer = build_peer(model, tokenizer, options.device)
    from koat.evaluation.harness.lm import KoatLM

    koat = KoatLM(model, find_layout(model), tokenizer)
    spans = koat.encoder.encode_pairs([instance.args for instance in instances])
    longest = max(len(span.token_ids) for span in spans)
    if longest > min(koat.max_length, peer.max_length):
        raise RuntimeError(f"a request has {longest} tokens, more than the model's context: both sides would cut it")
    ask_lm(koat, instances[:2])
    run_peer(peer, instances[:1], 1)
    batch_size, settings = pick_batch_size(peer, instances, spans, options.device)
    return Sitting(koat, peer, instances, spans, batch_size, settings)


def time_sides(
    sides: Mapping[str, Callable[[], Tensor]], rounds: int, options: Options
) -> tuple[dict[str, float], Check]:
    """Ask the sides in turns; return the median seconds of each, and whether their answers were equal."""
    answers: dict[str, Tensor] = {}

    def keep(name: str) -> None:
        answers[name] = sides[name]()

    seconds = interleave({name: partial(keep, name) for name in sides}, rounds, options.device)
    return seconds, check_equal("log-probabilities", answers["koat"], answers["peer"], TOLERANCE[PRECISION])


def compare(
    title: str, model: Any, name: str, tokenizer: Any, instances: list[Any], options: Options, matrix_rate: float
) -> Result:
    """Ask both sides in turns; there is a ratio only when their log-probabilities were equal."""
    gc.collect()
    sitting = sit_down(model, tokenizer, instances, options)
    seconds, check = time_sides(sitting.sides, ROUNDS, options)
    budget = sitting.koat.options.tokens
    settings = f"{sitting.settings}; koat: tokens={budget} (its default); {PRECISION}"
    result = Result(f"evaluation, {title}", name, PRECISION, title, "lm-eval HFLM", str(check), check.passed, settings)
    if check.passed:
        timing = Timing.of(seconds, sitting.spans, sitting.batch_size)
        work = count_work(sitting.list_blocks(), sitting.koat.layout, budget)
        num_items = len({instance.args[0] for instance in instances})
        fill_result(result, model, work, timing, num_items, matrix_rate)
    return result


def measure_growth(model: Any, tokenizer: Any, options: Options) -> list[Growth]:
    """Time both sides on growing numbers of items and of shots of one MMLU subject."""
    exam = EXAMS[GROWTH]
    items, shots = (ITEMS[:2], SHOTS[:2]) if options.quick else (ITEMS, SHOTS)
    growths = []
    for axis, fixed, places in (
        ("items", f"{exam.num_shots} shots", [(number, exam.num_shots) for number in items]),
        ("shots", f"{items[1]} items", [(items[1], number) for number in shots]),
    ):
        growth = Growth(axis, fixed)
        for num_items, num_shots in places:
            instances = build_instances(exam, options, tokenizer, num_items, num_shots)
            sitting = sit_down(model, tokenizer, instances, options)
            sides = {name: sitting.sides[name] for name in ("koat", "peer")}
            seconds, check = time_sides(sides, 1, options)
            amount = num_items if axis == "items" else num_shots
            growth.points.append(Point(amount, seconds["koat"], seconds["peer"], check))
        growths.append(growth)
    return growths


def run(options: Options, rates: dict[str, float]) -> Findings:
    """Compare all tasks on every family; on the first of them also with a small head, and the growth of time."""
    if PRECISION not in options.precisions:
        return Findings(skipped=[f"evaluate: measured in {PRECISION} only"])
    findings, tokenizer = Findings(), open_tokenizer(options)
    papers = build_papers(options, tokenizer)
    for family in options.families:
        compare_tasks(findings, papers, family, tokenizer, options, rates[PRECISION])
    few = train_small_tokenizer(gather_texts(options, tokenizer))
    compare_tasks(findings, papers, options.families[0], few, options, rates[PRECISION], vocab_size=SMALL_HEAD)
    model = build_base(options.families[0], options, max_position_embeddings=CONTEXT)
    add_growth(findings, model, tokenizer, options)
    return findings


def build_papers(options: Options, tokenizer: Any) -> dict[str, list[Any]]:
    """Return every exam's requests, as many as there is time for."""
    return {
        title: build_instances(
            exam, options, tokenizer, 4 if options.quick else options.scale(exam.num_items, exam.least), exam.num_shots
        )
        for title, exam in EXAMS.items()
    }


def compare_tasks(
    findings: Findings,
    papers: Mapping[str, list[Any]],
    family: str,
    tokenizer: Any,
    options: Options,
    matrix_rate: float,
    **shape: Any,
) -> None:
    """Compare all tasks on one model; `shape` overrides its configuration, and then the marks do not hold."""
    model = build_base(family, options, max_position_embeddings=CONTEXT, **shape)
    name = f"{family} {options.size}" + "".join(f", {key}={value}" for key, value in shape.items())
    for title, instances in papers.items():
        result = compare(title, model, name, tokenizer, instances, options, matrix_rate)
        result.target = None if shape else EXAMS[title].target
        print(result.describe(), flush=True)
        findings.results.append(result)


def add_growth(findings: Findings, model: Any, tokenizer: Any, options: Options) -> None:
    """Measure the growth of time; keep it as tables, and as a plot in `docs/` unless this is a quick run."""
    growths = measure_growth(model, tokenizer, options)
    findings.tables += [tabulate(growth) for growth in growths]
    folder = ROOT / "build" if options.quick else ROOT / "docs"
    try:
        draw_growth(
            folder / "evaluate-time.svg", growths, f"{EXAMS[GROWTH].tasks[0]}, {model.config.model_type}, {PRECISION}"
        )
        findings.tables[-1] = replace(findings.tables[-1], picture="evaluate-time.svg")
    except ImportError as error:
        findings.skipped.append(f"the plot: {error}; matplotlib comes with the extra `bench`")


if __name__ == "__main__":
    main(run, __doc__)
