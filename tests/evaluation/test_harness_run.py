"""lm-evaluation-harness' tasks in koat's own form: the harness' own figures, item by item, and their contracts."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_base import need_shared

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra `eval`)")

import lm_eval
from lm_eval.models.huggingface import HFLM

from koat.core.errors import ConfigError
from koat.evaluation.differences import explain_differences
from koat.evaluation.harness.contract import describe_shots, to_plain
from koat.evaluation.harness.lm import HarnessOptions, KoatLM
from koat.evaluation.harness.run import evaluate_harness
from koat.evaluation.harness.tasks import HarnessTask, Sources, find_name, load_leaves, open_manager, set_shots
from koat.evaluation.result import TaskResult
from koat.forest.verify import verify_layout
from tests.evaluation.conftest import VOCABULARY

TASKS = [
    ("local_arc_challenge", 2), ("local_hellaswag", 1), ("local_mmlu_anatomy", 1), ("local_truthfulqa_mc1", 0),
    ("local_truthfulqa_mc2", 0), ("local_winogrande", 2), ("local_kobest_copa", 2), ("local_kobest_hellaswag", 1),
    ("local_lambada", 1), ("local_gsm8k", 1),
]  # fmt: skip
LIMIT = 4
OWN = """
task: own_words
custom_dataset: !function koat.evaluation.harness.local_data.load_local
dataset_kwargs: {files: {validation: words.jsonl}, columns: {question: q, choices: c, gold: g}, pool: 3}
validation_split: validation
fewshot_split: shots
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
  - {metric: brier_score, aggregation: brier_score, higher_is_better: false}
