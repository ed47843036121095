"""A tiny base model on disk with rows to train it on, and one finished run of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny_base import call_koat, make_rows, write_base, write_rows


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base` (a tiny model) and `rows.jsonl`."""
    folder = tmp_path_factory.mktemp("place")
    write_base(folder / "base")
    write_rows(folder / "rows.jsonl", make_rows(30))
    return folder


@pytest.fixture(scope="session")
def finished(place: Path) -> Iterator[Path]:
    """The folder of a finished IA3 run, made on the command line. All tests share it: none may write into it."""
    out = place / "finished"
    status, _, error = call_koat(*list_arguments(place), "--out", out)
    assert status == 0, error
    yield out
    assert not (out / "predictions").exists(), "a test evaluated the shared run in place; own_run is there for that"


@pytest.fixture
def own_run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, under its name, for one test to write into."""
    return shutil.copytree(finished, tmp_path / "own" / finished.name)


def list_arguments(place: Path) -> list[str]:
    """Return the command of the finished run but for its folder."""
    flags = ["--base", str(place / "base"), "--data", str(place / "rows.jsonl"), "--method", "ia3"]
    settings = ["data.validation_fraction=0.2", "training.max_steps=6", "training.batch_size=4", "training.seed=3"]
    return ["finetune", *flags, *settings]
