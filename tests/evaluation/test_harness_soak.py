"""koat's model of lm-evaluation-harness on every local task and five models, against the harness' own backend.

The long runs are marked `soak`; they print the largest differences and the near-ties.
"""

from __future__ import annotations

import gzip
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_base import need_shared

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra `eval`)")

from koat.core.settings import ModelSettings
from koat.evaluation import spans
from koat.evaluation.harness.lm import HarnessOptions, KoatLM
from koat.model import load_model, load_tokenizer
from koat.workflows.evaluating.harness import TASKS
from tests.evaluation.test_harness import FAMILIES, VOCABULARY, ask, make_both

TOLERANCE = 1e-3
LOCAL = (
    "hellaswag", "arc_easy", "arc_challenge", "piqa", "openbookqa", "winogrande", "lambada", "lambada_rolling",
    "truthfulqa_mc1", "truthfulqa_mc2", "mmlu_anatomy", "mmlu_world_religions", "gsm8k",
    "kobest_boolq", "kobest_copa", "kobest_hellaswag", "kobest_sentineg", "kobest_wic",
)  # fmt: skip
BOOKS = ("text_en/alice.txt.gz", "text_en/moby_dick.txt.gz", "text_ko/statutes_kr.txt.gz", "text_ko/docs_vue_ko.txt.gz")


def run_tasks(lm: Any, data: Path, **options: Any) -> dict[str, Any]:
    """Run the local tasks through the harness' own evaluator."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"data_dir": str(data)})
    tasks = [f"local_{name}" for name in LOCAL]
    found: dict[str, Any] = simple_evaluate(
        lm, tasks=tasks, task_manager=manager, bootstrap_iters=0, log_samples=True, **options
    )
    return found


@pytest.fixture(scope="module", params=["nano", *FAMILIES])
def both(request: pytest.FixtureRequest, make_model: Callable[..., Any]) -> tuple[KoatLM, Any]:
    """Both models of one family, or of the base that ships, with the shipped tokenizer."""
    tokenizer = load_tokenizer(ModelSettings(base="nano"))
    if request.param == "nano":
        model = load_model(ModelSettings(base="nano", dtype="float32", device="cpu"))
    else:
        long = {"n_positions": 2048} if request.param == "gpt2" else {"max_position_embeddings": 2048}
        model = make_model(request.param, vocab_size=len(tokenizer), **long)
    koat, peer = make_both(model, tokenizer, batch_size=1)
    assert koat.layout.shares
    return koat, peer


# Real tasks ----------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """What a comparison has seen: the largest difference, how much was compared, and what nearly tied."""

    peer: Any
    worst: float = 0.0
    num_compared: int = 0
    near_ties: list[str] = field(default_factory=list)

    def compare_numbers(self, where: str, ours: float, theirs: float) -> float:
        """Compare two log-probabilities; one of thousands of tokens is rounded to float32 by the harness."""
        difference = abs(ours - theirs) / max(1.0, abs(theirs) / 1000)
        assert difference < TOLERANCE, f"{where}: {ours} against {theirs}"
        self.worst, self.num_compared = max(self.worst, difference), self.num_compared + 1
        return difference

    def compare_samples(self, task: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
        """Compare the answers and metrics of one item."""
        where = f"{task} {theirs['doc_id']}"
        assert ours["arguments"] == theirs["arguments"], where
        difference = 0.0
        pairs = zip(ours["filtered_resps"], theirs["filtered_resps"], strict=True)
        for number, (mine, expected) in enumerate(pairs):
            if isinstance(expected, str):
                assert mine == expected, where
            elif isinstance(expected, float):
                self.compare_numbers(where, mine, expected)
            else:
                difference = max(difference, self.compare_numbers(where, mine[0], expected[0]))
                if mine[1] != expected[1]:
                    self.allow_tie(
                        f"{where}, greedy", abs(measure_greedy_margin(self.peer, *theirs["arguments"][number])), 1e-5
                    )
        for metric in theirs["metrics"]:
            self.compare_metrics(f"{where}, {metric}", ours, theirs, metric, difference)

    def compare_metrics(
        self, where: str, ours: dict[str, Any], theirs: dict[str, Any], metric: str, difference: float
    ) -> None:
        mine, expected = ours[metric], theirs[metric]
        chooses = len(theirs["filtered_resps"]) > 1 and expected in (0.0, 1.0)
        margin = measure_choice_margin(theirs, metric) if chooses else float("inf")
        if margin <= 2 * difference or (chooses and mine != expected):
            self.allow_tie(where, margin, 2 * difference)
        elif isinstance(expected, float):
            assert mine == pytest.approx(expected, abs=1e-3, rel=1e-4), where
        elif metric.endswith("perplexity") or metric == "bits_per_byte":
            assert mine == pytest.approx(expected, rel=1e-5), where
        else:
            assert mine == expected, where

    def allow_tie(self, where: str, margin: float, difference: float) -> None:
        """Keep a near-tie, which may fall either way. Fails where the margin exceeds the difference."""
        assert margin <= difference, f"{where}: margin {margin:.1e}, difference {difference:.1e}"
        self.near_ties.append(f"{where} (margin {margin:.1e})")


def measure_greedy_margin(peer: Any, context: str, continuation: str) -> float:
    """Return by how much greedy decoding prefers the continuation's tokens; negative where it writes another."""
    before, after = peer._encode_pair(context, continuation)
    wanted = torch.tensor(after)[:, None]
    with torch.no_grad():
        logits = peer.model(torch.tensor([(before + after)[:-1]])).logits[0, -len(after) :].float()
    others = logits.scatter(1, wanted, -torch.inf).amax(1)
    return float((logits.gather(1, wanted)[:, 0] - others).min())