"""


@pytest.fixture(scope="module")
def lms(make_model: Callable[..., Any], byte_tokenizer: Any) -> tuple[Callable[..., KoatLM], HFLM]:
    """`make(**options)`, koat's model of the harness anew, and the harness' own, over one tiny model."""
    model = make_model("llama", vocab_size=VOCABULARY, max_position_embeddings=4096)
    layout, _ = verify_layout(model)
    theirs = copy.deepcopy(model)
    theirs.config._attn_implementation = "sdpa"
    peer = HFLM(theirs, tokenizer=copy.deepcopy(byte_tokenizer), batch_size=1)

    def make(**options: Any) -> KoatLM:
        return KoatLM(model, layout, copy.deepcopy(byte_tokenizer), HarnessOptions(**options))

    return make, peer


def load_one(name: str, sources: Sources, num_shots: int | None = None, seed: int | None = None) -> HarnessTask:
    """Return one leaf task, ready to be asked."""
    leaves, _ = load_leaves(name, open_manager([name], sources, []))
    assert len(leaves) == 1
    return set_shots(leaves[0], num_shots, seed)


@pytest.fixture
def words(tmp_path: Path) -> Sources:
    """A folder with a task of a user's own and its data."""
    rows = [
        {"q": f"문장 {number}: 영화가", "c": [" 최고", " abcdefghij", " 굿"], "g": number % 3} for number in range(15)
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "words.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "own.yaml").write_text(OWN, encoding="utf-8")
    return Sources(tmp_path, tmp_path / "tasks")


@pytest.fixture(autouse=True)
def own_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the harness index what is named alone: its own ten thousand take ten seconds."""
    import functools

    import lm_eval.tasks

    manager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)


# The same figures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "num_shots"), TASKS)
def test_scores_are_the_harness_own(
    name: str, num_shots: int, lms: tuple[Callable[..., KoatLM], HFLM], byte_tokenizer: Any
) -> None:
    sources = Sources(need_shared("data", "benchmarks"))
    make, peer = lms
    result = evaluate_harness(make(), load_one(name, sources, num_shots), LIMIT)
    expected = lm_eval.simple_evaluate(
        peer, tasks=[name], num_fewshot=num_shots, limit=LIMIT, bootstrap_iters=0,
        task_manager=open_manager([name], sources, []),
    )  # fmt: skip
    theirs = {key.removesuffix(",none"): value for key, value in expected["results"][name].items() if "," in key}
    ours = {scoring: score.value for scoring, score in result.scores.items()} | dict(result.values)
    for scoring, value in ours.items():
        assert value == pytest.approx(theirs.pop(scoring), rel=1e-3)
    assert all("_stderr" in key for key in theirs)
    assert result.num_items == LIMIT
    samples = expected["samples"][name]
    for row, sample in zip(result.predictions, samples, strict=True):
        for scoring in result.scores:
            assert row["correct"][scoring] == pytest.approx(float(sample[scoring.partition(",")[0]]), abs=1e-4)
        for logprob, (value, _) in zip(row.get("logprobs", {}).values(), sample["filtered_resps"], strict=False):
            assert logprob == pytest.approx(value, abs=1e-3)


def test_every_row_that_shots_are_drawn_from_is_in_the_contract(words: Sources) -> None:
    def describe() -> dict[str, Any]:
        return describe_shots(load_one("own_words", words, 1))

    path = words.data_dir / "words.jsonl"  # type: ignore[operator]
    first, rows = describe(), [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert describe() == first
    rows[1]["q"] = "다른 문장"  # neither the first nor the last of the three
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    assert describe()["source"] != first["source"]


def test_a_prediction_says_what_was_asked_and_answered(lms: tuple[Callable[..., KoatLM], HFLM], words: Sources) -> None:
    result = evaluate_harness(lms[0](), load_one("own_words", words), None)
    assert result.num_items == 12
    assert list(result.scores) == ["acc", "acc_norm"]
    for place, row in enumerate(result.predictions):
        choices = row["text"]["choices"]
        assert row["id"] == str(place)
        assert list(row["logprobs"]) == choices
        assert row["gold"] == choices[row["text"]["gold"]]
        best = {
            "acc": max(choices, key=lambda choice: row["logprobs"][choice]),
            "acc_norm": max(choices, key=lambda choice: row["logprobs"][choice] / len(choice)),
        }
        assert row["predicted"] == best
        assert row["correct"] == {name: float(answer == row["gold"]) for name, answer in best.items()}
    assert any(row["predicted"]["acc"] != row["predicted"]["acc_norm"] for row in result.predictions)
    assert 0 < result.num_unique_tokens < result.num_tokens
    json.dumps(result.to_mapping(), allow_nan=False)


def test_what_has_no_value_per_item_stands_apart(lms: tuple[Callable[..., KoatLM], HFLM], words: Sources) -> None:
    result = evaluate_harness(lms[0](), load_one("own_words", words), None)
    assert list(result.values) == ["brier_score"]
    assert result.notes == [
        "brier_score is over all items together: it stands without interval, and `koat compare` leaves it out."
    ]
    assert "brier_score" not in result.predictions[0]["correct"]


def test_cuts_stand_in_notes_and_conditions(lms: tuple[Callable[..., KoatLM], HFLM], words: Sources) -> None:
    whole = evaluate_harness(lms[0](), load_one("own_words", words, 3), None)
    cut = evaluate_harness(lms[0](max_length=60), load_one("own_words", words, 3), None)
    assert whole.conditions.parts["truncation"] == "none"
    assert cut.conditions.parts["truncation"].startswith("left, ")
    assert "were cut from the left" in cut.notes[0]
    assert cut.contracts == whole.contracts


# Contracts -----------------------------------------------------------------------------------------------------


def ask(lms: tuple[Callable[..., KoatLM], HFLM], sources: Sources, shots: int, seed: int, limit: int) -> TaskResult:
    return evaluate_harness(lms[0](), load_one("own_words", sources, shots, seed), limit)


def test_a_contract_pins_items_shots_and_metric(lms: tuple[Callable[..., KoatLM], HFLM], words: Sources) -> None:
    base = ask(lms, words, 1, 1, 5).contracts["acc"]
    assert ask(lms, words, 1, 1, 5).contracts["acc"] == base
    assert ask(lms, words, 0, 1, 5).contracts["acc"] == ask(lms, words, 0, 2, 5).contracts["acc"]
    for shots, seed, limit, part, reason in [
        (2, 1, 5, "shots", "1 against 2: other shots"),
        (1, 2, 5, "shots", "seed 1 against 2: other shots"),
        (1, 1, 6, "items", "5 against 6: other items"),
    ]:
        other = ask(lms, words, shots, seed, limit).contracts["acc"]
        assert explain_differences(base.parts, other.parts)[part].startswith(reason)
    norm = ask(lms, words, 1, 1, 5).contracts["acc_norm"]
    assert explain_differences(base.parts, norm.parts) == {
        "normalisation": "none against per-character: another normalisation",
        "metric": "acc against acc_norm: another metric",
    }


def test_functions_are_pinned_by_their_source() -> None:
    assert "def test_functions_are_pinned" in to_plain(test_functions_are_pinned_by_their_source)
    assert to_plain({1: (None, True, len)}) == {"1": [None, True, "builtins.len"]}


def test_a_partial_function_is_pinned_with_what_is_filled_in() -> None:
    def write_prompt(doc: dict[str, str], ending: str) -> str:
        return doc["question"] + ending

    def write_another(doc: dict[str, str], ending: str) -> str:
        return ending + doc["question"]

    base = to_plain(partial(write_prompt, ending="?"))
    assert base == {"partial": to_plain(write_prompt), "args": [], "keywords": {"ending": "?"}}
    assert "def write_prompt" in base["partial"]
    assert base == to_plain(partial(write_prompt, ending="?"))
    others = [
        partial(write_prompt, ending="!"),
        partial(write_prompt, {}, ending="?"),
        partial(write_another, ending="?"),
    ]
    assert base not in [to_plain(other) for other in others]


# Names and shots -----------------------------------------------------------------------------------------------


def test_a_name_is_local_where_there_is_a_folder_of_data(words: Sources) -> None:
    manager = open_manager(["own_words"], words, [])
    assert find_name("hellaswag", manager, words) == "local_hellaswag"
    assert find_name("hellaswag", manager, Sources()) == ""
    assert find_name("own_words", manager, words) == "own_words"


def test_an_unknown_name_has_the_nearest_of_both(words: Sources) -> None:
    with pytest.raises(ConfigError, match=r"'own_word' \(did you mean 'own_words'\?\).*koat's own are nsmc"):
        open_manager(["own_words", "own_word"], words, ["nsmc"])
    with pytest.raises(ConfigError, match="no such folder"):
        open_manager(["own_words"], Sources(None, words.data_dir / "nowhere" if words.data_dir else None), [])


def test_more_shots_than_there_are_is_refused_and_none_stays_none(words: Sources) -> None:
    with pytest.raises(ConfigError, match="has 3 examples to draw shots from, not 4"):
        load_one("own_words", words, 4)
    assert load_one("own_words", words).num_shots == 0
    benchmarks = Sources(need_shared("data", "benchmarks"))
    assert load_one("local_truthfulqa_mc1", benchmarks, 5).num_shots == 0


def test_groups_and_tags_name_their_tasks() -> None:
    sources = Sources(need_shared("data", "benchmarks"))
    leaves, groups = load_leaves("local_kobest", open_manager(["local_kobest"], sources, []))
    assert groups == {"local_kobest": [leaf.task_name for leaf in leaves]}
    assert len(leaves) == 5


def test_a_set_has_one_order_in_every_process() -> None:
    assert to_plain({"b", "a", "c"}) == ["a", "b", "c"] == to_plain(frozenset("cab"))
