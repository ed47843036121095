"""Questions on shared texts: intervals and tests that take texts as draws, against formulas and by simulation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import t

from koat.evaluation.metrics import score_values, wilson_interval
from koat.evaluation.significance import (
    compare_answers,
    compare_seeds,
    compare_values,
    find_least_error,
    newcombe_paired,
)
from koat.evaluation.spread import measure_spread
from koat.evaluation.texts import has_shared_texts, join_by_text


def draw_texts(sizes: list[int]) -> list[str]:
    return [f"text {number:03}" for number, size in enumerate(sizes) for _ in range(size)]


def draw_answers(
    rng: np.random.Generator, num_texts: int, num_questions: int, gap: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Return two models' answers, right or wrong, to questions on texts; how far they differ is the text's."""
    lean = rng.normal(0, 0.25, (num_texts, 1))
    shares = [np.clip(0.5 + sign * lean + side * gap, 0.02, 0.98) for side, sign in ((0, -1), (1, 1))]
    left, right = (rng.uniform(size=(num_texts, num_questions)) < share for share in shares)
    return left.ravel().astype(float), right.ravel().astype(float)


def test_values_on_texts_of_their_own_stay_as_they_are() -> None:
    values = np.array([0.5, 1.0, 0.0])
    for texts in (None, ["a", "b", "c"], ["a", "a", "a"]):
        assert not has_shared_texts(texts)
        assert join_by_text(values, texts).tolist() == values.tolist()


def test_the_mean_is_that_of_all_questions_and_the_error_the_jackknifes() -> None:
    rng = np.random.default_rng(0)
    sizes = [1, 7, 3, 12, 2, 5]
    values, texts = rng.uniform(size=sum(sizes)), draw_texts(sizes)
    joined = join_by_text(values, texts)
    assert len(joined) == len(sizes) and joined.mean() == pytest.approx(values.mean())
    # Efron and Tibshirani (1993), equation 11.5: (n - 1) / n times the sum of squares of the means without one text.
    without = np.array([values[np.array(texts) != name].mean() for name in dict.fromkeys(texts)])
    expected = (len(sizes) - 1) / len(sizes) * ((without - without.mean()) ** 2).sum()
    assert joined.var(ddof=1) / len(joined) == pytest.approx(expected)


def test_of_texts_with_as_many_questions_each_has_its_own_mean() -> None:
    values = np.random.default_rng(1).uniform(size=(2, 5, 4))
    joined = join_by_text(values.reshape(2, 20), draw_texts([4] * 5))
    np.testing.assert_allclose(joined, values.mean(-1))


def test_a_text_with_most_of_the_questions_makes_no_difference_sure() -> None:
    rng, texts, told_apart = np.random.default_rng(6), draw_texts([50, *[1] * 11]), []
    for _ in range(200):
        lean = rng.normal(0, 0.3, 12)
        difference = np.repeat(lean, [50, *[1] * 11]) + rng.normal(0, 0.4, 61)
        told_apart.append(compare_values(np.zeros(61), difference, texts).p < 0.05)
    assert np.mean(told_apart) < 0.2, "linearised, the large text's own residual is nothing: 0.7"


@pytest.mark.parametrize("num_texts", [12, 80])
def test_the_same_answer_given_again_to_every_question_tells_nothing_new(num_texts: int) -> None:
    """Each question asked five times: intervals, p-values and power stay those of the questions asked once."""
    rng = np.random.default_rng(1)
    once = [rng.uniform(size=num_texts) for _ in range(2)]
    again, texts = [np.repeat(values, 5) for values in once], draw_texts([5] * num_texts)
    expected, found = compare_values(*once), compare_values(*again, texts)
    assert (found.value, found.low, found.high, found.p) == pytest.approx(
        (expected.value, expected.low, expected.high, expected.p)
    )
    assert found.test == f"{expected.test} over texts"
    assert found.find_smallest() == pytest.approx(expected.find_smallest())
    assert compare_values(*again).p < expected.p, "as draws of their own they would seem to tell more"


