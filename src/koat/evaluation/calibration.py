"""Whether a model is as sure as it is right, and whether it favours a label."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import exp
from typing import Any

DIVISORS: dict[str, Callable[[Mapping[str, Any], str], int]] = {
    "none": lambda prediction, word: 1,
    "per-token": lambda prediction, word: prediction.get("num_tokens", {}).get(word, 1),
    "per-character": lambda prediction, word: len(word),
    "per-byte": lambda prediction, word: len(word.encode("utf-8")),
}
"""By a contract's normalisation: what a choice's log-probability is divided by."""


@dataclass(frozen=True, slots=True)
class Bin:
    """Answers of like confidence: how many, how sure on average, and the share that was right."""

    low: float
    high: float
    num_items: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """The expected calibration error, the mean confidence less the accuracy, and the bins that hold answers."""

    error: float
    overconfidence: float
    bins: tuple[Bin, ...]

    def to_mapping(self) -> dict[str, Any]:
        """Return a JSON-safe mapping."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class LabelBias:
    """Shares of each label among the answers and among the gold labels, and how far the two lie apart.

    `distance` is half the sum of absolute differences: the share of answers that would have to change. `none`
    in `predicted` counts answers that are no label.
    """

    predicted: dict[str, float]
    gold: dict[str, float]
    distance: float

    def to_mapping(self) -> dict[str, Any]:
        """Return a JSON-safe mapping."""
        return asdict(self)


def to_probabilities(logprobs: Sequence[float]) -> list[float]:
    """Return the probabilities of choices among themselves, from what they are ranked by."""
    top = max(logprobs)
    weights = [exp(value - top) for value in logprobs]
    return [weight / sum(weights) for weight in weights]


def measure_calibration(
    probabilities: Sequence[Sequence[float]], gold: Sequence[int], num_bins: int = 10
) -> Calibration:
    """Return the expected calibration error over bins of equal width.

    With B_m the items whose highest probability lies in ((m - 1) / M, m / M]:

        ECE = sum over m of |B_m| / N * |accuracy(B_m) - mean confidence(B_m)|

    `probabilities` holds each item's choices, `gold` the number of the right one. Source: Guo et al. (2017), On
    calibration of modern neural networks, eq. 3.
    """
    if len(probabilities) != len(gold) or not gold:
        raise ValueError(f"{len(probabilities)} items with {len(gold)} gold labels")
    held: list[list[tuple[float, bool]]] = [[] for _ in range(num_bins)]
    for choices, right in zip(probabilities, gold, strict=True):
        sure = max(choices)
        number = next(m for m in range(num_bins) if sure <= (m + 1) / num_bins or m == num_bins - 1)
        held[number].append((sure, choices.index(sure) == right))
    bins = tuple(_make_bin(number, entries, num_bins) for number, entries in enumerate(held) if entries)
    gaps = [(entry.num_items / len(gold), entry.confidence - entry.accuracy) for entry in bins]
    return Calibration(sum(share * abs(gap) for share, gap in gaps), sum(share * gap for share, gap in gaps), bins)


def _make_bin(number: int, entries: Sequence[tuple[float, bool]], num_bins: int) -> Bin:
    confidence = sum(sure for sure, _ in entries) / len(entries)
    accuracy = sum(right for _, right in entries) / len(entries)
    return Bin(number / num_bins, (number + 1) / num_bins, len(entries), confidence, accuracy)


def measure_label_bias(predicted: Sequence[str | None], gold: Sequence[str]) -> LabelBias:
    """Return how often each label is given and how often it is right to give it; None is an answer that is none."""
    if len(predicted) != len(gold) or not gold:
        raise ValueError(f"{len(predicted)} answers with {len(gold)} gold labels")
    given = Counter("none" if answer is None else answer for answer in predicted)
    wanted = Counter(gold)
    labels = sorted(given.keys() | wanted.keys())
    shares = [{label: counts[label] / len(gold) for label in labels} for counts in (given, wanted)]
    distance = sum(abs(shares[0][label] - shares[1][label]) for label in labels) / 2
    return LabelBias(shares[0], shares[1], distance)


def describe_choices(
    predictions: Sequence[Mapping[str, Any]], scoring: str, contract: Mapping[str, Any]
) -> dict[str, Any]:
    """Return `calibration` and, where all items have the same choices, `label_bias` of predictions as they are kept.

    `contract` holds the parts of the contract: the normalisation says what choices were ranked by. Empty for
    predictions that are no choices.
    """
    if not predictions or any(row.get("gold") not in row.get("logprobs", {}) for row in predictions):
        return {}
    words = [list(row["logprobs"]) for row in predictions]
    gold = [str(row["gold"]) for row in predictions]
    found: dict[str, Any] = {}
    normalisation = contract.get("normalisation") or "none"
    # A first token is not ranked by its probability; what mutual information takes off is not on record.
    if contract.get("scoring") != "first-token" and normalisation in DIVISORS:
        probabilities = [to_probabilities(_rank(row, normalisation)) for row in predictions]
        right = [choices.index(label) for choices, label in zip(words, gold, strict=True)]
        found["calibration"] = measure_calibration(probabilities, right).to_mapping()
    if all(choices == words[0] for choices in words):
        found["label_bias"] = measure_label_bias([row["predicted"][scoring] for row in predictions], gold).to_mapping()
    return found


def _rank(prediction: Mapping[str, Any], normalisation: str) -> list[float]:
    """Return what the choices of a prediction were ranked by."""
    divide_by = DIVISORS[normalisation]
    return [value / (divide_by(prediction, word) or 1) for word, value in prediction["logprobs"].items()]
