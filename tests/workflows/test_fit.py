"""What fits into a memory: sizes that can be read, boundaries that hold, and answers for real models."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from koat.adapters.methods import METHODS
from koat.core.errors import ConfigError
from koat.workflows.planning.fit import LEAST, find_most, read_size
from tests.tiny_base import call_koat, need_shared


def fit(base: Path, size: str, *settings: str, method: str = "lora") -> dict[tuple[str, bool], dict[str, Any]]:
    """Return what `koat plan --fit --json` says, by method and checkpointing."""
    status, out, error = call_koat("plan", "--base", base, "--method", method, "--fit", size, "--json", *settings)
    assert status == 0, error
    fits = json.loads(out)["fits"]
    return {(each["method"], each["checkpointing"]): each for each in fits}


@pytest.fixture(scope="module")
def in_20_mb(place: Path) -> dict[tuple[str, bool], dict[str, Any]]:
    """What fits into 20 MB of the tiny base."""
    return fit(place / "base", "20MB")


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * 10**9), ("24GiB", 24 * 2**30), ("800MB", 800 * 10**6), (" 1.5 gb ", 1_500_000_000)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert read_size(text) == size


@pytest.mark.parametrize("text", ["24", "24 gigs", "", "GB", "-3GB", "0GB", "24GBit"])
def test_what_is_no_size_is_refused_with_examples(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_size(text)
    assert all(word in str(caught.value) for word in (repr(text), "24GB", "24GiB", "800MB"))


def test_the_command_line_says_so_too(place: Path) -> None:
    status, _, error = call_koat("plan", "--base", place / "base", "--fit", "24 gigs")
    assert status == 2
    assert "24GiB" in error and "Traceback" not in error


def test_the_search_ends_at_the_boundary() -> None:
    assert [find_most(lambda n, limit=limit: n <= limit) for limit in (-1, 0, 1, 777)] == [0, 0, 1, 777]


def test_what_fits_fits_and_one_more_does_not(place: Path, in_20_mb: dict[tuple[str, bool], dict[str, Any]]) -> None:
    size, found = 20_000_000, in_20_mb
    assert {name for name, _ in found} == set(METHODS)
    tokens = found["lora", False]["microbatch"]
    for more, fits in ((0, True), (8, False)):
        status, out, _ = call_koat(
            "plan",
            "--base",
            place / "base",
            "--method",
            "lora",
            "--json",
            f"training.tokens_per_microbatch={tokens + more}",
        )
        assert status == 0
        assert (json.loads(out)["peak_bytes"] <= size) == fits
    assert found["lora", True]["microbatch"] > found["lora", False]["microbatch"]
    assert found["lora", True]["longest"] == 256 and "own limit" in found["lora", True]["note"]
    assert "activation checkpointing" in found["prefix", True]["note"]


def test_a_decay_that_ia3_does_not_take_leaves_its_row(
    place: Path, in_20_mb: dict[tuple[str, bool], dict[str, Any]]
) -> None:
    """The methods are shown beside one another: LoRA decays, IA3 is planned without."""
    found = fit(place / "base", "20MB", "training.weight_decay=0.1")
    assert {name for name, _ in found} == set(METHODS)
    for checkpointing in (False, True):
        assert found["ia3", checkpointing] == in_20_mb["ia3", checkpointing]
        assert found["ia3", checkpointing]["microbatch"] >= LEAST


def test_where_nothing_fits_something_is_proposed(place: Path) -> None:
    status, out, _ = call_koat("plan", "--base", place / "base", "--fit", "0.1MB")
    assert status == 0
    assert "! lora: nothing fits" in out and "take a smaller base model" in out


def test_what_a_team_asked() -> None:
    """An 8-billion Llama-3 in NF4 with LoRA on all seven projections, on 24 GB: which context length trains?"""
    folder = need_shared("models", "llama-3-8b")
    began = time.process_time()  # what the machine does beside it does not count
    found = fit(folder, "24GB", "model.quantisation=nf4-double")
    assert time.process_time() - began < 60
    plain, spared = found["lora", False], found["lora", True]
    # 7 billion in 4.13 bits, 1.05 billion of embedding and head in bfloat16, 21 million trained in 16 bytes each.
    fixed = 6_979_321_856 * 4.13 / 8 + 2 * 525_336_576 * 2 + 20_971_520 * 16
    assert plain["fixed_bytes"] == pytest.approx(fixed, rel=0.01)
    # Keeping all: 32 layers of some 100 kB to 400 kB a token; recomputing: a hidden state of 8 kB a layer.
    assert 1000 < plain["microbatch"] < 6000
    assert spared["microbatch"] > 4 * plain["microbatch"]
    assert spared["longest"] == 8192
    assert found["ia3", False]["microbatch"] > plain["microbatch"]


@pytest.mark.soak
def test_a_base_that_does_not_fit_is_to_be_quantised() -> None:
    folder = need_shared("models", "polyglot-ko-5.8b")
    found = fit(folder, "8GB", "model.dtype=bfloat16", method="ia3")
    assert found["ia3", False]["longest"] < LEAST
    assert "model.quantisation=nf4-double" in found["ia3", False]["note"]
    assert found["qlora", True]["longest"] > 512
