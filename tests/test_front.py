"""The front door: terminals that know few letters, and what is said to who stops a command."""

from __future__ import annotations

import io
import subprocess
from pathlib import Path

import pytest

from koat.cli import front
from koat.workflows import shell
from tests.tiny_base import call_koat, find_koat, make_environment, write_rows


def test_letters_that_a_terminal_lacks_end_nothing(tmp_path: Path) -> None:
    """The rows are Korean, and the terminal writes ASCII alone."""
    rows = write_rows(tmp_path / "rows.jsonl", [{"instruction": "비가 옵니까?", "output": "예"}])
    done = subprocess.run(
        [find_koat(), "data", "inspect", str(rows)],
        env=make_environment(PYTHONIOENCODING="ascii"), capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"??" in done.stdout and b"Traceback" not in done.stderr


@pytest.mark.parametrize(("command", "goes_on"), [("finetune", True), ("ask", False), ("eval", False)])
def test_only_training_goes_on(command: str, goes_on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(**more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(front, "koat", stop)
    status, _, error = call_koat(command, "runs/mine")
    assert status == 130
    assert "koat: stopped." in error
    assert ("finetune --resume" in error) is goes_on


def test_questions_end_where_they_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(prompt: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", stop)
    try:
        assert shell.read_question() == ""
    except KeyboardInterrupt:  # which would end the tests
        pytest.fail("it went on")


def test_a_byte_order_mark_is_no_part_of_a_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeff비가?\n\n눈이?\n"))
    assert shell.read_questions() == ["비가?", "눈이?"]