def test_seeds_on_repeated_questions_tell_nothing_new() -> None:
    rng = np.random.default_rng(2)
    once = [rng.uniform(size=(3, 40)) + rng.normal(0, 0.01, (3, 1)) for _ in range(2)]
    again, texts = [np.repeat(values, 4, axis=1) for values in once], draw_texts([4] * 40)
    expected, found = compare_seeds(*once), compare_seeds(*again, texts=texts)
    assert found.test == "t test over seeds and texts"
    assert (found.low, found.high, found.p) == pytest.approx((expected.low, expected.high, expected.p))
    assert found.find_smallest() == pytest.approx(expected.find_smallest(), rel=0.03)
    assert compare_seeds(*again).p != pytest.approx(found.p)
    wide, plain = measure_spread(again[0], texts), measure_spread(once[0])
    assert (wide.low, wide.high, wide.over_items) == pytest.approx((plain.low, plain.high, plain.over_items))
    assert wide.num_items == 160 and wide.over_items > 1.5 * measure_spread(again[0]).over_items
    assert measure_spread(again[0], draw_texts([1] * 160)) == measure_spread(again[0])


def test_a_score_on_few_texts_has_students_interval_over_them() -> None:
    rng = np.random.default_rng(3)
    right, texts = np.repeat((rng.uniform(size=12) < 0.5).astype(float), 8), draw_texts([8] * 12)
    score, plain = score_values("exact_match", right.tolist(), texts), score_values("exact_match", right.tolist())
    error = right[::8].std(ddof=1) / np.sqrt(12)
    assert score.high == pytest.approx(score.value + error * t.ppf(0.975, 11))
    assert (score.value, score.num_items) == (plain.value, plain.num_items)
    assert score.high - score.low > 2 * (plain.high - plain.low)


@pytest.mark.parametrize("values", [[1.0, 0.0] * 40, [0.25, 0.75] * 10])
def test_texts_that_are_alike_make_no_interval_narrower(values: list[float]) -> None:
    texts = draw_texts([2] * (len(values) // 2))
    assert score_values("f1", values, texts) == score_values("f1", values)


def test_where_all_are_wrong_as_few_texts_as_there_are_leave_room() -> None:
    texts = draw_texts([15] * 4)
    score, found = score_values("exact_match", [0.0] * 60, texts), compare_values([0.0] * 60, [0.0] * 60, texts)
    assert (score.low, score.high) == wilson_interval(0, 4)
    assert (found.value, found.p) == (0.0, 1.0)
    assert (found.low, found.high) == newcombe_paired(0, 0, 0, 4) and found.high > 0.2


def test_what_few_texts_could_have_shown_is_more_than_their_interval_is_wide() -> None:
    rng = np.random.default_rng(7)
    left, right, texts = np.zeros(500), rng.normal(0, 0.1, 500), draw_texts([125] * 4)
    found = compare_values(left, right, texts)
    reach, error = (found.high - found.low) / 2, join_by_text(right, texts).std(ddof=1) / 2
    error = max(error, find_least_error(found.value, 4, 3))
    assert reach == pytest.approx(error * t.ppf(0.975, 3))
    assert found.find_smallest() == pytest.approx(error * (t.ppf(0.975, 3) + t.ppf(0.8, 3)), rel=1e-3)
    assert found.find_smallest() > reach


def test_items_answered_right_by_one_side_alone_are_counted() -> None:
    left, right = draw_answers(np.random.default_rng(4), 40, 5)
    found, plain = compare_values(left, right, draw_texts([5] * 40)), compare_answers(left, right)
    assert (found.only_left, found.only_right) == (plain.only_left, plain.only_right)
    assert compare_values(left / 2, right, draw_texts([5] * 40)).only_left is None


def measure_rates(num_texts: int, num_questions: int, num_times: int) -> dict[str, float]:
    """Return how often two models that are alike over all texts are told apart, by questions and by texts."""
    rng, texts = np.random.default_rng(5), draw_texts([num_questions] * num_texts)
    found: dict[str, list[Any]] = {"questions": [], "texts": []}
    for _ in range(num_times):
        left, right = draw_answers(rng, num_texts, num_questions)
        found["questions"].append(compare_answers(left, right).p < 0.05)
        found["texts"].append(compare_values(left, right, texts, num_samples=1000).p < 0.05)
    return {name: float(np.mean(each)) for name, each in found.items()}


def test_models_that_are_alike_over_texts_are_told_apart_as_rarely_as_said() -> None:
    rates = measure_rates(60, 12, 200)
    assert rates["questions"] > 0.15
    assert rates["texts"] < 0.1
