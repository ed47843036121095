"""Where writing meets other systems and other processes; the rest of it is tested with run folders."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from koat.core import atomic
from koat.core.errors import RunFolderError


def test_windows_syncs_what_is_open_for_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    file = tmp_path / "file"
    file.write_text("x", encoding="utf-8")
    seen: list[int] = []

    def sync(handle: int) -> None:
        """As there: a handle that was opened for reading is refused."""
        seen.append(fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE)
        if seen[-1] == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", sync)
        patch.setattr(os, "name", "nt")
        atomic._sync(file, strict=True)
    assert seen == [os.O_RDWR]


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_folder_taken_away_by_another_process_is_made_again(
    times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between making a folder and the first file in it, another process' check may remove it as empty."""
    folder, make, left = tmp_path / "runs" / "new", Path.mkdir, times

    def make_for_a_moment(path: Path, *given: Any, **more: Any) -> None:
        nonlocal left
        make(path, *given, **more)
        if path == folder and more.get("parents") and left:
            left -= 1
            path.rmdir()
            path.parent.rmdir()

    monkeypatch.setattr(Path, "mkdir", make_for_a_moment)
    if times < 3:
        atomic.write_text(folder / "scores.json", "{}")
        assert (folder / "scores.json").read_text(encoding="utf-8") == "{}"
    else:
        with pytest.raises(RunFolderError, match="cannot write"):
            atomic.write_text(folder / "scores.json", "{}")


def test_a_check_leaves_nothing_behind(tmp_path: Path) -> None:
    atomic.check_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    atomic.check_writable(tmp_path / "a" / "b")
    assert [path.name for path in tmp_path.rglob("*")] == ["a"]
