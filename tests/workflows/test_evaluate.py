"""Evaluating bases, runs and plain PEFT adapters: what is opened, what is refused, what is kept."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

import koat
from koat.adapters.attach import attach_adapter
from koat.adapters.settings import PromptSettings
from koat.core.config import Layer
from koat.core.json_lines import read_lines
from koat.core.settings import ModelSettings
from koat.evaluation.catalogue import load_task
from koat.evaluation.evaluate import evaluate_task
from koat.evaluation.spans import score_block
from koat.forest.verify import verify_layout
from koat.model import load_model, load_tokenizer
from koat.workflows.comparing.report import list_commands
from koat.workflows.comparing.scored import collect_sources, group_subjects
from koat.workflows.config import RunConfig, resolve_layers
from koat.workflows.evaluating.asking import ASK
from koat.workflows.evaluating.subject import open_subject
from koat.workflows.trained import find_trained
from koat.workflows.training.finetune import finetune_run
from tests.hub_cache import NAME as NAME_ON_HUB
from tests.hub_cache import cache_base
from tests.tiny_base import call_koat, make_rows, write_base, write_rows

TASK = "nsmc-prompt1"
NAME = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of reviews: `test` and `train`."""
    folder = tmp_path_factory.mktemp("reviews")
    words = ["비가", "좋다", "눈이", "나쁘다", "해가", "길다"]
    for name, first in (("test", 0), ("train", 100)):
        rows = [f"{first + n}\t{words[n % 6]} {words[(n * 5 + first) % 6]} {n}\t{n % 2}" for n in range(12)]
        (folder / name).write_text("\n".join(["id\tdocument\tlabel", *rows]) + "\n", encoding="utf-8")
    return {"test": folder / "test", "train": folder / "train"}


