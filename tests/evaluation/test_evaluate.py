"""A whole evaluation: against the protocol written out plainly, and with everything that can go wrong."""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch

from koat.core.errors import ConfigError
from koat.evaluation.catalogue import load_task
from koat.evaluation.evaluate import TaskResult, evaluate_task, normalise_logprobs
from koat.evaluation.scorer import ItemScore
from koat.forest.verify import verify_layout

TASK = load_task("nsmc-prompt1")
NSMC = Path(__file__).resolve().parents[3] / "shared" / "data" / "nsmc"


@pytest.fixture(scope="module")
def layout(model: Any) -> Any:
    return verify_layout(model)[0]


def run_plainly(model: Any, tokenizer: Any, data: str, source: str, num_items: int) -> list[dict[str, Any]]:
    """The protocol as one would write it down in a notebook, with pandas, random and `generate`."""
    frames = [pandas.read_csv(path, sep="\t", quoting=csv.QUOTE_NONE).dropna() for path in (data, source)]
    test, train = frames
    pool = [row for row in train.itertuples() if len(tokenizer(row.document).input_ids) <= 25]
    random.seed(1234)
    shots = [random.sample(pool, 10) for _ in range(num_items)]
    found = []
    for row, drawn in zip(test.sample(num_items, random_state=1234).itertuples(), shots, strict=True):
        prompt = ""
        for shot in drawn:
            text = re.sub(r"[^가-힣ㄱ-ㅎㅏ-ㅣ\s]", "", shot.document)
            prompt += "문장: " + text + "\n감정:" + (" 긍정\n" if shot.label == 1 else " 부정\n")
        prompt += "문장: " + re.sub(r"[^가-힣ㄱ-ㅎㅏ-ㅣ\s]", "", row.document) + "\n감정:"
        ids = torch.tensor([tokenizer(prompt).input_ids])
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=1, do_sample=False, pad_token_id=0)
        word = tokenizer.decode([int(out[0, -1])]).strip()
        gold = "긍정" if row.label == 1 else "부정"
        shown = [str(shot.id) for shot in drawn]
        found.append({"id": str(row.id), "word": word, "correct": word == gold, "shots": shown})
    return found


def test_an_evaluation_is_the_notebooks_protocol(
    model: Any, layout: Any, tokenizer: Any, reviews: dict[str, str]
) -> None:
    result = evaluate_task(model, layout, tokenizer, TASK, reviews["test"], reviews["train"], limit=12)
    expected = run_plainly(model, tokenizer, reviews["test"], reviews["train"], 12)
    for row, plain in zip(result.predictions, expected, strict=True):
        assert (row["id"], row["shots"]) == (plain["id"], plain["shots"])
        assert row["generated"].strip() == plain["word"]
        assert row["correct"]["first-token"] == plain["correct"]
        assert row["predicted"]["first-token"] == (plain["word"] if plain["word"] in TASK.words else None)
        assert row["predicted"]["likelihood"] == max(row["logprobs"], key=row["logprobs"].__getitem__)
    assert result.scores["first-token"].value == sum(plain["correct"] for plain in expected) / 12


def test_a_result_holds_together_and_is_json(model: Any, layout: Any, tokenizer: Any, reviews: dict[str, str]) -> None:
    seen: list[tuple[int, int]] = []
    result = evaluate_task(
        model, layout, tokenizer, TASK, reviews["test"], reviews["train"], num_shots=4, limit="all", seed=5,
        on_progress=lambda *counts: seen.append(counts),
    )  # fmt: skip
    assert (result.num_shots, result.shot_seed, result.num_items) == (4, 5, 40)
    assert len(result.predictions) == 40
    assert all(len(row["shots"]) == 4 for row in result.predictions)
    for scoring, score in result.scores.items():
        right = [row["predicted"][scoring] == row["gold"] for row in result.predictions]
        assert right == [row["correct"][scoring] for row in result.predictions]
        assert score.value == sum(right) / 40
        assert score.low <= score.value <= score.high
        assert score.meaningful
    assert 0 < result.num_unique_tokens < result.num_tokens
    assert seen[-1] == (40, 40)
    assert result.seconds_per_item == result.seconds / 40 > 0
    assert result.notes == []
    mapping = json.loads(json.dumps(result.to_mapping(), allow_nan=False))
    assert mapping["num_items"] == len(result.predictions)
    assert mapping["contracts"]["likelihood"]["hash"] == result.contracts["likelihood"].hash
    assert mapping["scores"]["likelihood"]["num_items"] == 40


