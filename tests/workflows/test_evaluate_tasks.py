"""`koat eval` on tasks of lm-evaluation-harness and on written answers: scores, comparisons, refusals."""

from __future__ import annotations

import functools
import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import koat
from koat.core.json_lines import read_lines
from koat.workflows.comparing.compare import compare_targets
from tests.tiny_base import call_koat

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra `eval`)")

WORDS = ["비가", "눈이", "해가", "영화", "노래", "조금", "많이"]
OWN = """
task: {name}
tag: own_pair
custom_dataset: !function koat.evaluation.harness.local_data.load_local
dataset_kwargs: {{files: {{validation: words.jsonl}}, columns: {{question: query, choices: choices, gold: gold}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - {{metric: {metric}, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture(autouse=True)
def own_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the harness index koat's tasks alone: its own ten thousand take ten seconds."""
    import lm_eval.tasks

    manager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of two tasks, one without a needed column, an article with questions, and a user's own tasks."""
    folder = tmp_path_factory.mktemp("data")
    asked = [f"오늘 {WORDS[n % 7]} 내일 {WORDS[n * 3 % 7]}" for n in range(44)]
    rows = [{"query": text, "choices": ["비가 옵니다", "해가", "노래"], "gold": n % 3} for n, text in enumerate(asked)]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "llm_foundry").mkdir()
    for name in ("words.jsonl", "llm_foundry/arc_easy.jsonl", "llm_foundry/arc_challenge.jsonl"):
        (folder / name).write_text(lines, encoding="utf-8")
    (folder / "llm_foundry" / "piqa.jsonl").write_text('{"query": "x", "choices": ["y"]}\n' * 40, encoding="utf-8")
    qas = [{"id": str(n), "question": f"{word}?", "answers": [{"text": word}]} for n, word in enumerate(WORDS)]
    article = {"title": "날씨", "paragraphs": [{"context": " ".join(WORDS), "qas": qas}]}
    (folder / "qa.json").write_text(json.dumps({"data": [article]}, ensure_ascii=False), encoding="utf-8")
    for metric in ("acc", "acc_norm"):
        (folder / metric).mkdir()
        (folder / metric / "own.yaml").write_text(OWN.format(name="own_words", metric=metric), encoding="utf-8")
    (folder / "acc" / "other.yaml").write_text(OWN.format(name="own_other", metric="acc"), encoding="utf-8")
    return folder


def evaluate(target: Path, files: Path, out: Path, *tasks: str, **options: Any) -> dict[str, Any]:
    """Evaluate in Python into a folder of predictions; return the report."""
    return koat.evaluate(replace(koat.load(target), predictions=out), tasks=tasks, data_dir=files, **options)


def test_two_evaluations_by_lm_eval_s_tasks_are_compared(
    finished: Path, place: Path, files: Path, tmp_path: Path
) -> None:
    for name, target in (("base", place / "base"), ("run", finished)):
        report = evaluate(target, files, tmp_path / name, "arc_easy", "local_arc_challenge", num_shots=2)
        assert [result["task"] for result in report["results"]] == ["local_arc_easy", "local_arc_challenge"]
        for result in report["results"]:
            lines = read_lines(tmp_path / name / f"{result['task']}-2shot-seed1234.jsonl")
            assert len(lines) == result["num_items"] == 12
            for scoring, score in result["scores"].items():
                assert score["value"] == pytest.approx(sum(line["correct"][scoring] for line in lines) / 12)
                assert {line["contracts"][scoring] for line in lines} == {result["contracts"][scoring]["hash"]}
            assert result["num_unique_tokens"] < result["num_tokens"]
            assert result["seconds"] > 0
    found = compare_targets([str(tmp_path / "base"), str(tmp_path / "run")])
    assert {(column["task"], column["scoring"]) for column in found["columns"]} == {
        (task, scoring) for task in ("local_arc_easy", "local_arc_challenge") for scoring in ("acc", "acc_norm")
    }
    assert len(found["comparisons"]) == 4
    assert found["refusals"] == []


def test_acc_against_acc_norm_is_refused(place: Path, files: Path, tmp_path: Path) -> None:
    for metric in ("acc", "acc_norm"):
        evaluate(place / "base", files, tmp_path / metric, "own_words", include_path=files / metric)
    with pytest.raises(koat.DataError, match="acc against acc_norm: another metric"):
        compare_targets([str(tmp_path / "acc"), str(tmp_path / "acc_norm")])


def test_a_group_s_means_weigh_items_and_tasks(place: Path, files: Path, tmp_path: Path) -> None:
    status, out, error = call_koat(
        "eval", place / "base", "--task", "own_pair", "--data-dir", files, "--include-path", files / "acc",
        "--limit", 9, "--out", tmp_path,
    )  # fmt: skip
    assert status == 0, error
    assert "each item alike" in out
    assert "own_pair" in out
    (path,) = tmp_path.glob("*.scores.json")
    report = json.loads(path.read_text(encoding="utf-8"))
    (group,) = report["groups"]
    assert group["tasks"] == ["own_other", "own_words"]
    values = [result["scores"]["acc"]["value"] for result in report["results"]]
    assert group["means"]["acc"]["tasks"]["value"] == pytest.approx(sum(values) / 2)
    assert group["means"]["acc"]["items"]["num_items"] == 18


