"""The demo, small: the shipped model and recipes on a few of the shipped reviews; and whole, as soak."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import koat
from koat.core.errors import RunFolderError
from koat.workflows import demo
from tests.tiny_base import call_koat, run_koat


def test_the_demo_on_a_few_reviews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = tmp_path / "samples"
    samples.mkdir()
    for name in ("reviews_train.tsv", "reviews_test.tsv"):
        lines = (demo.SAMPLES / name).read_text(encoding="utf-8").splitlines()
        (samples / name).write_text("\n".join(lines[:9]) + "\n", encoding="utf-8")
    monkeypatch.setattr(demo, "SAMPLES", samples)
    status, out, error = call_koat("demo", "--out", tmp_path / "demo")
    assert status == 0, error
    for words in ("base", "ia3", "lora", "prompt 1", "prompt 2", "What to type next", "koat finetune --base my-model"):
        assert words in out
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {"base", "ia3", "lora", demo.MARK}
    plan = koat.plan({}, recipe="demo-ia3")
    assert f"{plan.trainable_parameters:,}" in out
    with pytest.raises(RunFolderError, match="finished"):
        koat.finetune(out=tmp_path / "demo" / "ia3", resume=True)


def test_an_earlier_demo_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    demo.prepare_folder(tmp_path / "demo")
    (tmp_path / "demo" / "old").write_text("x", encoding="utf-8")
    demo.prepare_folder(tmp_path / "demo")
    assert [path.name for path in (tmp_path / "demo").iterdir()] == [demo.MARK]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("x", encoding="utf-8")
    with pytest.raises(RunFolderError, match="no earlier demo"):
        demo.prepare_folder(mine)
    assert (mine / "thesis.txt").read_text(encoding="utf-8") == "x"


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_place_that_cannot_be_written_is_refused(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(RunFolderError, match="--out"):
        demo.prepare_folder(tmp_path / place)


def test_an_earlier_demo_that_cannot_be_removed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(place: Path) -> None:
        raise PermissionError(13, "Permission denied")

    demo.prepare_folder(tmp_path / "demo")
    monkeypatch.setattr("shutil.rmtree", refuse)
    with pytest.raises(RunFolderError, match=r"cannot be removed: Permission denied\. .* --out"):
        demo.prepare_folder(tmp_path / "demo")


@pytest.mark.soak
def test_the_whole_demo_takes_less_than_three_minutes(tmp_path: Path) -> None:
    began = time.monotonic()
    done = run_koat("demo", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 180
    assert "What to type next" in done.stdout
