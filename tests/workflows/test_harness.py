"""`koat lm-eval`: lm-evaluation-harness' own command line with koat among its models, and what it refuses."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from koat.core.errors import ConfigError
from koat.evaluation.harness import tasks as harness_tasks
from koat.workflows.evaluating import harness
from tests.tiny_base import call_koat

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra `eval`)")

QUESTIONS = [
    {"query": f"Question: 오늘 {first} 내일 ", "choices": ["비가 옵니다", "해가", "영화 노래"], "gold": number % 3}
    for number, first in enumerate(["비가", "눈이", "해가", "영화", "노래", "조금", "많이"] * 6)
]


@pytest.fixture(autouse=True)
def own_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the harness index koat's tasks alone: its own ten thousand take ten seconds."""
    import lm_eval.tasks

    monkeypatch.setattr(
        lm_eval.tasks, "TaskManager", functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with one benchmark, and one whose file lacks a column."""
    folder = tmp_path_factory.mktemp("benchmarks")
    (folder / "llm_foundry").mkdir()
    lines = [json.dumps(row, ensure_ascii=False) for row in QUESTIONS]
    (folder / "llm_foundry" / "arc_easy.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "llm_foundry" / "piqa.jsonl").write_text('{"query": "x", "choices": ["y"]}\n' * 40, encoding="utf-8")
    return folder


def run(files: Path, *arguments: object, tasks: str = "local_arc_easy") -> tuple[int, str, str]:
    """Run `koat lm-eval run` on tasks over the files."""
    return call_koat("lm-eval", "run", "--tasks", tasks, "--data-dir", files, *arguments)


def read_results(folder: Path) -> dict[str, Any]:
    """Return what the harness wrote."""
    (path,) = folder.rglob("results_*.json")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def test_a_run_scores_as_with_the_harness_own_model(place: Path, finished: Path, files: Path, tmp_path: Path) -> None:
    adapter = finished / "adapter"
    shots = ("--num_fewshot", 3)
    ways = {
        "run": ("koat", f"pretrained={finished},tokens=500"),
        "adapter": ("koat", f"pretrained={place / 'base'},peft={adapter},device=cpu"),
        "peer": ("hf", f"pretrained={place / 'base'},peft={adapter},dtype=float32"),
        "base": ("koat", f"pretrained={place / 'base'}"),
        "base peer": ("hf", f"pretrained={place / 'base'},dtype=float32"),
    }
    results = {}
    for name, (model, arguments) in ways.items():
        out = tmp_path / name.replace(" ", "-")
        status, text, error = run(
            files, "--model", model, "--model_args", arguments, *shots, "--output_path", out, "--device", "cpu"
        )
        assert status == 0, error
        assert "local_arc_easy" in text
        results[name] = read_results(out)
    scores = {name: found["results"]["local_arc_easy"] for name, found in results.items()}
    assert scores["run"] == scores["adapter"] == scores["peer"]
    assert scores["base"] == scores["base peer"]
    requests = results["run"]["config"]["koat"]["requests"]
    assert requests["num_requests"] == 3 * (len(QUESTIONS) - 32)
    assert requests["num_unique_tokens"] < requests["num_tokens"] / 3
    assert requests["num_cut"] == 0
    assert results["run"]["config"]["koat"]["conditions"]["parts"]["truncation"] == "none"


def test_a_cut_request_is_told_and_stands_in_the_results(
    place: Path, files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = f"pretrained={place / 'base'},max_length=40"
    status, _, error = run(
        files, "--model", "koat", "--model_args", arguments, "--num_fewshot", 3, "--output_path", tmp_path
    )
    assert status == 0, error
    info = read_results(tmp_path)["config"]["koat"]
    assert info["requests"]["num_cut"] == info["requests"]["num_requests"] == 3 * (len(QUESTIONS) - 32)
    assert "were cut from the left" in caplog.text
    assert info["conditions"]["parts"]["truncation"].startswith("left, 30 of 30")


@pytest.mark.parametrize(
    ("tasks", "arguments", "message"),
    [
        ("local_arc_easi", "pretrained=nano", "knows no task 'local_arc_easi' (did you mean 'local_arc_easy'?)"),
        ("local_piqa", "pretrained={base}", "piqa.jsonl:1: the task needs the column 'gold', which is not there"),
        ("local_winogrande", "pretrained={base}", "winogrande.jsonl: there is no such file"),
        ("local_arc_easy", "pretraned={base}", "give pretrained=RUN"),
        ("local_arc_easy", "pretrained={base},token=9", "has 'token', which koat does not know (did you mean 'tokens'"),
        ("local_arc_easy", "pretrained={base},dtype=float64", "dtype"),
        ("local_arc_easy", "pretrained=./nowhere", "./nowhere does not exist"),
    ],
)
def test_bad_input_is_one_message(place: Path, files: Path, tasks: str, arguments: str, message: str) -> None:
    given = arguments.format(base=place / "base")
    status, _, error = run(files, "--model", "koat", "--model_args", given, tasks=tasks)
    assert status == 2
    assert message in error
    assert "Traceback" not in error


def test_without_a_folder_the_task_asks_for_one(place: Path) -> None:
    status, _, error = call_koat(
        "lm-eval", "run", "--tasks", "local_arc_easy", "--model", "koat", "--model_args", f"pretrained={place / 'base'}"
    )
    assert status == 2
    assert "--data-dir" in error


def test_the_harness_own_options_are_its_own() -> None:
    status, out, _ = call_koat("lm-eval", "run", "--help")
    assert status == 0
    assert "--apply_chat_template" in out
    status, out, _ = call_koat("lm-eval", "ls", "tasks")
    assert status == 0
    assert "local_truthfulqa_mc2" in out
    assert "local_mmlu_by_subject" in out


def test_a_missing_harness_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness_tasks, "import_module", _refuse)
    with pytest.raises(ConfigError, match=r"koat\[eval\]"):
        harness.import_harness()


def _refuse(name: str) -> Any:
    raise ImportError(f"No module named {name!r}")
