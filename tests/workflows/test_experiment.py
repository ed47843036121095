"""Experiments: what a file may say, what is planned, and that killed anywhere they end in the same bytes."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

import koat
from koat.core.config_files import dump_yaml, read_config_file
from koat.core.errors import ConfigError, RunFolderError, TrainingError
from koat.core.json_lines import read_lines
from koat.core.settings import DataSettings, ModelSettings
from koat.model import fingerprint_base, load_config
from koat.report.experiment import print_cells
from koat.workflows.experiment import jobs as experiment_jobs
from koat.workflows.experiment import run as experiment_run
from koat.workflows.experiment.cells import ExperimentPlan, describe_evaluation
from koat.workflows.experiment.checks import check_files
from koat.workflows.experiment.file import Evaluation, list_experiments, load_experiment, read_experiment, split_items
from koat.workflows.experiment.plan import describe_cells, plan_experiment
from koat.workflows.experiment.run import Outcome, Watch, hold_cell, run_experiment
from koat.workflows.shell import run_finetune
from tests.tiny_base import call_koat, run_koat, start_koat

SAMPLES = Path(koat.__file__).parent / "nano" / "samples"
WEIGHTS = "adapter/adapter_model.safetensors"
SMALL: dict[str, Any] = {
    "name": "small",
    "title": {"en": "Two rates", "ko": "두 학습률"},
    "inputs": {"base": "A tiny base model", "train": "Rows to train on", "test": "Reviews to test on"},
    "settings": {
        "model": {"base": "${base}"},
        "data": {"train": ["${train}"]},
        "training": {"max_steps": 3, "batch_size": 4, "save_every": 1},
    },
    "seeds": [0, 1],
    "variants": [
        {"name": "base", "train": False},
        {"name": "slow", "settings": {"training": {"learning_rate": 1e-3}}},
        {"name": "quick", "settings": {"training": {"learning_rate": 5e-2}}},
    ],
    "evaluate": [{"tasks": ["nsmc-prompt1", "nsmc-prompt2"], "data": "${test}", "shots": 0, "limit": 6}],
}
CELLS = ["base", "slow-seed0", "slow-seed1", "quick-seed0", "quick-seed1"]


@pytest.fixture(scope="module")
def inputs(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the small experiment asks for."""
    rows = [f"{n}\t{'비가 옵니다' if n % 3 else '눈이 많이'} {n}\t{n % 2}" for n in range(10)]
    test = tmp_path_factory.mktemp("reviews") / "test.tsv"
    test.write_text("\n".join(["id\tdocument\tlabel", *rows]) + "\n", encoding="utf-8")
    return {"base": str(place / "base"), "train": str(place / "rows.jsonl"), "test": str(test)}


