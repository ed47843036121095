"""Tasks: what ships, what a user may write, and how mistakes are answered."""

from __future__ import annotations

from pathlib import Path

import pytest

from koat.core.errors import ConfigError
from koat.evaluation.catalogue import list_tasks, load_task
from koat.evaluation.task import adjust_task

OWN = """
name: spam
columns: {text: mail, label: kind}
prompt: "{text}\\n스팸인가요?"
labels: {ham: " 아니요", spam: " 예"}
"""


def load_own(folder: Path, text: str) -> object:
    (folder / "own.yaml").write_text(text, encoding="utf-8")
    return load_task(str(folder / "own.yaml"))


def test_every_task_that_ships_loads_under_its_name() -> None:
    assert list_tasks() == ["context-qa", "leaderboard-2023", "nsmc-prompt1", "nsmc-prompt2"]
    for name in list_tasks():
        task = load_task(name)
        assert task.name == name
        assert task.title.ko
        assert task.title.en
        assert task.description.ko


def test_nsmc_is_the_published_protocol() -> None:
    first, second = load_task("nsmc-prompt1"), load_task("nsmc-prompt2")
    assert first.prompt == "문장: {text}\n감정:"
    assert second.prompt == "다음 문장은 긍정일까요 부정일까요?\n{text}\n정답:"
    for task in (first, second):
        assert task.labels == {"0": " 부정", "1": " 긍정"}
        assert task.shot_separator == "\n"
        assert (task.num_shots, task.shot_pool.max_tokens, task.shot_rule, task.shot_seed) == (
            10,
            25,
            "per-item",
            1234,
        )
        assert (task.items, task.item_seed) == (500, 1234)
        assert task.clean == {"text": "hangul"}
        assert task.scorings == ["first-token", "likelihood"]


def test_an_unknown_name_is_answered_with_the_nearest_and_all() -> None:
    with pytest.raises(ConfigError, match=r"'nsmc-promt2'.*did you mean 'nsmc-prompt2'.*nsmc-prompt1, nsmc-prompt2"):
        load_task("nsmc-promt2")
    with pytest.raises(ConfigError, match="there is no such file"):
        load_task("./nowhere.yaml")


def test_an_own_task_has_sober_defaults(tmp_path: Path) -> None:
    task = load_own(tmp_path, OWN)
    assert (task.num_shots, task.items, task.scorings, task.normalisation) == (0, "all", ["likelihood"], None)
    assert task.words == ("아니요", "예")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("labels:", "lables:", r"lables.*did you mean 'labels'"),
        ("{text}\\n스팸", "{txt}\\n스팸", r"'txt'.*did you mean 'text'"),
        ("{text}\\n스팸", "스팸", "names no field"),
        (", label: kind", "", "which column holds the label"),
        ('" 예"', '" 아니요 "', "labels need words that differ"),
        ('" 예"', '" "', "labels need words that differ"),
        (', spam: " 예"', "", "labels"),
        ("name: spam", "name: spam\nclean: {mail: strip}", "'mail' is used but not in columns"),
        ("name: spam", "name: spam\nscorings: [first-tokn]", "first-token"),
        ("name: spam", "name: spam\nnum_shots: -1", "num_shots"),
        ("name: spam", "name: spam\nnormalisation: per-word", "per-token"),
        ("name: spam", "name: spam\nkind: answers", r"did you mean 'answer'.*choice, answer, group"),
    ],
)
def test_mistakes_in_an_own_task_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in OWN
    with pytest.raises(ConfigError, match=message) as caught:
        load_own(tmp_path, OWN.replace(old, new))
    assert "own.yaml" in str(caught.value)


def test_the_command_line_overrides_three_things() -> None:
    task = load_task("nsmc-prompt1")
    changed = adjust_task(task, num_shots=3, limit="all", seed=7)
    assert (changed.num_shots, changed.items, changed.shot_seed) == (3, "all", 7)
    assert changed.model_copy(update={"num_shots": 10, "items": 500, "shot_seed": 1234}) == task
    assert adjust_task(task) == task
    assert adjust_task(task, num_shots=0).num_shots == 0
    for wrong in (0, -5, "some"):
        with pytest.raises(ConfigError, match="items"):
            adjust_task(task, limit=wrong)
