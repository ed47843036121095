"""Comparing: who may be ranked, by which test, and what is refused with which words."""

from __future__ import annotations

import csv
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

import koat
from koat.core.config_files import dump_yaml
from koat.core.json_lines import read_lines
from koat.evaluation.contract import Parts
from koat.report.comparison import list_notes
from koat.workflows.comparing.compare import compare_targets
from tests.tiny_base import call_koat
from tests.workflows.scored_folders import CONDITIONS, make_answers, write_run, write_scores

BETTER = make_answers(300, range(0, 300, 10))  # 30 wrong
WORSE = make_answers(300, range(0, 300, 4))  # 75 wrong, 15 of them common
LIKE = make_answers(300, [*range(5, 300, 10), 1])  # 31 wrong, none of them common with BETTER


def compare(*targets: Path | str, only: tuple[str, ...] = ()) -> dict[str, Any]:
    return compare_targets([str(target) for target in targets], only)


# What is compared ----------------------------------------------------------------------------------------------


def test_two_runs_are_paired_by_item(tmp_path: Path) -> None:
    found = compare(write_run(tmp_path / "a", WORSE), write_run(tmp_path / "b", BETTER, rate=0.02))
    (comparison,) = found["comparisons"]
    # 60 items only the better one answers right, 15 only the worse.
    assert (comparison["only_left"], comparison["only_right"]) == (15, 60)
    assert comparison["p"] == comparison["p_holm"] == pytest.approx(stats.binomtest(15, 75).pvalue)
    assert comparison["value"] == pytest.approx(45 / 300)
    assert comparison["better"] == "b"
    assert comparison["test"] == "exact McNemar"
    assert found["refusals"] == []
    assert found["correction"] == {"method": "Holm", "num_comparisons": 1, "alpha": 0.05}
    json.dumps(found)