def write_file(folder: Path, **changes: Any) -> Path:
    """Write the small experiment with changes and return its file."""
    path = folder / "small.yaml"
    path.write_text(dump_yaml({**SMALL, **changes}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The small experiment, done without a stop."""
    folder = tmp_path_factory.mktemp("whole")
    return koat.experiment(write_file(folder), out=folder / "out", inputs=inputs)


def read_weights(out: Path) -> dict[str, bytes]:
    """Return the bytes of every cell's adapter."""
    return {name: (out / "runs" / name / WEIGHTS).read_bytes() for name in CELLS if name != "base"}


def read_scores(out: Path) -> dict[tuple[str, str], Any]:
    """Return every cell's scores by cell and task."""
    return {
        (name, result["task"]): (result["scores"], result["contracts"])
        for name in CELLS
        for path in (out / "runs" / name / "predictions").glob("*.scores.json")
        for result in json.loads(path.read_text(encoding="utf-8"))["results"]
    }


def plan_small(out: Path, inputs: dict[str, str], **changes: Any) -> ExperimentPlan:
    """Plan the small experiment with changes."""
    out.parent.mkdir(parents=True, exist_ok=True)
    return plan_experiment(load_experiment(str(write_file(out.parent, **changes)), inputs), out)


# What is done --------------------------------------------------------------------------------------------------


def test_every_variant_is_trained_with_every_seed_and_asked_the_same(whole: Outcome) -> None:
    assert sorted(path.name for path in (whole.folder / "runs").iterdir() if path.is_dir()) == sorted(CELLS)
    weights = read_weights(whole.folder)
    assert len(set(weights.values())) == 4
    assert len(read_scores(whole.folder)) == 10
    names = [subject["name"] for subject in whole.comparison["subjects"]]
    assert names == ["base", "slow (2 seeds)", "quick (2 seeds)"]
    assert len(whole.comparison["comparisons"]) == 3 * 2  # pairs, prompts
    # The tiny tokenizer's first tokens tell no answers apart: that way of scoring is refused for each pair and prompt.
    assert {refusal["scoring"] for refusal in whole.comparison["refusals"]} == {"first-token"}
    assert len(whole.comparison["refusals"]) == 3 * 2
    lines = (whole.folder / "comparison.csv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + 12
    assert "quick (2 seeds)" in (whole.folder / "comparison.md").read_text(encoding="utf-8")


def test_the_report_names_variants_and_how_to_do_it_again(whole: Outcome) -> None:
    assert whole.report is not None
    page = whole.report.read_text(encoding="utf-8")
    for words in ("Two rates", "slow", "quick", "koat experiment", str(whole.folder / "experiment.yaml")):
        assert words in page


def test_commands_to_copy_are_quoted(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("koat.workflows.comparing.report.write_report", lambda *_, **options: given.update(options))
    plan = plan_small(tmp_path / "two words", inputs)
    experiment_run.write_experiment_report(plan, {}, "en", "")
    command = ["koat", "experiment", str(plan.out / "experiment.yaml"), "--out", str(plan.out)]
    assert shlex.split(given["reproduce"][0]) == command
    keys = ("tokens", "unique_tokens", "training_seconds", "peak_bytes", "kept_step")
    run = SimpleNamespace(adapter="adapter", read_manifest=lambda: {"result": dict.fromkeys(keys, 1)})
    monkeypatch.setattr("koat.workflows.training.finetune.finetune_run", lambda *_, **__: run)
    run_finetune(plan.cells[1].resolved, plan.out, resume=False, overwrite=False)
    said = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if ": koat " in line)
    assert shlex.split(said["ask it"]) == ["koat", "ask", str(plan.out)]
    assert shlex.split(said["measure it, for example"])[:4] == ["koat", "eval", str(plan.out), "--task"]
    with pytest.raises(ConfigError, match=r"koat experiment '.*two words/small\.yaml' base=PATH"):
        plan_small(plan.out / "out", {})


def test_tables_come_in_the_language_of_the_report(whole: Outcome, inputs: dict[str, str], tmp_path: Path) -> None:
    out = shutil.copytree(whole.folder, tmp_path / "out")
    items = [f"{name}={path}" for name, path in inputs.items()]
    status, said, error = call_koat(
        "experiment", whole.folder.parent / "small.yaml", *items, "--out", out, "--language", "ko"
    )
    assert status == 0, error
    for text in (said, (out / "comparison.md").read_text(encoding="utf-8")):
        assert "대상" in text and "비고" in text and "subject" not in text


def test_what_is_done_is_not_done_again(whole: Outcome, inputs: dict[str, str], tmp_path: Path) -> None:
    times = {path: path.stat().st_mtime_ns for path in (whole.folder / "runs").rglob("*") if path.is_file()}

    def forbid(*_: Any) -> None:
        raise AssertionError("nothing is left to do")

    again = koat.experiment(
        write_file(tmp_path), out=whole.folder, inputs=inputs, watch=Watch(on_step=forbid, on_item=forbid)
    )
    assert again.comparison == whole.comparison
    left = {path: path.stat().st_mtime_ns for path in (whole.folder / "runs").rglob("*") if path.is_file()}
    assert {path for path in left if times.get(path) != left[path]} <= set((whole.folder / "runs").glob(".*.lock"))
    # The filled-in file beside the cells stands for the file and its inputs.
    status, out, error = call_koat("experiment", whole.folder / "experiment.yaml", "--out", whole.folder, "--dry-run")
    assert status == 0, error
    assert "5 cells, 5 done" in out


def test_interrupted_and_continued_it_ends_in_the_same_bytes(
    whole: Outcome, inputs: dict[str, str], tmp_path: Path
) -> None:
    file, seen = write_file(tmp_path), []

    def stop(cell: str, record: Any) -> None:
        seen.append((cell, record.step))
        if (cell, record.step) == ("slow-seed1", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        koat.experiment(file, out=tmp_path / "out", inputs=inputs, watch=Watch(on_step=stop))
    rows = {row["cell"]: row["training"] for row in describe_cells(plan_small(tmp_path / "out", inputs))}
    assert rows == {
        "base": "", "slow-seed0": "done", "slow-seed1": "begun", "quick-seed0": "missing", "quick-seed1": "missing"
    }  # fmt: skip

    def stop_asking(cell: str, task: str, done: int, total: int) -> None:
        if (cell, task) == ("quick-seed0", "nsmc-prompt2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        koat.experiment(file, out=tmp_path / "out", inputs=inputs, watch=Watch(on_item=stop_asking))
    found = koat.experiment(file, out=tmp_path / "out", inputs=inputs, watch=Watch(on_step=stop))
    assert seen[-3:] == [("quick-seed1", 1), ("quick-seed1", 2), ("quick-seed1", 3)]
    assert read_weights(found.folder) == read_weights(whole.folder)
    assert read_scores(found.folder) == read_scores(whole.folder)
    steps = [line["step"] for line in read_lines(found.folder / "runs" / "slow-seed1" / "metrics.jsonl")]
    assert steps == [1, 2, 3]


def test_a_failing_cell_does_not_stop_the_others(inputs: dict[str, str], tmp_path: Path) -> None:
    out, said = tmp_path / "out", []

    def fail(cell: str, record: Any) -> None:
        if cell == "slow-seed0":
            raise ZeroDivisionError("a bug")
        if cell == "slow-seed1":
            raise koat.TrainingError("the loss is no number")

    with pytest.raises(TrainingError, match="2 of 5 cells failed") as failure:
        koat.experiment(write_file(tmp_path), out=out, inputs=inputs, watch=Watch(said.append, on_step=fail))
    assert "slow-seed1: the loss is no number" in str(failure.value)
    assert "ZeroDivisionError: a bug" in str(failure.value)
    assert "Traceback" in str(failure.value)
    assert (out / "runs" / "quick-seed1" / WEIGHTS).exists()
    assert "quick (2 seeds)" in (out / "comparison.md").read_text(encoding="utf-8")
    assert "! slow-seed0 failed: a bug" in said


STAND_IN = """
import os, sys
name = sys.argv[sys.argv.index("--cell") + 1]
print("on", os.environ["CUDA_VISIBLE_DEVICES"], "with", os.environ["OMP_NUM_THREADS"], *sys.argv[1:4])
if name == "slow-seed1":
    print("koat: the disk is full")
    sys.exit(2)
"""


def test_processes_take_turns_and_say_how_they_ended(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment_jobs, "RUN", STAND_IN)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    plan, said = plan_small(tmp_path / "out", inputs), []
    failures = experiment_jobs.run_in_processes(plan, plan.cells, 2, say=said.append)
    logs = {cell.name: experiment_jobs.find_log(plan, cell).read_text(encoding="utf-8") for cell in plan.cells}
    assert logs["base"].startswith("on 4 with") and logs["slow-seed0"].startswith("on 7 with")
    command = f"experiment {tmp_path / 'out' / 'experiment.yaml'} --out"
    assert all(command in text for text in logs.values())
    assert f" with {max(1, (os.cpu_count() or 1) // 2)} " in logs["base"]
    assert list(failures) == ["slow-seed1"]
    assert failures["slow-seed1"].startswith("the disk is full (status 2; all of it in ")
    assert sum("begun" in text for text in said) == 5
    assert sum("done" in text for text in said) == 4


def test_a_gpu_that_no_process_will_see_is_refused_at_once(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment_jobs, "start_cell", lambda *_: pytest.fail("a process was started"))
    model = {"model": {"base": "${base}", "device": "cuda:1"}, "data": {"train": ["${train}"]}}
    plan = plan_small(tmp_path / "out", inputs, settings=model)
    with pytest.raises(ConfigError, match=r"base: model\.device=cuda:1.*CUDA_VISIBLE_DEVICES"):
        experiment_jobs.run_in_processes(plan, plan.cells, 2)


# What has changed ----------------------------------------------------------------------------------------------


def test_changed_settings_are_refused_by_name(whole: Outcome, inputs: dict[str, str], tmp_path: Path) -> None:
    before = read_weights(whole.folder)
    with pytest.raises(ConfigError, match=r"quick-seed0: training\.learning_rate\n.*quick-seed1") as failure:
        koat.experiment(
            write_file(tmp_path),
            out=whole.folder,
            inputs=inputs,
            settings={"quick": {"training": {"learning_rate": 1}}},
        )
    assert "slow-seed0" not in str(failure.value)
    assert "--overwrite quick-seed0 --overwrite quick-seed1" in str(failure.value)
    with pytest.raises(ConfigError, match=r"base: model\.dtype"):
        koat.experiment(
            write_file(tmp_path), out=whole.folder, inputs=inputs, settings={"base": {"model": {"dtype": "bfloat16"}}}
        )
    assert read_weights(whole.folder) == before


def test_data_beneath_a_folder_of_benchmarks_is_watched(tmp_path: Path) -> None:
    items = tmp_path / "hellaswag" / "test.jsonl"
    items.parent.mkdir()
    items.write_text('{"n": 1}\n', encoding="utf-8")
    (tmp_path / "README.md").write_text("words", encoding="utf-8")
    asked = Evaluation(tasks=["hellaswag"], data_dir=str(tmp_path))
    out = tmp_path / "out"
    before = describe_evaluation(asked, out)
    assert list(before["files"]) == [str(items)]
    (tmp_path / "README.md").write_text("other words", encoding="utf-8")
    (out / "runs").mkdir(parents=True)
    (out / "runs" / "scores.json").write_text("{}", encoding="utf-8")
    assert describe_evaluation(asked, out) == before
    items.write_text('{"n": 22}\n', encoding="utf-8")
    assert describe_evaluation(asked, out) != before


def test_a_task_s_own_file_and_the_split_are_watched(inputs: dict[str, str], tmp_path: Path) -> None:
    task = tmp_path / "mine.yaml"
    task.write_text("prompt: one\n", encoding="utf-8")
    asked = Evaluation(tasks=[str(task)], data=inputs["test"])
    before = describe_evaluation(asked, tmp_path / "out")
    assert set(before["files"]) == {inputs["test"], str(task)}
    task.write_text("prompt: another\n", encoding="utf-8")
    assert describe_evaluation(asked, tmp_path / "out") != before
    split = DataSettings(train=["a.json"], validation=["b.json"], splits=Path("split.tsv"))
    assert split.list_files() == ["a.json", "b.json", "split.tsv"]


def test_parts_of_saved_data_are_no_missing_files(inputs: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    plan = plan_small(tmp_path / "out", {**inputs, "train": f"{tmp_path / 'saved'}:train"})
    assert list(check_files(plan)) == []
    with pytest.raises(ConfigError, match="gone:train: there is no such file"):
        plan_small(tmp_path / "out2", {**inputs, "train": f"{tmp_path / 'gone'}:train"})


def test_a_report_that_cannot_be_written_hides_no_failure(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Path:
        raise koat.DataError("nothing to draw")

    monkeypatch.setattr(experiment_run, "write_experiment_report", refuse)
    said: list[str] = []

    def fail(cell: str, record: Any) -> None:
        if cell == "slow-seed0":
            raise koat.TrainingError("the loss is no number")

    with pytest.raises(TrainingError, match="slow-seed0: the loss is no number"):
        koat.experiment(
            write_file(tmp_path), out=tmp_path / "out", inputs=inputs, watch=Watch(said.append, on_step=fail)
        )
    assert (tmp_path / "out" / "comparison.csv").is_file()
    assert "! no report: nothing to draw" in said


def test_changed_data_is_refused_and_overwriting_trains_again(inputs: dict[str, str], tmp_path: Path) -> None:
    train = tmp_path / "rows.jsonl"
    lines = Path(inputs["train"]).read_text(encoding="utf-8").splitlines(keepends=True)
    train.write_text("".join(lines[:20]), encoding="utf-8")
    file = write_file(tmp_path, variants=SMALL["variants"][:2], seeds=[0])
    arguments: dict[str, Any] = {"out": tmp_path / "out", "inputs": {**inputs, "train": str(train)}}
    koat.experiment(file, **arguments)
    before = (tmp_path / "out" / "runs" / "slow-seed0" / WEIGHTS).read_bytes()
    train.write_text("".join(lines), encoding="utf-8")
    with pytest.raises(ConfigError, match="slow-seed0: what the data files hold"):
        koat.experiment(file, **arguments)
    found = koat.experiment(file, **arguments, overwrite=["slow-seed0"])
    assert (tmp_path / "out" / "runs" / "slow-seed0" / WEIGHTS).read_bytes() != before
    assert len(found.comparison["comparisons"]) == 2
    with pytest.raises(ConfigError, match="there is no such cell"):
        koat.experiment(file, **arguments, overwrite=["slow-seed7"])


def change_weights(base: Path) -> None:
    """Turn the sign of every weight of a base."""
    path = base / "model.safetensors"
    save_file({name: -tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


def test_a_changed_base_is_refused_where_it_was_trained_on_and_asked_again(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    base = Path(shutil.copytree(inputs["base"], tmp_path / "base"))
    asked: set[tuple[str, str]] = set()
    file = write_file(tmp_path, variants=SMALL["variants"][:2], seeds=[0])
    arguments: dict[str, Any] = {"out": tmp_path / "out", "inputs": {**inputs, "base": str(base)}}
    koat.experiment(file, **arguments)
    [answers] = (tmp_path / "out" / "runs" / "base" / "predictions").glob("nsmc-prompt1-*.jsonl")
    before = answers.read_text(encoding="utf-8")
    change_weights(base)
    with pytest.raises(ConfigError, match="slow-seed0: what the base holds") as failure:
        koat.experiment(file, **arguments)
    assert "base: " not in str(failure.value)  # nothing was trained there: it is only asked again
    watch = Watch(on_item=lambda cell, task, done, total: asked.add((cell, task)))
    koat.experiment(file, **arguments, overwrite=["slow-seed0"], watch=watch)
    assert asked == {(cell, task) for cell in ("base", "slow-seed0") for task in ("nsmc-prompt1", "nsmc-prompt2")}
    assert answers.read_text(encoding="utf-8") != before
    asked.clear()
    koat.experiment(file, **arguments, watch=watch)
    assert asked == set()


def test_another_adapter_to_start_from_is_noticed(whole: Outcome, inputs: dict[str, str], tmp_path: Path) -> None:
    start = Path(shutil.copytree(whole.folder / "runs" / "slow-seed0" / "adapter", tmp_path / "start"))
    further = {"name": "on", "settings": {"adapter": {"start": str(start)}}}
    file = write_file(tmp_path, variants=[SMALL["variants"][0], further], seeds=[0])
    koat.experiment(file, out=tmp_path / "out", inputs=inputs)
    other = whole.folder / "runs" / "quick-seed0" / "adapter"
    shutil.copyfile(other / "adapter_model.safetensors", start / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match="on-seed0: the adapter it starts from"):
        koat.experiment(file, out=tmp_path / "out", inputs=inputs)
    shutil.rmtree(start)  # nothing to hold it against
    koat.experiment(file, out=tmp_path / "out", inputs=inputs)


def test_each_base_is_read_once_and_what_was_recorded_without_is_accepted(
    whole: Outcome, inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(whole.folder, tmp_path / "out"))
    read: list[str] = []

    def fingerprint(model: ModelSettings, config: Any) -> str:
        read.append(model.base)
        return fingerprint_base(model, config)

    monkeypatch.setattr("koat.workflows.experiment.plan.fingerprint_base", fingerprint)
    model = ModelSettings(base=inputs["base"])
    for path in out.rglob("evaluated.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        assert {each.pop("base") for each in record["evaluations"]} == {fingerprint_base(model, load_config(model))}
        path.write_text(json.dumps(record), encoding="utf-8")
    plan = plan_small(out, inputs)
    assert [cell.name for cell in plan.cells if plan.is_done(cell)] == CELLS
    assert len(read) == 1


def test_more_may_be_asked_and_more_seeds_trained(inputs: dict[str, str], tmp_path: Path) -> None:
    file = write_file(tmp_path, variants=SMALL["variants"][:2], seeds=[0])
    koat.experiment(file, out=tmp_path / "out", inputs=inputs)
    weights = (tmp_path / "out" / "runs" / "slow-seed0" / WEIGHTS).stat().st_mtime_ns
    more = {"seeds": [0, 1], "evaluate": {"limit": "all"}}
    found = koat.experiment(file, out=tmp_path / "out", inputs=inputs, settings=more)
    assert (tmp_path / "out" / "runs" / "slow-seed0" / WEIGHTS).stat().st_mtime_ns == weights
    assert {row["num_items"] for column in found.comparison["columns"] for row in column["rows"]} == {10}
    assert found.comparison["notes"] == []
    assert found.comparison["subjects"][1]["seeds"] == [0, 1]


def test_folders_of_something_else_are_left_alone(whole: Outcome, inputs: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x", encoding="utf-8")
    with pytest.raises(RunFolderError, match="holds no experiment"):
        koat.experiment(write_file(tmp_path), out=tmp_path / "mine", inputs=inputs)
    with pytest.raises(RunFolderError, match="holds the experiment 'small'"):
        koat.experiment(write_file(tmp_path, name="other"), out=whole.folder, inputs=inputs)


def test_a_file_of_the_user_s_own_in_the_folder_is_never_replaced(inputs: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "out" / "experiment.yaml"
    file.parent.mkdir()
    own = f"# why these two\n{dump_yaml(SMALL)}"
    file.write_text(own, encoding="utf-8")
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"a file of your own.*Move it out of"):
            koat.experiment(file, out=file.parent, inputs=inputs)
        assert file.read_text(encoding="utf-8") == own
    assert [*file.parent.iterdir()] == [file]


def test_a_file_of_one_s_own_stands_for_itself_and_one_that_koat_wrote_is_renewed(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "out" / "experiment.yaml"

    def go_on(**overrides: Any) -> None:
        plan = plan_experiment(load_experiment(str(file), None, overrides), file.parent)
        run_experiment(plan, run_cells=lambda plan, cells: {})

    run_experiment(plan_small(file.parent, inputs), run_cells=lambda plan, cells: {})
    go_on(seeds=[7])
    assert read_config_file(file)["seeds"] == [7]
    own = f"# why seven\n{file.read_text(encoding='utf-8')}"
    file.write_text(own, encoding="utf-8")
    go_on()
    with pytest.raises(ConfigError, match="a file of your own"):
        go_on(seeds=[8])
    assert file.read_text(encoding="utf-8") == own


def test_two_processes_cannot_work_on_one_cell(inputs: dict[str, str], tmp_path: Path) -> None:
    plan = plan_small(tmp_path / "out", inputs)
    with hold_cell(plan.cells[0]), pytest.raises(RunFolderError, match="another process"), hold_cell(plan.cells[0]):
        pass


# What a file may say -------------------------------------------------------------------------------------------


def test_missing_inputs_are_asked_for_together(tmp_path: Path) -> None:
    status, _, error = call_koat("experiment", write_file(tmp_path), "base=nano", "--out", tmp_path / "out")
    assert status == 2
    assert error.startswith("koat: Two rates\n")
    assert "train  Rows to train on" in error
    assert "test   Reviews to test on" in error
    assert "base=PATH train=PATH test=PATH --out experiments/small" in error
    assert not (tmp_path / "out").exists()
    status, _, error = call_koat("experiment", "koat-vs-lora")
    assert status == 2 and "The rates are for the small base that ships" in error and "--out experiments/" in error
    status, _, error = call_koat("experiment", "koat-vs-lora", "train=a.tsv", "test=b.tsv")
    assert status == 2 and "--out experiments/koat-vs-lora" in error


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"varients": []}, "did you mean 'variants'"),
        ({"variants": [{"nam": "a"}]}, r"variants\[0\]\.name: missing"),
        ({"variants": [{"name": "a"}, {"name": "a"}]}, "two variants are called 'a'"),
        ({"variants": [{"name": "data"}]}, "'data' is the name of a group of settings"),
        ({"variants": [{"name": "a/b"}]}, "of the form"),
        ({"evaluate": [{"tasks": ["x"], "shot": 3}]}, r"did you mean 'evaluate\[0\]\.shots'"),
        ({"evaluate": [{"tasks": ["x", "x"]}]}, "asked twice"),
        ({"inputs": {"train": "rows"}}, r"\$\{base\} is used"),
        ({"seeds": [-1]}, "at least 0"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        load_experiment(str(write_file(tmp_path, **changes)))


def test_all_wrong_settings_are_told_at_once(inputs: dict[str, str], tmp_path: Path) -> None:
    variants = [
        {"name": "a", "settings": {"training": {"learning_rat": 1}}},
        {"name": "b", "settings": {"adapter": {"method": "loar"}}},
        {"name": "c", "settings": {"training": {"seed": 1}}},
    ]
    with pytest.raises(ConfigError) as failure:
        plan_small(tmp_path / "out", {**inputs, "test": "nowhere.tsv"}, variants=variants)
    for words in ("training.learning_rate", "'lora'", "c: training.seed", "seeds=[0,1,2]", "nowhere.tsv"):
        assert words in str(failure.value)


@pytest.mark.parametrize(
    ("items", "words"),
    [
        (["tran=x"], "tran: there is no such input (did you mean 'train'?)"),
        (["slwo.training.epochs=2"], "slwo: there is no such section or variant (did you mean 'slow'?)"),
        (["training.learning_rate=1"], "Give slow.training.learning_rate=..."),
        (["evaluate.limt=3"], "did you mean 'evaluate[0].limit'?"),
    ],
)
def test_wrong_items_are_refused(items: list[str], words: str, inputs: dict[str, str], tmp_path: Path) -> None:
    given, overrides = split_items(items)
    with pytest.raises(ConfigError) as failure:
        load_experiment(str(write_file(tmp_path)), {**inputs, **given}, overrides)
    assert words in str(failure.value)


def test_items_reach_their_places(inputs: dict[str, str], tmp_path: Path) -> None:
    given = [f"{name}={value}" for name, value in inputs.items()]
    items = [*given, "training.max_steps=2", "slow.adapter.method=lora", "seeds=[5]", "evaluate.limit=3"]
    filled = load_experiment(str(write_file(tmp_path)), *split_items(items))
    assert filled.seeds == [5]
    assert {each.limit for each in filled.evaluate} == {3}
    cells = {cell.name: cell for cell in plan_experiment(filled, tmp_path / "out").cells}
    assert list(cells) == ["base", "slow-seed5", "quick-seed5"]
    slow, quick = (cells[name].resolved.settings for name in ("slow-seed5", "quick-seed5"))
    assert (slow.adapter.method, quick.adapter.method) == ("lora", "ia3")
    assert slow.training.max_steps == quick.training.max_steps == 2
    assert slow.training.learning_rate == 1e-3


def test_a_variant_s_own_seeds_go_before_the_experiment_s(inputs: dict[str, str], tmp_path: Path) -> None:
    variants = [SMALL["variants"][0], {**SMALL["variants"][1], "seeds": [7]}, SMALL["variants"][2]]
    plan = plan_small(tmp_path / "out", inputs, variants=variants)
    assert [(cell.name, cell.seed) for cell in plan.cells] == [
        ("base", None), ("slow-seed7", 7), ("quick-seed0", 0), ("quick-seed1", 1)
    ]  # fmt: skip
    assert [cell.resolved.settings.training.seed for cell in plan.cells[1:]] == [7, 0, 1]
    file = str(write_file(tmp_path, variants=variants))
    with pytest.raises(ConfigError, match="seeds: slow has seeds of its own; change them in the file"):
        load_experiment(file, inputs, {"seeds": [5]})


def test_an_experiment_s_file_goes_before_its_recipe(inputs: dict[str, str], tmp_path: Path) -> None:
    plan = plan_small(tmp_path / "out", inputs, recipe="kgoat")
    slow = next(cell.resolved.settings for cell in plan.cells if cell.name == "slow-seed0")
    # The recipe has polyglot-ko-5.8b, KoAlpaca and steps of 32; the variant has a rate of its own.
    assert (slow.model.base, slow.data.train) == (inputs["base"], [inputs["train"]])
    assert (slow.training.batch_size, slow.training.learning_rate) == (4, 1e-3)
    # What only the recipe says stands.
    assert (slow.training.activation_checkpointing, slow.data.max_length) == (True, 1024)


def test_several_bases_make_a_cell_each(inputs: dict[str, str], tmp_path: Path) -> None:
    settings = {key: value for key, value in SMALL["settings"].items() if key != "model"}
    bases = {"tiny": {"base": inputs["base"]}, "nano": {"base": "nano"}}
    plan = plan_small(tmp_path / "out", inputs, settings=settings, bases=bases, seeds=[0])
    assert [cell.name for cell in plan.cells][:3] == ["tiny-base", "tiny-slow-seed0", "tiny-quick-seed0"]
    assert [cell.subject for cell in plan.cells][3:] == ["base on nano", "slow on nano", "quick on nano"]
    counts = {row["subject"]: row["trainable_parameters"] for row in describe_cells(plan)}
    assert counts["slow on nano"] == koat.plan({"model": {"base": "nano"}}).trainable_parameters
    assert counts["slow on tiny"] != counts["slow on nano"]
    assert counts["base on tiny"] == 0


@pytest.mark.parametrize("name", list_experiments())
def test_what_ships_can_be_planned(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"train": str(SAMPLES / "reviews_train.tsv"), "test": str(SAMPLES / "reviews_test.tsv")}
    wanted = read_experiment(name)["inputs"]
    experiment = load_experiment(name, {key: given[key] for key in wanted})
    assert experiment.name == name
    for words in (experiment.title, experiment.description):
        assert words.en and words.ko
    plan = plan_experiment(experiment, tmp_path / "out")
    rows = describe_cells(plan)
    trained = [row for row in rows if row["method"]]
    assert len(trained) >= 6 and all(row["trainable_parameters"] > 0 for row in trained)
    print_cells(rows)
    assert all(row["cell"] in capsys.readouterr().out for row in rows[:1])
    assert not (tmp_path / "out").exists()
    assert name in call_koat("list")[1]


def test_shipped_experiments_hold_no_path() -> None:
    for name in list_experiments():
        values = read_experiment(name)
        assert all("${" in path for path in values["settings"]["data"]["train"])
        assert all("${" in each[key] for each in values["evaluate"] for key in ("data", "shots_from") if key in each)


def test_an_experiment_that_does_not_ship_is_answered_with_the_nearest() -> None:
    status, _, error = call_koat("experiment", "koat-vs-lra", "--out", "x")
    assert status == 2
    assert "did you mean 'koat-vs-lora'" in error
    assert read_config_file(Path(koat.__file__).parent / "experiments" / "koat-vs-lora.yaml")["name"] == "koat-vs-lora"


def test_processes_end_with_the_one_that_started_them(inputs: dict[str, str], tmp_path: Path) -> None:
    items = [f"{name}={value}" for name, value in inputs.items()]
    command = ["experiment", str(write_file(tmp_path)), *items, "--out", "out", "--jobs", "2"]
    parent = start_koat(*command, cwd=tmp_path)
    cells: list[psutil.Process] = []
    until = time.monotonic() + 60
    while len(cells) < 2 and parent.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
        cells = psutil.Process(parent.pid).children(recursive=True) if parent.poll() is None else []
    assert len(cells) >= 2
    parent.terminate()
    parent.communicate(timeout=60)
    assert parent.returncode == 128 + signal.SIGTERM
    assert psutil.wait_procs(cells, timeout=30)[1] == []


# Long ---------------------------------------------------------------------------------------------------------


@pytest.mark.soak
def test_several_processes_do_the_same(whole: Outcome, inputs: dict[str, str], tmp_path: Path) -> None:
    broken = {"name": "broken", "settings": {"adapter": {"targets": ["k_porj"]}}}
    file = write_file(tmp_path, variants=[SMALL["variants"][2], broken], seeds=[0])
    with pytest.raises(TrainingError, match="1 of 2 cells failed") as failure:
        koat.experiment(file, out=tmp_path / "out", inputs=inputs, jobs=2)
    assert "broken-seed0: " in str(failure.value)
    assert "k_porj" in str(failure.value)
    found = load_file(tmp_path / "out" / "runs" / "quick-seed0" / WEIGHTS)
    for name, tensor in load_file(whole.folder / "runs" / "quick-seed0" / WEIGHTS).items():
        torch.testing.assert_close(found[name], tensor)  # not the bytes: threads may differ
    assert (tmp_path / "out" / "report.html").exists()
    assert "Traceback" not in (tmp_path / "out" / "logs" / "broken-seed0.log").read_text(encoding="utf-8")


@pytest.mark.soak
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_killed_again_and_again_it_ends_in_the_same_bytes(
    jobs: str, whole: Outcome, inputs: dict[str, str], tmp_path: Path
) -> None:
    items = [f"{name}={value}" for name, value in inputs.items()]
    command = ["experiment", str(write_file(tmp_path)), *items, "--out", "out", "--jobs", jobs]
    for seconds in (5, 8, 11, 14, 17, 20):
        child = start_koat(*command, cwd=tmp_path, start_new_session=True)
        time.sleep(seconds)
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        if child.returncode == 0:
            break
    done = run_koat(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert read_weights(tmp_path / "out") == read_weights(whole.folder)
    assert read_scores(tmp_path / "out") == read_scores(whole.folder)
