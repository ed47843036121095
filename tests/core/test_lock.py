"""Locks: one holder at a time, nothing left behind, and the dead hold nothing."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from koat.core.errors import RunFolderError
from koat.core.lock import hold

FORK = multiprocessing.get_context("fork")


def test_one_at_a_time(tmp_path: Path) -> None:
    file = tmp_path / "deep" / ".lock"
    with hold(file, "runs/a"):
        with pytest.raises(RunFolderError, match=r"runs/a is being worked on by another process"), hold(file, "runs/a"):
            pass
        assert file.exists()
    assert not list(file.parent.iterdir())
    with pytest.raises(KeyError), hold(file, "runs/a"):
        raise KeyError
    with hold(file, "runs/a"):
        pass


def test_a_dead_process_holds_nothing(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    holds = FORK.Event()

    def wait() -> None:
        with hold(file, "runs/a"):
            holds.set()
            FORK.Event().wait(60)

    child = FORK.Process(target=wait)
    child.start()
    assert holds.wait(20)
    with pytest.raises(RunFolderError, match="another process"), hold(file, "runs/a"):
        pass
    child.kill()
    child.join()
    assert file.exists()
    with hold(file, "runs/a"):
        pass
    assert not file.exists()


def test_a_lock_that_was_removed_in_between_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder before removes its file after this one opened it, and before this one locks it."""
    from koat.core import lock

    file, real, removed = tmp_path / ".lock", lock._lock, []

    def remove_first(opened: object) -> bool:
        if not removed:
            removed.append(file.unlink())
        return real(opened)  # type: ignore[arg-type]

    monkeypatch.setattr(lock, "_lock", remove_first)
    with hold(file, "runs/a"), pytest.raises(RunFolderError), hold(file, "runs/a"):
        pass


def test_a_place_that_refuses_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot write"), hold(tmp_path / "file" / ".lock", "runs/a"):
        pass