def measure_choice_margin(sample: dict[str, Any], metric: str) -> float:
    """Return how far the best choice is ahead of the next, by the score that the metric compares."""
    values = [answer[0] for answer in sample["filtered_resps"]]
    if metric == "acc_norm":
        lengths = [len(continuation.removeprefix(" ")) for _, continuation in sample["arguments"]]
        values = [value / max(1, length) for value, length in zip(values, lengths, strict=True)]
    best, second = sorted(values, reverse=True)[:2]
    return float(best - second)


@pytest.mark.soak
def test_every_local_task_comes_out_as_with_the_harness_own(
    both: tuple[KoatLM, Any], request: pytest.FixtureRequest
) -> None:
    """Log-probabilities, greedy flags, texts and metrics; what nearly ties may fall either way and is listed."""
    koat, peer = both
    data = need_shared("data", "benchmarks")
    options = {"limit": 12, "num_fewshot": 1, "gen_kwargs": {"max_gen_toks": 16}}
    ours, theirs = run_tasks(koat, data, **options), run_tasks(peer, data, **options)
    found = Found(peer)
    assert len(theirs["samples"]) == len(LOCAL)
    for task, samples in theirs["samples"].items():
        for mine, expected in zip(ours["samples"][task], samples, strict=True):
            found.compare_samples(task, mine, expected)
        scores = {key: value for key, value in theirs["results"][task].items() if isinstance(value, float)}
        assert scores
        tied = any(tie.startswith(f"{task} ") for tie in found.near_ties)
        mine = {key: ours["results"][task][key] for key in scores}
        assert tied or mine == pytest.approx(scores, abs=1e-4, rel=1e-4), task
    print(
        f"\n{request.node.callspec.id}: {found.num_compared} log-probabilities, largest difference "
        f"{found.worst:.1e}; near-ties: {found.near_ties or 'none'}"
    )
    assert found.num_compared > 600


@pytest.mark.soak
def test_perplexity_of_long_texts_comes_out_as_with_the_harness_own(
    both: tuple[KoatLM, Any], request: pytest.FixtureRequest
) -> None:
    """English and Korean prose, longer than the context, in several windows."""
    koat, peer = both
    texts = []
    for name in BOOKS:
        path = need_shared("data", *name.split("/"))
        texts.append(gzip.decompress(path.read_bytes()).decode("utf-8")[4000:10_000])
    assert max(len(koat.tok_encode(text)) for text in texts) > koat.max_length
    requests = ask("loglikelihood_rolling", *[(text,) for text in texts])
    found = Found(peer)
    expected = peer.loglikelihood_rolling(requests, disable_tqdm=True)
    for name, mine, theirs in zip(
        BOOKS, koat.loglikelihood_rolling(requests, disable_tqdm=True), expected, strict=True
    ):
        found.compare_numbers(name, mine, theirs)
    print(f"\n{request.node.callspec.id}: rolling, largest difference per 1,000 nats {found.worst:.1e}")


@pytest.mark.soak
def test_greedy_texts_come_out_as_with_the_harness_own(both: tuple[KoatLM, Any]) -> None:
    koat, peer = both
    text = gzip.decompress(need_shared("data", "text_ko", "statutes_kr.txt.gz").read_bytes()).decode("utf-8")
    generator = random.Random(0)
    starts = [generator.randrange(len(text) - 400) for _ in range(24)]
    options = {"until": ["\n\n", "제1조"], "max_gen_toks": 32, "do_sample": False}
    prompts = [text[start : start + generator.randrange(20, 400)] for start in starts]
    requests = ask("generate_until", *[(prompt, dict(options)) for prompt in prompts])
    expected = peer.generate_until(requests, disable_tqdm=True)
    assert koat.generate_until(requests, disable_tqdm=True) == expected
    assert len(set(expected)) > 10


# What must not move scores -------------------------------------------------------------------------------------


def draw_requests(generator: random.Random) -> list[tuple[Any, list[int], list[int]]]:
    """Return requests as tokens whose contexts branch off one another, some of them equal, in random order."""

    def draw(least: int, most: int) -> list[int]:
        return [generator.randrange(3, VOCABULARY) for _ in range(generator.randint(least, most))]

    contexts = [draw(5, 40)]
    for _ in range(7):
        stem = generator.choice(contexts)
        contexts.append(stem[: generator.randint(1, len(stem))] + draw(1, 25))
    answers = [draw(1, 4) for _ in range(3)]
    requests = [(("", ""), context, answer) for context in contexts for answer in (*answers, draw(1, 9))]
    return generator.sample(requests, len(requests)) + requests[:3]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_move_with_neither_budget_nor_order(
    family: str, make_model: Callable[..., Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any budget, order and block give what each request gives alone."""
    koat, _ = make_both(make_model(family, vocab_size=VOCABULARY), tokenizer)
    for seed in range(4):
        generator = random.Random(seed)
        requests = draw_requests(generator)
        alone = [koat._loglikelihood_tokens([request], disable_tqdm=True)[0] for request in requests]
        for _ in range(4):
            order = generator.sample(range(len(requests)), len(requests))
            koat.options = HarnessOptions(tokens=generator.choice([64, 97, 256, 8192]))
            monkeypatch.setattr(spans, "BLOCK", generator.choice([1, 5, 16, 1024]))
            found = koat._loglikelihood_tokens([requests[index] for index in order], disable_tqdm=True)
            for index, (logprob, greedy) in zip(order, found, strict=True):
                assert logprob == pytest.approx(alone[index][0], abs=1e-4), (seed, index)
                assert greedy == alone[index][1]