def test_the_same_questions_have_the_same_contract_under_any_model(
    model: Any, layout: Any, tokenizer: Any, reviews: dict[str, str], make_model: Callable[..., Any]
) -> None:
    def run(asked: Any, **options: Any) -> TaskResult:
        return evaluate_task(asked, layout, tokenizer, TASK, reviews["test"], reviews["train"], **options)

    first, second = (
        run(model, limit=4),
        run(make_model("llama", seed=9, vocab_size=400), limit=4, token_budget=300),
    )
    assert first.predictions != second.predictions
    assert first.contracts == second.contracts
    assert first.conditions == second.conditions
    assert run(model, limit=5).contracts["likelihood"].hash != first.contracts["likelihood"].hash


def test_shots_without_a_file_say_what_to_type(
    model: Any, layout: Any, tokenizer: Any, reviews: dict[str, str]
) -> None:
    with pytest.raises(ConfigError, match=r"--shots-from FILE or --shots 0"):
        evaluate_task(model, layout, tokenizer, TASK, reviews["test"])
    result = evaluate_task(model, layout, tokenizer, TASK, reviews["test"], num_shots=0, limit=3)
    assert all(row["shots"] == [] for row in result.predictions)


def test_too_large_a_limit_takes_all_and_says_so(
    model: Any, layout: Any, tokenizer: Any, reviews: dict[str, str]
) -> None:
    result = evaluate_task(model, layout, tokenizer, TASK, reviews["test"], num_shots=0)
    assert result.num_items == 40
    assert "500 items were asked for" in result.notes[0]


def test_a_tokenizer_that_splits_labels_is_noted_loudly(
    make_model: Callable[..., Any], layout: Any, byte_tokenizer: Any, reviews: dict[str, str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    model = make_model("llama", vocab_size=258)
    result = evaluate_task(model, layout, byte_tokenizer, TASK, reviews["test"], num_shots=0, limit=3)
    assert not result.scores["first-token"].meaningful
    assert result.scores["likelihood"].meaningful
    assert "begin with the same token" in result.notes[0]
    assert result.notes[0] in caplog.text
    unread = TASK.model_copy(update={"scorings": ["likelihood"]})
    quiet = evaluate_task(model, layout, byte_tokenizer, unread, reviews["test"], num_shots=0, limit=3)
    assert quiet.notes == []
    assert list(quiet.scores) == ["likelihood"]


def test_items_too_long_are_counted_and_the_score_is_over_the_rest(
    make_model: Callable[..., Any], layout: Any, tokenizer: Any, write: Callable[..., str]
) -> None:
    short = make_model("llama", vocab_size=400, max_position_embeddings=64)
    path = write([("1", "좋다", "1"), ("2", "나쁘다 " * 40, "0"), ("3", "", "1"), ("4", "별로", "0")])
    result = evaluate_task(short, layout, tokenizer, TASK, path, num_shots=0, limit="all")
    assert [entry.item_id for entry in result.kept_out] == ["2"]
    assert result.num_items == 2
    assert "1 rows" in result.notes[0]
    assert "1 items do not fit" in result.notes[1]
    assert "2 (" in result.notes[1]
    assert result.conditions.parts["truncation"] == "1 items kept out"
    assert result.contracts["likelihood"].parts["items"]["num"] == 2


def test_items_that_meet_their_own_answer_are_noted(
    model: Any, layout: Any, tokenizer: Any, reviews: dict[str, str]
) -> None:
    result = evaluate_task(model, layout, tokenizer, TASK, reviews["test"], reviews["test"], limit="all")
    own = sum(row["id"] in row["shots"] for row in result.predictions)
    assert own > 0
    assert result.notes[0].startswith(f"{own} items stand among their own shots")


def test_likelihoods_are_divided_as_the_task_has_it() -> None:
    task = TASK.model_copy(update={"labels": {"0": " 부정", "1": " 긍정적임"}})
    score = ItemScore((-6.0, -8.0), (2, 4), 0)
    assert normalise_logprobs(task, score) == [-6.0, -8.0]
    assert normalise_logprobs(task.model_copy(update={"normalisation": "per-token"}), score) == [-3.0, -2.0]
    assert normalise_logprobs(task.model_copy(update={"normalisation": "per-character"}), score) == [
        -3.0,
        -2.0,
    ]


@pytest.mark.skipif(not NSMC.is_dir(), reason="the real NSMC files are not beside the repository")
def test_real_reviews_are_asked_as_the_notebook_asks_them(model: Any, layout: Any, tokenizer: Any) -> None:
    data, source = str(NSMC / "test.tsv"), str(NSMC / "validation.tsv")
    result = evaluate_task(model, layout, tokenizer, TASK, data, source, limit=20)
    expected = run_plainly(model, tokenizer, data, source, 20)
    assert [row["id"] for row in result.predictions] == [plain["id"] for plain in expected]
    assert [row["shots"] for row in result.predictions] == [plain["shots"] for plain in expected]
    assert [row["generated"].strip() for row in result.predictions] == [plain["word"] for plain in expected]
