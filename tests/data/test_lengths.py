"""Lengths and repeats, against counts by hand and a set of all prefixes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from koat.core.sequence import Sequence, supervise_from
from koat.data import lengths
from koat.data.encode import encode_records
from koat.data.lengths import LengthSummary, count_forest_tokens, draw_histogram, summarise_lengths
from koat.data.prompts import resolve_template
from koat.data.readers import read_records


def count_prefixes(sequences: list[Sequence]) -> int:
    """The oracle: a trie has one node per distinct prefix."""
    return len({s.token_ids[:end] for s in sequences for end in range(1, len(s) + 1)})


def draw(rng: random.Random, num: int, words: int) -> list[Sequence]:
    return [
        Sequence(ids, (False,) * len(ids), rng.choice(("", "a", "b")))
        for ids in (tuple(rng.choices(range(words), k=rng.randint(1, 12))) for _ in range(num))
    ]


@pytest.mark.parametrize("chunk", [1, 7, 50, 1 << 22])
def test_forest_tokens_are_distinct_prefixes(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(lengths, "_CHUNK", chunk)
    rng = random.Random(chunk)
    for words in (1, 2, 5):
        for num in (1, 2, 3, 40):
            sequences = draw(rng, num, words)
            assert count_forest_tokens(sequences) == count_prefixes(sequences)


def summarise(sequences: list[Sequence], step_size: int = 16) -> LengthSummary:
    """Summarise sequences that are taken in their own order."""
    order = list(range(len(sequences)))
    return summarise_lengths(sequences, [order[at : at + step_size] for at in range(0, len(order), step_size)])


def test_a_step_shares_what_its_own_sequences_share() -> None:
    rng = random.Random(0)
    sequences = draw(rng, 45, 3)
    order = rng.sample(range(45), 45)
    steps = [order[:20], order[20:21], order[21:]]
    summary = summarise_lengths(sequences, steps)
    assert summary.num_step_tokens == sum(count_prefixes([sequences[index] for index in step]) for step in steps)
    assert summary.step_size == 24
    pairs = [Sequence((9, 9, i), (False,) * 3) for i in range(32)]
    assert summarise(pairs).num_step_tokens == 2 * (2 + 16)
    assert summarise(pairs).step_saving == pytest.approx(96 / 36)


def test_counts_by_hand() -> None:
    sequences = [
        supervise_from((1, 2, 3, 4), 2),
        supervise_from((1, 2, 3, 4), 2),
        supervise_from((1, 2, 3, 5), 2),
        supervise_from((1, 2, 6), 2),
        supervise_from((7, 8), 1),
        supervise_from((7, 9), 1),
        supervise_from((5, 6, 7, 8, 9), 3),
    ]
    summary = summarise(sequences)
    assert (summary.num_sequences, summary.num_tokens, summary.num_supervised) == (7, 24, 2 * 3 + 1 + 2 + 2)
    assert summary.num_duplicates == 1
    # Prompt (1, 2) has three responses over four sequences; prompts of one token say nothing.
    assert summary.num_conflicts == 4
    # 1 2 3 4, 5, 6; 7 8, 9; 5 6 7 8 9.
    assert summary.num_forest_tokens == 6 + 3 + 5
    assert summary.saving == pytest.approx(24 / 14)


def test_percentiles_overflow_and_histogram() -> None:
    sequences = [Sequence((0,) * n, (False,) * n) for n in (*range(1, 100), 1_000)]
    summary = summarise(sequences)
    assert summary.percentiles == {50: 50, 90: 90, 95: 95, 99: 99, 100: 1_000}
    assert summary.overflow == {256: 1, 512: 1, 1024: 0, 2048: 0, 4096: 0}
    assert summary.histogram == [
        (1, 100, 99),
        *((n * 100 + 1, n * 100 + 100, 0) for n in range(1, 9)),
        (901, 1_000, 1),
    ]
    lines = draw_histogram(summary, width=20).split("\n")
    assert lines[0] == "    1 to   100  " + "█" * 20 + "  99"
    assert lines[1] == "  101 to   200  " + " " * 20 + "  0"
    assert lines[-1] == "  901 to 1,000  █" + " " * 19 + "  1"


def test_histograms_count_everything_once() -> None:
    rng = random.Random(3)
    for spread in (0, 1, 5, 30, 700, 20_000):
        sizes = [1 + rng.randint(0, spread) for _ in range(60)]
        histogram = summarise([Sequence((0,) * n, (False,) * n) for n in sizes]).histogram
        assert len(histogram) <= 13
        for first, last, count in histogram:
            assert count == sum(first <= size <= last for size in sizes)
        assert sum(count for _, _, count in histogram) == 60


def test_nothing_to_summarise_is_a_bug() -> None:
    with pytest.raises(ValueError, match="no sequence"):
        summarise_lengths([], [])


def test_real_korquad_shares_its_contexts(shared: Path, plain: Any) -> None:
    records = read_records(str(shared / "qa/KorQuAD_v1.0_dev.json")).records[:150]
    first = encode_records(records, resolve_template("koalpaca-context"), plain).sequences
    last = encode_records(records, resolve_template("koalpaca-question-first"), plain).sequences
    summary = summarise(first)
    assert summary.num_forest_tokens == count_prefixes(first)
    assert summary.saving > 3 > 1.1 > summarise(last).saving
    assert summary.num_forest_tokens <= summary.num_step_tokens < summary.num_tokens / 2