def test_own_tasks_and_lm_eval_s_stand_side_by_side(finished: Path, files: Path, tmp_path: Path) -> None:
    status, out, error = call_koat(
        "eval", finished, "--task", "context-qa", "--task", "local_arc_easy", "--data", files / "qa.json",
        "--data-dir", files, "--limit", 5, "--out", tmp_path, "--json",
    )  # fmt: skip
    assert status == 0, error
    answers, choices = json.loads(out)["results"]
    assert list(answers["scores"]) == ["exact_match", "f1"]
    assert answers["conditions"]["parts"]["template"] == "koalpaca", "the run's own template is asked"
    assert answers["num_items"] == choices["num_items"] == 5
    (line, *_) = read_lines(tmp_path / "context-qa-0shot.jsonl")
    assert line["text"]["title"] == "날씨"
    assert line["golds"]


def test_written_answers_and_lm_eval_s_tasks_are_given_the_tokens_of_the_command_line(
    place: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, int] = {}

    def watch(room: str, name: str) -> None:
        module = importlib.import_module(f"koat.evaluation.{room}")
        own = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *given, **more: seen.update({name: more["token_budget"]}) or own(*given, **more)
        )

    watch("answering", "continue_prompts")
    watch("harness.lm", "score_spans")
    status, _, error = call_koat(
        "eval", place / "base", "--task", "context-qa", "--task", "local_arc_easy", "--data", files / "qa.json",
        "--data-dir", files, "--limit", 2, "--out", tmp_path, "--tokens", 96,
    )  # fmt: skip
    assert status == 0, error
    assert seen == {"continue_prompts": 96, "score_spans": 96}


def test_the_leaderboard_s_shots_may_be_overridden_and_that_is_said() -> None:
    from koat.evaluation.catalogue import load_task
    from koat.workflows.evaluating.asking import Asking
    from koat.workflows.evaluating.exam import Exam

    asked: list[tuple[str, int | None]] = []

    class Listed(Exam):
        def add_harness(self, name: str, num_shots: int | None) -> list[tuple[str, int]]:
            asked.append((name, num_shots))
            return []

    for shots in (None, 3):
        exam = Listed((), Asking(num_shots=shots))
        exam.add_group(load_task("leaderboard-2023"))  # type: ignore[arg-type]
        assert len(exam.notes) == (shots is not None)
    assert [shots for _, shots in asked] == [25, 10, 5, 0, 0, 3, 3, 3, 3, 3]
    assert "ARC 25, HellaSwag 10" in exam.notes[0]


@pytest.mark.soak
def test_the_leaderboard_runs_on_local_files(tmp_path: Path) -> None:
    from tests.tiny_base import need_shared

    folder = need_shared("data", "benchmarks")
    status, out, error = call_koat(
        "eval", "nano", "--task", "leaderboard-2023", "--data-dir", folder, "--limit", 1, "--out", tmp_path
    )
    assert status == 0, error
    assert "acc mean over 57 tasks" in out
    assert "not comparable with them" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "arc_eazy"], "'arc_eazy' (did you mean"),
        (["--task", "contextqa"], "(did you mean 'context-qa'?)"),
        (["--task", "local_piqa", "--data-dir", "{files}"], "needs the column 'gold', which is not there"),
        (["--task", "local_winogrande", "--data-dir", "{files}"], "winogrande.jsonl: there is no such file"),
        (["--task", "local_arc_easy"], "give --data-dir"),
        (["--task", "local_arc_easy", "--data-dir", "{files}", "--shots", "40"], "has 32 examples to draw shots from"),
        (["--task", "context-qa"], "give --data FILE"),
        (["--task", "context-qa", "--data", "{files}/qa.json", "--shots", "2"], "leave --shots away"),
        (["--task", "context-qa", "--data", "{files}/words.jsonl"], "context"),
        (["--task", "nsmc-prompt1", "--data", "{files}/qa.json", "--apply-chat-template"], "for lm-eval's tasks"),
        (["--task", "local_arc_easy", "--data-dir", "{files}", "--apply-chat-template"], "has no chat template"),
        (["--task", "local_arc_easy", "--data-dir", "{files}", "--limit", "0"], "a limit of 0 items leaves nothing"),
        (["--task", "own_words", "--include-path", "{files}/none"], "there is no such folder"),
        (["--task", "context-qa", "--data", "{files}/qa.json", "--seed", "9"], "--seed says nothing to context-qa"),
        (["--task", "context-qa", "--data", "{files}/qa.json", "--data-dir", "{files}"], "--data-dir says nothing"),
        (["--task", "context-qa", "--data", "{files}/qa.json", "--shots-from", "x"], "--shots-from says nothing"),
        (["--task", "local_arc_easy", "--data-dir", "{files}", "--data", "mine.tsv"], "have their own items"),
    ],
)
def test_bad_input_is_one_message(
    place: Path, files: Path, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, error = call_koat("eval", place / "base", *[each.format(files=files) for each in arguments])
    assert status == 2
    assert message in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == [], "what was refused leaves nothing"