def strip_times(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the results of a report without what differs from one time to the next."""
    changing = {"seconds", "seconds_per_item", "peak_bytes"}
    return [{key: value for key, value in result.items() if key not in changing} for result in report["results"]]


def test_a_run_is_evaluated_and_every_prediction_kept(own_run: Path, reviews: dict[str, Path]) -> None:
    report = koat.evaluate(own_run, tasks=[TASK, "nsmc-prompt2"], data=reviews["test"], num_shots=0, limit="all")
    assert report["subject"] == "finished"
    assert [result["task"] for result in report["results"]] == [TASK, "nsmc-prompt2"]
    for result in report["results"]:
        lines = read_lines(own_run / "predictions" / f"{result['task']}-0shot-seed{result['shot_seed']}.jsonl")
        assert len(lines) == result["num_items"] == 12
        for scoring, score in result["scores"].items():
            assert score["value"] == pytest.approx(sum(line["correct"][scoring] for line in lines) / 12)
            assert 0 <= score["low"] <= score["value"] <= score["high"] <= 1
            assert {line["contracts"][scoring] for line in lines} == {result["contracts"][scoring]["hash"]}
    (kept,) = (own_run / "predictions").glob(f"{TASK}*nsmc-prompt2*.scores.json")
    assert strip_times(json.loads(kept.read_text(encoding="utf-8"))) == strip_times(report)


def test_base_run_and_adapter_folder_are_three_subjects(
    own_run: Path, place: Path, reviews: dict[str, Path], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"tasks": [TASK], "data": reviews["test"], "num_shots": 0, "limit": "all"}
    run = koat.evaluate(own_run, **options)
    adapter = tmp_path / "plain"
    shutil.copytree(own_run / "adapter", adapter)
    assert strip_times(koat.evaluate(adapter, **options)) == strip_times(run)
    assert (adapter / "predictions").is_dir()

    status, out, error = call_koat(
        "eval", place / "base", "--task", TASK, "--data", reviews["test"], "--shots", 0,
        "--limit", "all", "--out", tmp_path / "base", "--json",
    )  # fmt: skip
    assert status == 0, error
    base = json.loads(out)
    assert base["results"][0]["contracts"] == run["results"][0]["contracts"]
    logprobs = [
        [line["logprobs"] for line in read_lines(folder / f"{TASK}-0shot-seed1234.jsonl")]
        for folder in (tmp_path / "base", own_run / "predictions")
    ]
    assert logprobs[0] != logprobs[1]


def test_a_report_s_commands_ask_the_same_again(
    finished: Path, place: Path, reviews: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "mine"
    shutil.copytree(finished, run)
    options: dict[str, Any] = {
        "data": reviews["test"],
        "shots": reviews["train"],
        "num_shots": 1,
        "limit": 5,
        "seed": 3,
    }
    asked = koat.evaluate(run, tasks=[TASK, "nsmc-prompt2"], **options)
    sources = collect_sources([str(run)])
    commands = list_commands(group_subjects(sources), [str(run)], tmp_path / "page.html")
    assert [command.split()[1] for command in commands] == ["finetune", "eval", "report"]
    assert str(reviews["test"]) not in commands[1]
    assert not any(str(tmp_path) in command for command in commands)
    assert commands[2] == "koat report mine-again --out page.html"
    shutil.copytree(run, f"{run}-again", ignore=shutil.ignore_patterns("predictions"))
    for file in reviews.values():
        shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    status, out, error = call_koat(*shlex.split(commands[1])[1:], "--json")
    assert status == 0, error
    assert strip_times(json.loads(out)) == strip_times(asked)


def test_a_report_s_commands_know_how_a_base_was_loaded(place: Path, reviews: dict[str, Path], tmp_path: Path) -> None:
    subject = koat.load(place / "base", {"dtype": "bfloat16"})
    koat.evaluate(
        replace(subject, predictions=tmp_path / "base"), tasks=[TASK], data=reviews["test"], num_shots=0, limit=4
    )
    (source,) = collect_sources([str(tmp_path / "base")], {str(tmp_path / "base"): "Some name"})
    commands = list_commands(group_subjects([source]), [str(tmp_path / "base")], Path("page.html"))
    assert commands == [
        f"koat eval base --out base-again --task {TASK} --dtype bfloat16 --data test --shots 0 --limit 4",
        "koat report base-again --out page.html",
    ]


def test_shots_come_from_their_own_file_and_follow_the_seed(own_run: Path, reviews: dict[str, Path]) -> None:
    subject = koat.load(own_run)
    options: dict[str, Any] = {"tasks": [TASK], "data": reviews["test"], "shots": reviews["train"], "limit": 5}
    first, again, other = (koat.evaluate(subject, num_shots=1, seed=seed, **options) for seed in (1, 1, 2))
    assert strip_times(first) == strip_times(again)
    hashes = [report["results"][0]["contracts"]["likelihood"]["hash"] for report in (first, other)]
    assert hashes[0] != hashes[1]
    lines = read_lines(own_run / "predictions" / f"{TASK}-1shot-seed1.jsonl")
    assert len(lines) == 5
    assert all(len(line["shots"]) == 1 and int(line["shots"][0]) >= 100 for line in lines)


def test_shots_without_a_file_are_refused(finished: Path, reviews: dict[str, Path]) -> None:
    with pytest.raises(koat.ConfigError, match="--shots-from"):
        koat.evaluate(finished, tasks=[TASK], data=reviews["test"])


def test_a_run_without_its_adapter_is_refused(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    with pytest.raises(koat.RunFolderError, match="no adapter"):
        koat.load(tmp_path / "run")


def test_a_base_that_changed_is_refused(finished: Path, place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "base", tmp_path / "base")
    name = tmp_path / "base" / "model.safetensors"
    state = load_file(name)
    state["model.norm.weight"] = state["model.norm.weight"] + 1
    save_file(state, name, metadata={"format": "pt"})
    with pytest.raises(koat.AdapterError, match="another base model"):
        koat.load(finished, {"base": str(tmp_path / "base")})
    shutil.copy(place / "base" / "model.safetensors", name)
    assert koat.load(finished, {"base": str(tmp_path / "base")}).name == "finished"


@pytest.mark.parametrize("damage", ["cut", "gone", "other shape"])
def test_a_damaged_adapter_is_named(damage: str, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    weights = tmp_path / "run" / "adapter" / NAME
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:200])
    elif damage == "gone":
        weights.unlink()
    else:
        save_file({name: tensor[:1] for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(koat.AdapterError, match=r"adapter_model\.safetensors|another shape"):
        koat.load(tmp_path / "run")


def test_an_adapter_that_does_not_know_its_base_asks_for_it(finished: Path, place: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "adapter", tmp_path / "plain")
    config = tmp_path / "plain" / "adapter_config.json"
    stored = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**stored, "base_model_name_or_path": None}), encoding="utf-8")
    with pytest.raises(koat.AdapterError, match="--base"):
        koat.load(tmp_path / "plain")
    assert koat.load(tmp_path / "plain", {"base": str(place / "base")}).name == "plain"


def test_a_pickled_base_is_refused_with_a_way_out(place: Path, tmp_path: Path) -> None:
    import torch

    write_base(tmp_path / "pickled")
    state = load_file(tmp_path / "pickled" / "model.safetensors")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(koat.ModelError, match="safetensors"):
        koat.load(tmp_path / "pickled")


def test_a_task_that_fails_costs_nothing_of_those_before(
    finished: Path, reviews: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    asked: list[str] = []

    def ask(subject: Any, task: Any, *more: Any) -> Any:
        asked.append(task.name)
        if len(asked) > 1:
            raise ZeroDivisionError("the second task")
        return ask_own(subject, task, *more)

    (kind,) = {type(load_task(TASK))}
    ask_own = ASK[kind]
    monkeypatch.setitem(ASK, kind, ask)
    with pytest.raises(ZeroDivisionError):
        koat.evaluate(run, tasks=[TASK, "nsmc-prompt2"], data=reviews["test"], num_shots=0)
    (kept,) = (run / "predictions").glob("*.scores.json")
    assert re.fullmatch(r"unfinished-\w{8}\.scores\.json", kept.name)
    assert [result["task"] for result in json.loads(kept.read_text(encoding="utf-8"))["results"]] == [TASK]
    monkeypatch.setitem(ASK, kind, ask_own)
    koat.evaluate(run, tasks=["nsmc-prompt2"], data=reviews["test"], num_shots=0, limit=3)
    assert kept.is_file()  # another evaluation is none of its business
    (other,) = set((run / "predictions").glob("*.scores.json")) - {kept}
    other.unlink()
    koat.evaluate(run, tasks=[TASK, "nsmc-prompt2"], data=reviews["test"], num_shots=0)
    (whole,) = (run / "predictions").glob("*.scores.json")
    assert len(json.loads(whole.read_text(encoding="utf-8"))["results"]) == 2


def test_no_evaluation_takes_the_place_of_another(finished: Path, reviews: dict[str, Path], tmp_path: Path) -> None:
    """Fewer items are another question, bfloat16 another condition; the same again replaces itself alone."""
    run = shutil.copytree(finished, tmp_path / "run")

    def ask(limit: int, dtype: str) -> Path:
        before = list_written()
        koat.evaluate(run, tasks=[TASK], data=reviews["test"], num_shots=0, limit=limit, model={"dtype": dtype})
        (changed,) = (path for path, stamp in list_written().items() if before.get(path) != stamp)
        return changed

    def list_written() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (run / "predictions").glob("*.jsonl")}

    asked = [(6, "float32"), (4, "float32"), (6, "bfloat16")]
    first, again = [ask(*each) for each in asked], [ask(*each) for each in reversed(asked)]
    assert len(set(first)) == 3 and again == first[::-1]
    assert [len(path.read_text(encoding="utf-8").splitlines()) for path in first] == [6, 4, 6]
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in (run / "predictions").glob("*.scores.json")]
    assert sorted(report["results"][0]["num_items"] for report in reports) == [4, 6, 6]
    # Either stands with its own answers: compared file by file, none is left out for another's.
    for path in sorted((run / "predictions").glob("*.scores.json")):
        (source,) = collect_sources([str(path)])
        assert not source.notes and {len(score.predictions) for score in source.scores} <= {4, 6}
        stem = path.name.removesuffix(".scores.json")
        own = {str(row["id"]): row for row in read_lines(run / "predictions" / f"{stem}.jsonl")}
        assert all(score.predictions == own for score in source.scores)


def test_a_run_on_a_base_from_the_hub_finds_it_again(
    place: Path, reviews: dict[str, Path], tmp_path: Path, hub_cache: Path
) -> None:
    """As it was when the run was trained, whatever came later; a local copy of it will do, another model will not."""
    cache_base(hub_cache, place / "base", "a" * 40)
    data = write_rows(tmp_path / "rows.jsonl", make_rows(4))
    settings = {"model": {"base": NAME_ON_HUB}, "data": {"train": [str(data)]}, "training": {"max_steps": 1}}
    run = koat.finetune(settings, out=tmp_path / "run").path
    shutil.copytree(place / "base", tmp_path / "copy")
    other = shutil.copytree(place / "base", tmp_path / "other")
    state = load_file(other / "model.safetensors")
    state["model.norm.weight"] += 1
    save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    cache_base(hub_cache, other, "b" * 40)

    def ask(**more: Any) -> Any:
        found = koat.evaluate(run, tasks=[TASK], data=reviews["test"], num_shots=0, **more)
        return found["results"][0]["scores"]["likelihood"]["value"]

    assert ask() == ask(model={"base": str(tmp_path / "copy")})
    with pytest.raises(koat.AdapterError, match="another base model"):
        ask(model={"base": str(other)})
    with pytest.raises(koat.AdapterError, match="another base model"):
        ask(model={"revision": "main"})
    # Where the weights are still to be fetched, the commit tells.
    weights = hub_cache / "models--me--tiny" / "snapshots" / ("a" * 40) / "model.safetensors"
    kept = weights.rename(tmp_path / "kept.safetensors")
    assert find_trained(run).model.revision == "a" * 40
    edited = load_file(kept)
    edited["model.norm.weight"] += 2
    save_file(edited, weights, metadata={"format": "pt"})
    with pytest.raises(koat.AdapterError, match="another base model"):
        find_trained(run)


def test_a_run_on_a_base_from_the_hub_goes_on_with_it(place: Path, tmp_path: Path, hub_cache: Path) -> None:
    """A run that was stopped loads the base as it was, though the branch has other weights by now."""
    cache_base(hub_cache, place / "base", "a" * 40)
    data = write_rows(tmp_path / "rows.jsonl", make_rows(12))
    training = {"max_steps": 4, "batch_size": 2, "save_every": 2}
    settings = {"model": {"base": NAME_ON_HUB}, "data": {"train": [str(data)]}, "training": training}
    seen: list[int] = []

    def stop(record: Any) -> None:
        seen.append(record.step)
        if record.step == 3:
            raise KeyboardInterrupt

    resolved = resolve_layers(RunConfig, [Layer("flag", settings)])
    with pytest.raises(KeyboardInterrupt):
        finetune_run(resolved, tmp_path / "run", on_step=stop)
    other = shutil.copytree(place / "base", tmp_path / "other")
    state = load_file(other / "model.safetensors")
    state["model.norm.weight"] += 1
    save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    cache_base(hub_cache, other, "b" * 40)
    run = finetune_run(resolved, tmp_path / "run", resume=True)
    assert run.is_complete() and run.read_manifest()["base"]["commit"] == "a" * 40
    assert run.read_config()["model"].get("revision") is None


def test_two_bases_whose_names_read_alike_are_kept_apart(
    place: Path, reviews: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (tmp_path / "a", tmp_path / "work" / "a"):
        shutil.copytree(place / "base", folder / "base")
    monkeypatch.chdir(tmp_path / "work")
    for target in ("a/base", "../a/base", "./a/base"):
        koat.evaluate(target, tasks=[TASK], data=reviews["test"], num_shots=0)
    found = sorted(path.parent.name for path in Path("evaluations").glob("*/*.scores.json"))
    assert len(found) == 2 and found[0] == "a-base" and re.fullmatch(r"a-base-\w{8}", found[1])


def test_a_task_s_name_makes_no_folders(finished: Path, reviews: dict[str, Path], tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    own = tmp_path / "mine.yaml"
    own.write_text(
        yaml.safe_dump({**load_task(TASK).model_dump(mode="json"), "name": "../긍정/부정"}), encoding="utf-8"
    )
    koat.evaluate(run, tasks=[str(own)], data=reviews["test"], num_shots=0)
    assert sorted(path.name for path in (run / "predictions").iterdir()) == [
        "..-긍정-부정-0shot-seed1234.jsonl", "..-긍정-부정-0shot-seed1234.scores.json"
    ]  # fmt: skip


@pytest.mark.parametrize(("options", "budget"), [(["--tokens", 96], 96), ([], 8192)], ids=["given", "default"])
def test_as_many_tokens_go_through_the_model_at_once_as_the_command_line_says(
    options: list[Any],
    budget: int,
    place: Path,
    reviews: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: set[int] = set()

    def score(model: Any, layout: Any, sequences: Any, token_budget: int) -> Any:
        seen.add(token_budget)
        return score_block(model, layout, sequences, token_budget)

    monkeypatch.setattr("koat.evaluation.scorer.score_block", score)
    given = ["--task", TASK, "--data", reviews["test"], "--shots", 0, "--limit", 4, "--out", tmp_path / "out"]
    status, _, error = call_koat("eval", place / "base", *given, *options)
    assert status == 0, error
    assert seen == {budget}


def test_two_tasks_of_one_name_are_refused(finished: Path, reviews: dict[str, Path], tmp_path: Path) -> None:
    own = tmp_path / "mine.yaml"
    task = load_task(TASK)
    own.write_text(yaml.safe_dump({**task.model_dump(mode="json"), "prompt": "Review: {text}"}), encoding="utf-8")
    with pytest.raises(koat.ConfigError, match="two different tasks are called"):
        koat.evaluate(finished, tasks=[TASK, str(own)], data=reviews["test"], num_shots=0)


def test_a_folder_that_cannot_be_written_is_found_before_a_question_is_asked(
    finished: Path, reviews: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "predictions").write_text("a file where the folder belongs", encoding="utf-8")
    (kind,) = {type(load_task(TASK))}
    monkeypatch.setitem(ASK, kind, lambda *given: pytest.fail("asked for nothing"))
    with pytest.raises(koat.RunFolderError):
        koat.evaluate(run, tasks=[TASK], data=reviews["test"], num_shots=0)


def test_padded_rows_are_run_where_they_are_asked_for(place: Path) -> None:
    settings = ModelSettings(base=str(place / "base"), layout="padded")
    subject = open_subject(str(place / "base"), settings)
    assert not subject.layout.shares
    assert subject.verification.reason == "model.layout=padded"


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_a_soft_prompt_takes_its_part_of_the_context(method: str, place: Path, tmp_path: Path) -> None:
    """The tiny base sees 256 tokens, 20 of which are the prompt's."""
    tokenizer = load_tokenizer(ModelSettings(base=str(place / "base")))
    word, end = tokenizer.encode(" 비가"), 1
    text = " 비가" * ((220 - end) // len(word))
    data = write_rows(tmp_path / "long.jsonl", [{"instruction": "오늘", "output": text}, *make_rows(4)])
    flags = ["--base", place / "base", "--data", data, "--out", tmp_path / "run", "training.max_steps=1"]
    status, _, error = call_koat("finetune", *flags, "--method", method)
    assert status == 2
    assert "longer than max_length=236 tokens" in " ".join(error.split())
    status, _, error = call_koat("finetune", *flags, "--method", "ia3", "--overwrite")
    assert status == 0, error


def test_a_prompt_as_long_as_the_context_is_refused(place: Path, tmp_path: Path) -> None:
    flags = ["--base", place / "base", "--data", place / "rows.jsonl", "--out", tmp_path / "run", "--method", "prompt"]
    status, _, error = call_koat("finetune", *flags, "adapter.num_virtual_tokens=256")
    assert status == 2
    assert "leaves no room for text" in " ".join(error.split())


def test_items_that_do_not_fit_beside_a_soft_prompt_are_kept_out(place: Path, tmp_path: Path) -> None:
    settings = ModelSettings(base=str(place / "base"))
    model, tokenizer = load_model(settings), load_tokenizer(settings)
    word = " 비가"
    long = word * (246 // len(tokenizer.encode(word)))
    (tmp_path / "test.tsv").write_text(f"id\tdocument\tlabel\n1\t{long}\t1\n2\t{word}\t0\n", encoding="utf-8")
    task = load_task(TASK).model_copy(update={"prompt": "{text}", "num_shots": 0, "items": "all"})
    kept_out = []
    for wrapped in (model, attach_adapter(model, PromptSettings(num_virtual_tokens=20)).eval()):
        layout, _ = verify_layout(wrapped)
        found = evaluate_task(wrapped, layout, tokenizer, task, str(tmp_path / "test.tsv"), num_shots=0)
        kept_out.append([each.item_id for each in found.kept_out])
    assert kept_out == [[], ["1"]]
