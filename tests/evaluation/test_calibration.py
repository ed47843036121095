"""Calibration and label bias on cases worked by hand."""

from __future__ import annotations

from math import exp, log
from typing import Any

import numpy as np
import pytest

from koat.evaluation.calibration import describe_choices, measure_calibration, measure_label_bias, to_probabilities


def test_calibration_worked_by_hand() -> None:
    # Confidences 0.95 (right), 0.91 (wrong), 0.65 (right), 0.62 (right), 0.55 (wrong).
    # (0.9, 1]: 2 items, sure 0.93, right 0.5. (0.6, 0.7]: 2 items, sure 0.635, right 1. (0.5, 0.6]: sure 0.55, right 0.
    # ECE = 0.4 * 0.43 + 0.4 * 0.365 + 0.2 * 0.55 = 0.428; overconfident by 0.4 * 0.43 - 0.4 * 0.365 + 0.2 * 0.55.
    sure = [0.95, 0.91, 0.65, 0.62, 0.55]
    found = measure_calibration([[value, 1 - value] for value in sure], [0, 1, 0, 0, 1])
    assert found.error == pytest.approx(0.428)
    assert found.overconfidence == pytest.approx(0.136)
    assert [(entry.num_items, round(entry.low, 9)) for entry in found.bins] == [(1, 0.5), (2, 0.6), (2, 0.9)]


def test_a_bin_holds_its_upper_end() -> None:
    found = measure_calibration([[0.7, 0.3], [1.0, 0.0]], [0, 0])
    assert [(entry.low, entry.high) for entry in found.bins] == [(0.6, 0.7), (0.9, 1.0)]


def test_calibrated_answers_have_a_small_error() -> None:
    rng = np.random.default_rng(0)
    sure = rng.uniform(0.5, 1.0, 20_000)
    gold = (rng.uniform(size=20_000) > sure).astype(int).tolist()
    choices = [[value, 1 - value] for value in sure.tolist()]
    assert measure_calibration(choices, gold).error < 0.01
    always = [[0.99, 0.01]] * 20_000
    assert measure_calibration(always, gold).error == pytest.approx(0.99 - 1 + np.mean(gold), abs=1e-9)


def test_probabilities_of_choices() -> None:
    assert to_probabilities([log(0.02), log(0.06)]) == pytest.approx([0.25, 0.75])
    assert to_probabilities([-4000.0, -4000.0]) == [0.5, 0.5]


def test_label_bias_worked_by_hand() -> None:
    # Gold half and half; 8 of 10 answers say a, 1 says b, 1 says nothing: half of (0.3 + 0.4 + 0.1).
    found = measure_label_bias(["a"] * 8 + ["b", None], ["a", "b"] * 5)
    assert found.predicted == {"a": 0.8, "b": 0.1, "none": 0.1}
    assert found.gold == {"a": 0.5, "b": 0.5, "none": 0.0}
    assert found.distance == pytest.approx(0.4)


def make_row(gold: str, logprobs: dict[str, float], num_tokens: dict[str, int]) -> dict[str, Any]:
    return {"gold": gold, "logprobs": logprobs, "num_tokens": num_tokens, "predicted": {"likelihood": gold}}


def test_kept_predictions_are_judged_by_what_ranked_them() -> None:
    rows = [make_row("yes", {"yes": -4.0, "no": -3.0}, {"yes": 4, "no": 1})]
    plain = describe_choices(rows, "likelihood", {"normalisation": "none"})["calibration"]
    assert plain["bins"][0]["confidence"] == pytest.approx(1 / (1 + exp(-1)))
    assert plain["bins"][0]["accuracy"] == 0
    per_token = describe_choices(rows, "likelihood", {"normalisation": "per-token"})["calibration"]
    assert per_token["bins"][0]["confidence"] == pytest.approx(1 / (1 + exp(-2)))
    assert per_token["bins"][0]["accuracy"] == 1
    per_character = describe_choices(rows, "likelihood", {"normalisation": "per-character"})["calibration"]
    assert per_character["bins"][0]["confidence"] == pytest.approx(1 / (1 + exp(-(3 / 2 - 4 / 3))))
    korean = [make_row("예", {"예": -3.0, "no": -3.0}, {})]
    per_byte = describe_choices(korean, "likelihood", {"normalisation": "per-byte"})["calibration"]
    assert per_byte["bins"][0]["confidence"] == pytest.approx(1 / (1 + exp(-(3 / 2 - 3 / 3))))
    # What mutual information takes off an answer is not kept with it.
    assert "calibration" not in describe_choices(korean, "likelihood", {"normalisation": "mutual information"})


def test_choices_that_differ_by_item_have_no_label_bias() -> None:
    rows = [make_row("a", {"a": -1.0, "b": -2.0}, {}), make_row("c", {"c": -1.0, "d": -2.0}, {})]
    assert list(describe_choices(rows, "likelihood", {})) == ["calibration"]
    assert list(describe_choices(rows[:1], "likelihood", {})) == ["calibration", "label_bias"]
    assert list(describe_choices(rows[:1], "likelihood", {"scoring": "first-token"})) == ["label_bias"]
    assert describe_choices([{"gold": "a"}], "likelihood", {}) == {}
    assert describe_choices([], "likelihood", {}) == {}


def test_no_items_are_a_bug() -> None:
    with pytest.raises(ValueError, match="0 items"):
        measure_calibration([], [])
    with pytest.raises(ValueError, match="0 answers"):
        measure_label_bias([], [])
