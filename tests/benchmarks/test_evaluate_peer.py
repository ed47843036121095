"""The evaluation benchmark: both sides answer every task alike, and what is counted is what was computed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("psutil", reason="the benchmarks describe the machine with psutil (extra `bench`)")
pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra `bench`)")
torch = pytest.importorskip("torch")

from benchmarks import evaluate, scoring, workload  # noqa: E402
from benchmarks.evaluate_growth import Growth, Point, draw_growth, tabulate  # noqa: E402
from benchmarks.evaluate_tasks import EXAMS, SMALL_HEAD, build_instances, train_small_tokenizer  # noqa: E402
from benchmarks.measure import Check, Findings  # noqa: E402
from koat.evaluation.spans import Span  # noqa: E402
from tests.tiny_base import need_shared  # noqa: E402

NUM_ITEMS = {"MMLU, 5 shots": 6, "NSMC, 10 fixed shots": 12}


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> workload.Options:
    """Real data, of NSMC's 60,000 training reviews the first 200."""
    data = tmp_path_factory.mktemp("data")
    (data / "benchmarks").symlink_to(need_shared("data", "benchmarks"))
    (data / "nsmc").mkdir()
    for name in ("train.tsv", "test.tsv"):
        lines = need_shared("data", "nsmc", name).read_text(encoding="utf-8").splitlines()[:201]
        (data / "nsmc" / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return workload.Options(quick=True, size="tiny", device=torch.device("cpu"), data=data)


@pytest.fixture(scope="module")
def tokenizer(options: workload.Options) -> Any:
    """The shipped tokenizer."""
    return workload.open_tokenizer(options)


def build(title: str, options: workload.Options, tokenizer: Any) -> list[Any]:
    """Return a few items of an exam with all its shots."""
    return build_instances(EXAMS[title], options, tokenizer, NUM_ITEMS.get(title, 2), EXAMS[title].num_shots)


@pytest.mark.parametrize("family", workload.FAMILIES)
@pytest.mark.parametrize("title", EXAMS)
def test_both_sides_answer_alike(
    title: str, family: str, options: workload.Options, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(workload.SIZES, "tiny", (64, 2, 4))
    monkeypatch.setattr(evaluate, "ROUNDS", 1)
    monkeypatch.setattr(scoring, "BATCH_SIZES", (2,))
    instances = build(title, options, tokenizer)
    model = workload.build_base(family, options, max_position_embeddings=scoring.CONTEXT, vocab_size=len(tokenizer))
    result = evaluate.compare(title, model, family, tokenizer, instances, options, 1e9)
    assert result.passed, result.check
    assert result.factors["sharing"] > 2
    assert torch.tensor(list(result.factors.values())).prod().item() == pytest.approx(result.ratio)


def test_work_is_counted_as_it_is_done(options: workload.Options, tokenizer: Any) -> None:
    """Tokens counted from the requests are those that koat's model says it computed."""
    model = workload.build_base("llama", options, vocab_size=len(tokenizer))
    for title in ("MMLU, 5 shots", "TruthfulQA, mc1 and mc2"):
        sitting = evaluate.sit_down(model, tokenizer, build(title, options, tokenizer), options)
        tally, layout = sitting.koat.tally, sitting.koat.layout
        before = tally.num_unique_tokens
        scoring.ask_lm(sitting.koat, sitting.instances)
        work = scoring.count_work(sitting.list_blocks(), layout, sitting.koat.options.tokens)
        assert work.num_tokens == tally.num_unique_tokens - before
        assert work.num_padded >= work.num_tokens > work.num_head_rows


def test_a_batch_is_tried_with_as_many_inputs_as_it_holds() -> None:
    spans = [Span((1, 2, number), (choice,)) for number in range(6) for choice in (7, 8)]
    assert scoring.count_requests(spans, 1, num_tokens=1) == 1
    assert scoring.count_requests(spans, 3, num_tokens=1) == 5
    assert scoring.count_requests(spans, 1, num_tokens=12) == 7
    assert scoring.count_requests(spans, 32) == len(spans)


def test_reviews_stand_behind_the_same_shots(options: workload.Options, tokenizer: Any) -> None:
    contexts = [instance.args[0] for instance in build("NSMC, 10 fixed shots", options, tokenizer)]
    assert len(set(contexts)) == NUM_ITEMS["NSMC, 10 fixed shots"] == len(contexts) / 2
    assert {context.count("감정:") for context in contexts} == {11}
    assert len({context.rpartition("문장:")[0] for context in contexts}) == 1


def test_small_tokenizer_loses_no_text(options: workload.Options, tokenizer: Any) -> None:
    texts = ["".join(instance.args) for title in EXAMS for instance in build(title, options, tokenizer)]
    few = train_small_tokenizer(texts)
    assert 256 < len(few) <= SMALL_HEAD
    assert few.decode(few(texts[0])["input_ids"]) == texts[0]


def test_points_that_differ_have_no_seconds(tmp_path: Path) -> None:
    equal, unequal = Check("log-probabilities", 1e-5, 1e-3, 1.0), Check("log-probabilities", 1.0, 1e-3, 1.0)
    growth = Growth(
        "items", "5 shots", [Point(8, 1.0, 6.0, equal), Point(16, 1.5, 12.0, equal), Point(32, 2, 3, unequal)]
    )
    rows = tabulate(growth).rows
    assert [row[1:4] for row in rows] == [("1.00", "6.00", "6.0"), ("1.50", "12.00", "8.0"), ("-", "-", "-")]
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra `bench`)")
    draw_growth(tmp_path / "time.svg", [growth, growth], "MMLU")
    assert "items, 5 shots" in (tmp_path / "time.svg").read_text(encoding="utf-8")


def test_the_plot_is_kept_beside_its_table(tmp_path: Path, options: workload.Options, monkeypatch: Any) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra `bench`)")
    equal = Check("log-probabilities", 1e-5, 1e-3, 1.0)
    growth = Growth("items", "5 shots", [Point(8, 1.0, 6.0, equal), Point(16, 1.5, 12.0, equal)])
    monkeypatch.setattr(evaluate, "measure_growth", lambda *_: [growth, growth])
    monkeypatch.setattr(evaluate, "ROOT", tmp_path)
    (tmp_path / "build").mkdir()
    findings = Findings()
    evaluate.add_growth(findings, SimpleNamespace(config=SimpleNamespace(model_type="llama")), None, options)
    assert [table.picture for table in findings.tables] == ["", "evaluate-time.svg"]
    assert (tmp_path / "build" / "evaluate-time.svg").is_file()