def test_the_order_of_predictions_does_not_matter(tmp_path: Path) -> None:
    first = compare(write_scores(tmp_path / "a", WORSE), write_scores(tmp_path / "b", BETTER))
    lines = (tmp_path / "b" / "reviews.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "b" / "reviews.jsonl").write_text("\n".join(reversed(lines)) + "\n", encoding="utf-8")
    assert compare(tmp_path / "a", tmp_path / "b")["comparisons"] == first["comparisons"]


def test_what_is_alike_cannot_be_told_apart(tmp_path: Path) -> None:
    status, out, _ = call_koat("compare", write_scores(tmp_path / "a", BETTER), write_scores(tmp_path / "b", LIKE))
    assert status == 0
    text = " ".join(out.split())
    assert re.search(r"a and b cannot be told apart with 300 items \(.*\): about [\d,]+ would be needed\.", text)
    assert "300 items would have shown a difference of" in text


def test_holm_runs_over_all_comparisons(tmp_path: Path) -> None:
    folders = [write_scores(tmp_path / name, each) for name, each in (("a", WORSE), ("b", BETTER), ("c", LIKE))]
    for folder, answers in zip(folders, (WORSE, BETTER, LIKE), strict=True):
        write_scores(folder, answers, task="other")
    found = compare(*folders)
    assert found["correction"]["num_comparisons"] == len(found["comparisons"]) == 6
    raw = sorted(comparison["p"] for comparison in found["comparisons"])
    least = min(found["comparisons"], key=lambda each: each["p"])
    assert least["p_holm"] == pytest.approx(6 * raw[0])
    assert all(each["p_holm"] >= each["p"] for each in found["comparisons"])


def name_contexts(folder: Path) -> Path:
    """Write into predictions that every five in a row are on one text, as `context-qa` does."""
    rows = read_lines(folder / "reviews.jsonl")
    lines = [json.dumps({**row, "context": f"text {number // 5:03}"}) for number, row in enumerate(rows)]
    (folder / "reviews.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_questions_on_one_text_count_as_one_draw(tmp_path: Path) -> None:
    # Right and wrong by whole texts: the worse one fails at 18 of 60, the better one at 6.
    worse, better = (make_answers(300, [n for n in range(300) if n // 5 in range(0, 60, step)]) for step in (3, 10))
    folders = [write_scores(tmp_path / name, each) for name, each in (("a", worse), ("b", better))]
    (plain,) = compare(*folders)["comparisons"]
    assert plain["test"] == "exact McNemar"
    (found,) = compare(name_contexts(folders[0]), name_contexts(folders[1]))["comparisons"]
    assert found["test"] == "paired bootstrap over texts"
    names = ("value", "num_items", "only_left", "only_right")
    assert [found[name] for name in names] == [plain[name] for name in names]
    # As draws of their own, five questions a text make the interval look shorter by about the root of five.
    assert (found["high"] - found["low"]) / (plain["high"] - plain["low"]) == pytest.approx(5**0.5, rel=0.1)
    assert "over texts" in " ".join(call_koat("compare", *folders)[1].split())
    older = write_scores(tmp_path / "older", worse)  # before texts were kept: the items are the same
    for pair in ((older, folders[1]), (folders[1], older)):
        (again,) = compare(*pair)["comparisons"]
        assert again["test"] == found["test"] and again["p"] == found["p"]


def test_values_between_zero_and_one_are_bootstrapped(tmp_path: Path) -> None:
    left = {str(n): (n % 7) / 7 for n in range(120)}
    right = {name: min(1.0, value + 0.05 * (int(name) % 3)) for name, value in left.items()}
    parts = {"metric": "f1"}
    found = compare(
        write_scores(tmp_path / "a", left, scoring="generated", contract=parts),
        write_scores(tmp_path / "b", right, scoring="generated", contract=parts),
    )
    (comparison,) = found["comparisons"]
    assert comparison["test"] == "paired bootstrap"
    assert comparison["better"] == "b"
    assert comparison["value"] == pytest.approx(sum(right.values()) / 120 - sum(left.values()) / 120)


def test_runs_that_differ_in_their_seed_are_one_subject(tmp_path: Path) -> None:
    seeds = []
    for seed in range(3):  # 25 items that all get wrong, and 5 of each seed's own
        wrong = [*range(0, 300, 12), *range(1 + seed, 120, 24)]
        seeds.append(write_run(tmp_path / f"ia3-{seed}", make_answers(300, wrong), seed=seed))
    other = write_run(tmp_path / "lora", WORSE, rate=0.5, seed=1)
    found = compare(*seeds, other)
    assert [subject["name"] for subject in found["subjects"]] == ["ia3-0 (3 seeds)", "lora"]
    assert found["subjects"][0]["seeds"] == [0, 1, 2]
    row = found["columns"][0]["rows"][0]
    # Every seed is right on 270 of 300: nothing observed between them, and binomial spread over items.
    assert row["values"] == [0.9, 0.9, 0.9]
    assert row["spread"]["observed"] == pytest.approx(0)
    assert row["spread"]["over_items"] == pytest.approx((0.09 / 300) ** 0.5, rel=0.01)
    (comparison,) = found["comparisons"]
    assert comparison["test"].startswith("t test")
    assert comparison["better"] == "ia3-0 (3 seeds)"
    assert comparison["seeds"] == [3, 1]


def test_a_run_of_one_seed_is_less_sure_than_a_base_with_the_same_answers(tmp_path: Path) -> None:
    """A base has no seed; a method of one seed is taken to spread over seeds as the other does."""
    wrong = [range(0, 300, 10), range(0, 300, 9), range(0, 300, 8)]  # 30, 34 and 38 of 300; the others 75
    runs = [write_run(tmp_path / f"ia3-{seed}", make_answers(300, each), seed=seed) for seed, each in enumerate(wrong)]
    base, lora = write_scores(tmp_path / "base", WORSE), write_run(tmp_path / "lora", WORSE, rate=0.5, seed=1)
    for place in (0, 3):  # whichever side stands first
        found = [compare(*runs[:place], other, *runs[place:])["comparisons"] for other in (base, lora)]
        (against_base,), (against_lora,) = found
        assert against_base["value"] == pytest.approx(against_lora["value"])
        assert 0 < against_base["p"] < 0.7 * against_lora["p"]
        assert against_base["high"] - against_base["low"] < 0.9 * (against_lora["high"] - against_lora["low"])


def test_what_one_seed_cannot_say_is_said(tmp_path: Path) -> None:
    base = write_scores(tmp_path / "base", WORSE)
    runs = [write_run(tmp_path / f"ia3-{seed}", BETTER, seed=seed) for seed in range(2)]
    lora = write_run(tmp_path / "lora", WORSE, rate=0.5, seed=1)

    def note(*targets: Path) -> list[str]:
        return [each for each in list_notes(compare(*targets)) if "one seed" in each]

    assert note(base, *runs) == []
    assert note(base, runs[0])[0].startswith("trained with one seed: ia3-0. ")
    assert note(lora, *runs)[0].startswith("trained with one seed: lora. ")
    assert any(
        each.startswith("시드 하나로 학습한 대상: ia3-0, lora. ") for each in list_notes(compare(runs[0], lora), "ko")
    )


def test_seeds_that_were_asked_differently_are_named(tmp_path: Path) -> None:
    one = write_run(tmp_path / "ia3-0", BETTER, seed=0)
    other = write_run(tmp_path / "ia3-1", BETTER, seed=1, conditions={"precision": "bfloat16"})
    found = compare(one, other, write_scores(tmp_path / "base", WORSE))
    assert found["comparisons"][0]["conditions"] == {"precision": "bfloat16 against float32: another precision"}
    notes = list_notes(found)
    assert "ia3-0 (2 seeds): its seeds were asked under different conditions (" in "\n".join(notes)


def test_seeds_with_one_item_are_no_proof_and_no_crash(tmp_path: Path) -> None:
    seeds = [write_run(tmp_path / f"ia3-{seed}", {"0": True}, seed=seed) for seed in range(3)]
    status, out, error = call_koat("compare", *seeds, write_run(tmp_path / "lora", {"0": False}, rate=0.5))
    assert status == 0, error
    assert "cannot be told apart with 1 items (-100.0 to 100.0 points" in " ".join(out.split())


def test_one_answer_that_is_a_share_proves_nothing(tmp_path: Path) -> None:
    folders = [
        write_scores(tmp_path / name, {"0": value}, scoring="generated", contract={"metric": "f1"})
        for name, value in (("a", 0.5), ("b", 0.8))
    ]
    (comparison,) = compare(*folders)["comparisons"]
    assert (comparison["better"], comparison["unsure"], comparison["p"]) == (None, None, 1)
    assert (comparison["low"], comparison["high"]) == (-1, 1)


def test_names_are_printed_as_they_are(tmp_path: Path) -> None:
    """Names that a terminal's markup would take for itself, in the table and in the sentences."""
    folders = [write_scores(tmp_path / name, WORSE) for name in ("lora[r=8]", "b[", "x:cat:")]
    status, out, error = call_koat("compare", *folders)
    assert status == 0, error
    for name in ("lora[r=8]", "b[", "x:cat:"):
        assert len([line for line in out.splitlines() if name in line]) >= 3, name


def test_equal_seeds_of_equal_settings_stay_apart(tmp_path: Path) -> None:
    found = compare(write_run(tmp_path / "a", BETTER), write_run(tmp_path / "b", LIKE))
    assert [subject["name"] for subject in found["subjects"]] == ["a", "b"]


def test_conditions_may_differ_and_are_shown(tmp_path: Path) -> None:
    found = compare(
        write_scores(tmp_path / "a", WORSE), write_scores(tmp_path / "b", BETTER, conditions={"template": "koalpaca"})
    )
    (comparison,) = found["comparisons"]
    assert comparison["better"] == "b"
    assert comparison["conditions"] == {"template": "none against koalpaca: another template around the prompt"}


def test_choices_are_judged(tmp_path: Path) -> None:
    found = compare(write_scores(tmp_path / "a", WORSE), write_scores(tmp_path / "b", BETTER))
    worse, better = found["columns"][0]["rows"]
    # All answers have a probability of 0.8; 75 % and 90 % are right.
    assert worse["calibration"]["error"] == pytest.approx(0.05)
    assert better["calibration"]["error"] == pytest.approx(0.10)
    assert worse["label_bias"]["distance"] == pytest.approx(0.25)


def test_real_evaluations_are_compared(finished: Path, place: Path, tmp_path: Path) -> None:
    words = ("비가", "눈이", "해가")
    lines = [f"{n}\t{words[n % 3]} {n}\t{n % 2}" for n in range(12)]
    (tmp_path / "test.tsv").write_text("\n".join(["id\tdocument\tlabel", *lines]) + "\n", encoding="utf-8")
    options: tuple[object, ...] = (
        "--task",
        "nsmc-prompt1",
        "--data",
        tmp_path / "test.tsv",
        "--shots",
        0,
        "--limit",
        "all",
    )
    for target, out in ((finished, "run"), (place / "base", "base")):
        status, _, error = call_koat("eval", target, *options, "--out", tmp_path / out)
        assert status == 0, error
    found = compare(tmp_path / "run", tmp_path / "base")
    assert [(each["task"], each["scoring"], each["num_items"]) for each in found["comparisons"]] == [
        ("nsmc-prompt1", "likelihood", 12),
    ]
    # The tiny tokenizer begins both answer words with the same token.
    (refusal,) = found["refusals"]
    assert (refusal["task"], refusal["scoring"], refusal["parts"]) == ("nsmc-prompt1", "first-token", ["scoring"])
    assert refusal["reasons"][0].endswith(": first tokens cannot tell the answer words apart in its tokenizer")
    assert all(each["paired"] and each["conditions"] == {} for each in found["comparisons"])


# Published counts ----------------------------------------------------------------------------------------------


def test_kgoats_table_says_what_500_items_tell_apart() -> None:
    found = compare("kgoat", only=("KoAlpaca", "K(G)OAT"))
    first, second = found["comparisons"]
    assert first["p"] == pytest.approx(stats.chi2_contingency([[332, 168], [356, 144]], correction=False).pvalue)
    assert (first["better"], first["unsure"]) == (None, None)
    # One of two comparisons: (2.241403 + 0.841621)^2 where one alone has (1.959964 + 0.841621)^2 and needs 1,462.
    assert first["needed"] == pytest.approx(1462 * (3.083024 / 2.801585) ** 2, rel=1e-3)
    assert second["better"] == "K(G)OAT"
    assert second["p_holm"] == pytest.approx(2 * second["p"])
    assert not first["paired"] and not second["paired"]
    assert first["smallest"] == pytest.approx(0.086 * 3.083024 / 2.801585, abs=0.002)


def test_kgoats_whole_table_is_less_sure_of_it() -> None:
    status, out, _ = call_koat("compare", "kgoat")
    assert status == 0
    text = " ".join(out.split())
    assert "KoAlpaca and K(G)OAT cannot be told apart with 500 items" in text
    assert "about 2,300 would be needed" in text
    # 0.748 against 0.810: p = 0.018 alone; as the largest but one of six corrected p-values it is 0.052.
    assert re.search(
        r"K\(G\)OAT looks better than KoAlpaca by .* p = 0\.018\), but as one of 6 .*Holm p = 0\.052", text
    )
    assert "unpaired" in text


def write_table(path: Path, *scores: dict[str, Any]) -> Path:
    path.write_text(dump_yaml({"title": "made up", "source": "made up for this test", "scores": list(scores)}), "utf-8")
    return path


# A3Duck set its own `acc` and `mc1` beside others' `acc_norm` and `mc2`. The values here are made up.
OURS = [
    {"name": "A3Duck", "task": "arc_challenge", "metric": "acc", "shots": 25, "items": 1172, "value": 0.51},
    {"name": "A3Duck", "task": "truthfulqa", "metric": "mc1", "shots": 0, "items": 817, "value": 0.31},
]
THEIRS = [
    {"name": "others", "task": "arc_challenge", "metric": "acc_norm", "shots": 25, "items": 1172, "value": 0.55},
    {"name": "others", "task": "truthfulqa", "metric": "mc2", "shots": 0, "items": 817, "value": 0.4412},
]


def test_a3ducks_table_is_refused_with_the_reason(tmp_path: Path) -> None:
    ours, theirs = write_table(tmp_path / "ours.yaml", *OURS), write_table(tmp_path / "theirs.yaml", *THEIRS)
    status, out, error = call_koat("compare", ours, theirs)
    assert status == 2
    assert out == ""
    assert "nothing here may be ranked" in error
    assert "A3Duck and others, arc_challenge: acc against acc_norm: another metric" in error
    assert "A3Duck and others, truthfulqa: mc1 against mc2: another metric" in error


def test_what_is_alike_is_compared_beside_what_is_refused(tmp_path: Path) -> None:
    more = {"task": "arc_challenge", "metric": "acc", "shots": 25, "items": 1172, "value": 0.49, "name": "others"}
    found = compare(write_table(tmp_path / "ours.yaml", *OURS), write_table(tmp_path / "theirs.yaml", *THEIRS, more))
    assert [(each["task"], each["scoring"]) for each in found["comparisons"]] == [("arc_challenge", "acc")]
    assert [each["task"] for each in found["refusals"]] == ["truthfulqa"]
    assert found["refusals"][0]["parts"] == ["metric"]


def test_a_mean_of_probabilities_is_said_to_be_one(tmp_path: Path) -> None:
    other = {**THEIRS[1], "name": "third", "value": 0.40}
    found = compare(write_table(tmp_path / "all.yaml", THEIRS[1], other))
    assert any("mc2 is a mean of values" in note for note in list_notes(found))
    assert any("mc2: 맞힌 문항의 비율이 아니라" in note for note in list_notes(found, "ko"))


def test_counts_and_rates_are_the_same_thing(tmp_path: Path) -> None:
    rows = [
        {"name": "a", "task": "t", "metric": "acc", "items": 500},
        {"name": "b", "task": "t", "metric": "acc", "items": 500},
    ]
    rates = write_table(tmp_path / "rates.yaml", {**rows[0], "value": 0.664}, {**rows[1], "value": 0.712})
    counts = tmp_path / "counts.json"
    content = {"title": "x", "source": "y", "scores": [{**rows[0], "right": 332}, {**rows[1], "right": 356}]}
    counts.write_text(json.dumps(content), encoding="utf-8")
    assert compare(rates)["comparisons"] == compare(counts)["comparisons"]


def test_published_tables_do_not_say_which_items(tmp_path: Path) -> None:
    ours = write_scores(tmp_path / "mine", make_answers(500, range(100)), task="nsmc-prompt1")
    with pytest.raises(koat.DataError, match="other items: one of the two does not say which"):
        compare("kgoat", ours, only=("KoAlpaca", "mine"))


def test_shots_that_differ_are_named(tmp_path: Path) -> None:
    other = {**OURS[0], "name": "others", "shots": 0}
    with pytest.raises(koat.DataError, match="25 against 0: other shots"):
        compare(write_table(tmp_path / "all.yaml", OURS[0], other))


# Refusals and bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("metric", "acc_norm", "accuracy against acc_norm: another metric"),
        ("shots", {"num": 5}, "0 against 5: other shots"),
        ("normalisation", "per-token", "none against per-token: another normalisation"),
        ("prompt", {"source": "Q: {text}\nAnswer:", "clean": {}}, "another prompt"),
        ("labels", {"0": " no", "1": " aye"}, "1 ' yes' against ' aye': other answer words"),
    ],
)
def test_different_contracts_are_refused_by_the_part(tmp_path: Path, part: str, value: Any, words: str) -> None:
    left = write_scores(tmp_path / "a", WORSE)
    right = write_scores(tmp_path / "b", BETTER, contract={part: value})
    with pytest.raises(koat.DataError, match=re.escape(words)):
        compare(left, right)


def test_no_items_in_common(tmp_path: Path) -> None:
    others = {f"x{name}": value for name, value in BETTER.items()}
    status, _, error = call_koat("compare", write_scores(tmp_path / "a", BETTER), write_scores(tmp_path / "b", others))
    assert status == 2
    assert "other items, none of them in common" in error
    fewer = write_scores(tmp_path / "c", dict(list(BETTER.items())[:100]))
    with pytest.raises(koat.DataError, match="300 against 100: other items, 100 of them in common"):
        compare(tmp_path / "a", fewer)
    # Rows of another file, under the same numbers.
    path = fewer / "reviews.jsonl"
    rows = [{**row, "text": f"another file's {row['id']}"} for row in read_lines(path)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(koat.DataError, match="other items, none of them in common"):
        compare(tmp_path / "a", fewer)


def test_no_task_in_common(tmp_path: Path) -> None:
    left, right = write_scores(tmp_path / "a", BETTER), write_scores(tmp_path / "b", BETTER, task="other")
    with pytest.raises(koat.DataError, match=r"no task .* in common \(a: reviews; b: other\)"):
        compare(left, right)


def test_a_run_without_predictions(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", BETTER)
    other = write_run(tmp_path / "b", WORSE, rate=0.02)
    (run / "predictions" / "reviews.jsonl").unlink()
    with pytest.raises(koat.DataError, match="its predictions are not beside it"):
        compare(run, other)
    (run / "predictions" / "reviews.scores.json").unlink()
    status, _, error = call_koat("compare", run, other)
    assert status == 2
    assert "holds no scores" in error and f"koat eval {run}" in error


def test_predictions_of_another_evaluation_are_not_taken(tmp_path: Path) -> None:
    left, right = write_scores(tmp_path / "a", BETTER), write_scores(tmp_path / "b", WORSE)
    kept = (left / "reviews.scores.json").read_text(encoding="utf-8")
    write_scores(left, make_answers(300, range(7)))  # the same contract, other answers
    (left / "reviews.scores.json").write_text(kept, encoding="utf-8")
    with pytest.raises(koat.DataError, match=r"it is 0\.9000, but the mean of its predictions is 0\.97"):
        compare(left, right)


def write_at(folder: Path, answers: dict[str, bool], precision: str) -> None:
    """Write an evaluation whose predictions say under which conditions they were made."""
    conditions = Parts({**CONDITIONS, "precision": precision})
    write_scores(folder, answers, conditions=conditions.parts)
    rows = [{**row, "conditions": conditions.hash} for row in read_lines(folder / "reviews.jsonl")]
    (folder / "reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_the_latest_evaluation_counts(tmp_path: Path) -> None:
    """Both stand whole, each with its own predictions; the earlier one's name is the last."""
    left, right = tmp_path / "a", write_scores(tmp_path / "b", WORSE)
    write_at(left, BETTER, "float32")
    for end in ("scores.json", "jsonl"):
        os.replace(left / f"reviews.{end}", left / f"viewed.{end}")
        os.utime(left / f"viewed.{end}", (1, 1))
    write_at(left, LIKE, "bfloat16")
    for target, right_answers in ((left / "viewed.scores.json", 270), (left, 269)):
        found = compare(target, right)
        assert found["columns"][0]["rows"][0]["value"] == pytest.approx(right_answers / 300)
        assert found["notes"] == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"scores": [{**OURS[0], "value": 51.0}]}, r"value.*51"),
        ({"scores": [{**OURS[0], "metrics": "acc"}]}, r"did you mean '.*metric'"),
        ({"scores": [{key: value for key, value in OURS[0].items() if key != "metric"}]}, "metric"),
        ({"scores": [{**OURS[0], "right": 5}]}, "either `value`"),
        ({"scores": [OURS[0], OURS[0]]}, "two scores"),
        ({"scores": []}, "scores"),
    ],
)
def test_published_tables_are_checked(tmp_path: Path, content: dict[str, Any], words: str) -> None:
    path = tmp_path / "table.yaml"
    path.write_text(dump_yaml({"title": "made up", "source": "made up", **content}), encoding="utf-8")
    with pytest.raises(koat.ConfigError, match=words):
        compare(path, "kgoat")


def test_names_that_are_not_there(tmp_path: Path) -> None:
    write_scores(tmp_path / "nano", BETTER)
    with pytest.raises(koat.ConfigError, match="did you mean 'nano'"):
        compare(tmp_path / "nanno", "kgoat")
    with pytest.raises(koat.ConfigError, match="did you mean 'kgoat'"):
        compare("kgoats")
    with pytest.raises(koat.ConfigError, match="there is no such file"):
        compare(tmp_path / "table.yaml")
    with pytest.raises(koat.ConfigError, match=r"called 'KoAlpacca' \(did you mean 'KoAlpaca'"):
        compare("kgoat", only=("KoAlpacca",))
    (tmp_path / "bad.scores.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(koat.RunFolderError, match="not a file of scores"):
        compare(tmp_path / "bad.scores.json")
    (tmp_path / "torn.scores.json").write_text('{"subject": ', encoding="utf-8")
    with pytest.raises(koat.RunFolderError, match="cannot be read as JSON"):
        compare(tmp_path / "torn.scores.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(koat.RunFolderError, match="holds no scores"):
        compare(tmp_path / "empty")


def test_only_what_is_named_on_the_command_line_is_compared(tmp_path: Path) -> None:
    folders = [write_scores(tmp_path / name, answers) for name, answers in (("a", BETTER), ("b", WORSE), ("c", LIKE))]
    status, out, error = call_koat("compare", *folders, "--only", "a", "--only", "c", "--json")
    assert status == 0, error
    found = json.loads(out)
    assert [subject["name"] for subject in found["subjects"]] == ["a", "c"]
    assert [(each["left"], each["right"]) for each in found["comparisons"]] == [("a", "c")]


def test_one_subject_is_no_comparison(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", BETTER)
    with pytest.raises(koat.DataError, match="needs two subjects"):
        compare(first)
    with pytest.raises(koat.DataError, match="named twice"):
        compare(first, first)
    with pytest.raises(koat.DataError, match="their seed are one subject"):
        compare(first, write_run(tmp_path / "b", WORSE, seed=1))


# Files ---------------------------------------------------------------------------------------------------------


def test_csv_markdown_and_json_hold_the_same(tmp_path: Path) -> None:
    folders = [write_scores(tmp_path / name, each) for name, each in (("a", WORSE), ("b", BETTER))]
    write_scores(tmp_path / "b", BETTER, task="other", contract={"metric": "acc_norm"})
    write_scores(tmp_path / "a", WORSE, task="other", contract={"metric": "acc"})
    files = (tmp_path / "out.csv", tmp_path / "out.md")
    status, out, error = call_koat("compare", *folders, "--csv", files[0], "--markdown", files[1], "--json")
    assert status == 0, error
    (comparison,) = json.loads(out)["comparisons"]
    with files[0].open(encoding="utf-8", newline="") as file:
        ranked, refused = csv.DictReader(file)
    assert float(ranked["p_holm"]) == comparison["p_holm"]
    assert ranked["better"] == "b"
    assert refused["test"] == "refused" and "acc against acc_norm" in refused["sentence"]
    text = files[1].read_text(encoding="utf-8")
    assert ranked["sentence"] in text and refused["sentence"] in text
    assert "| b | 90.0 % (" in text


def test_what_is_no_share_is_left_out_and_said(tmp_path: Path) -> None:
    """lm-eval's BLEU lies between 0 and 100: intervals, points and scales here are those of shares."""
    answers = {str(number): float(number % 2) for number in range(40)}
    for name in ("A", "B"):
        write_scores(tmp_path / name, answers)
        write_scores(
            tmp_path / name, {key: 20.0 + value for key, value in answers.items()}, task="bleu", scoring="bleu"
        )
    found = compare_targets([str(tmp_path / "A"), str(tmp_path / "B")])
    assert [column["task"] for column in found["columns"]] == ["reviews"]
    assert any("bleu" in note and "no share between 0 and 1" in note for note in found["notes"])
