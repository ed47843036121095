"""Run folders: whatever happens to the writer, a reader finds the old or the new, never half."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from koat.core.atomic import _HOST, atomic_folder, clean_leftovers, recover, write_json, write_text, write_yaml
from koat.core.errors import DataError, RunFolderError
from koat.core.fingerprint import fingerprint_file
from koat.core.json_lines import append_line, read_lines, truncate_lines
from koat.core.run_folder import RunFolder

FORK = multiprocessing.get_context("fork")
NUM_KILLS = 12


def kill_in_the_middle(work: Callable[[], None], seconds: float) -> None:
    """Let a child process repeat `work` for ever, and kill it `seconds` after it did it once."""
    begun = FORK.Event()

    def repeat() -> None:
        while True:
            work()
            begun.set()

    child = FORK.Process(target=repeat)
    child.start()
    assert begun.wait(20)
    time.sleep(seconds)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL


def die_at(call: str, number: int, work: Callable[[], None]) -> int:
    """Do `work` in a child process that is killed just before its `number`-th call of `os.<call>`."""

    def run() -> None:
        real, calls = getattr(os, call), iter(range(1, 1000))

        def count(*args: Any, **options: Any) -> Any:
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        setattr(os, call, count)
        work()

    child = FORK.Process(target=run)
    child.start()
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def with_file_limit(work: Callable[[], None], num_bytes: int = 100_000) -> str:
    """Return the message of the RunFolderError that `work` meets where files may not grow past a limit."""
    receiver, sender = FORK.Pipe(duplex=False)

    def run() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
        try:
            work()
            sender.send("no error")
        except RunFolderError as error:
            sender.send(str(error))

    child = FORK.Process(target=run)
    child.start()
    child.join()
    assert receiver.poll(), f"the child died with {child.exitcode}"
    return str(receiver.recv())


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def fill(folder: Path, version: int, num_files: int = 5) -> None:
    for index in range(num_files):
        (folder / f"{index}.txt").write_text(str(version) * 200_000)
    (folder / "done.json").write_text(str(version))


def version_of(folder: Path) -> int:
    """Return the version of a folder that `fill` filled; fails on a mixture or a half."""
    version = int((folder / "done.json").read_text())
    assert names(folder) == ["0.txt", "1.txt", "2.txt", "3.txt", "4.txt", "done.json"]
    assert all((folder / f"{index}.txt").read_text() == str(version) * 200_000 for index in range(5))
    return version


# Whole files


def test_text_json_and_yaml_are_written_as_given(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "deep" / "a.txt", "한글\r\n끝")
    assert (tmp_path / "new" / "deep" / "a.txt").read_bytes() == "한글\r\n끝".encode()
    write_json(tmp_path / "a.json", {"이름": "값", "path": Path("x/y"), "half": "\ud83d"})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"이름": "값", "path": "x/y", "half": "\ud83d"} and "이름" in text
    write_yaml(tmp_path / "a.yaml", {"질문": "none", "rate": 1e-05})
    assert (tmp_path / "a.yaml").read_text(encoding="utf-8") == "질문: 'none'\nrate: 1.0e-05\n"
    assert names(tmp_path) == ["a.json", "a.yaml", "new"]


def test_a_file_keeps_ordinary_permissions_and_its_link(tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
    write_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "real.txt").read_text() == "new"
    (tmp_path / "plain.txt").write_text("")
    write_text(tmp_path / "fresh.txt", "")
    assert (tmp_path / "fresh.txt").stat().st_mode == (tmp_path / "plain.txt").stat().st_mode


def test_what_json_cannot_hold_is_a_bug_and_leaves_the_old(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert (tmp_path / "a.json").read_text() == "1\n" and names(tmp_path) == ["a.json"]


def test_a_killed_writer_leaves_the_old_or_the_new_file(tmp_path: Path) -> None:
    target, draw = tmp_path / "a.txt", random.Random(1)
    seen = set()
    for round_ in range(NUM_KILLS):
        kill_in_the_middle(lambda r=round_: write_text(target, chr(65 + r) * 1_000_000), draw.uniform(0, 0.03))
        text = target.read_text()
        assert len(text) == 1_000_000 and len(set(text)) == 1
        seen.add(text[0])
    assert len(seen) == NUM_KILLS
    clean_leftovers(tmp_path)
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(("call", "expected"), [("fsync", "old"), ("replace", "old")])
def test_a_writer_killed_before_the_rename_changes_nothing(tmp_path: Path, call: str, expected: str) -> None:
    write_text(tmp_path / "a.txt", "old")
    assert die_at(call, 1, lambda: write_text(tmp_path / "a.txt", "new")) == -signal.SIGKILL
    assert (tmp_path / "a.txt").read_text() == expected and len(names(tmp_path)) == 2
    clean_leftovers(tmp_path)
    assert names(tmp_path) == ["a.txt"]


# Disks that refuse


def test_a_file_past_the_size_limit_leaves_the_old(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    message = with_file_limit(lambda: write_text(tmp_path / "a.txt", "x" * 1_000_000))
    assert str(tmp_path / "a.txt") in message and "larger than allowed" in message and "untouched" in message
    assert (tmp_path / "a.txt").read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_a_folder_past_the_size_limit_leaves_the_old(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "adapter") as folder:
        fill(folder, 1)

    def replace() -> None:
        with atomic_folder(tmp_path / "adapter") as folder:
            fill(folder, 2)

    assert "larger than allowed" in with_file_limit(replace)
    assert version_of(tmp_path / "adapter") == 1 and names(tmp_path) == ["adapter"]


def test_lines_past_the_size_limit_leave_whole_lines(tmp_path: Path) -> None:
    target = tmp_path / "metrics.jsonl"

    def append() -> None:
        for step in range(100_000):
            append_line(target, {"step": step, "pad": "x" * 1000})

    message = with_file_limit(append)
    assert "metrics.jsonl" in message and "untouched" in message
    assert target.read_bytes().endswith(b"}\n") and target.stat().st_size > 90_000
    assert [line["step"] for line in read_lines(target)] == list(range(len(target.read_text().splitlines())))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("needs the `mount` command for a small disk")
    if done.returncode:
        pytest.skip(f"needs the right to mount a small disk: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_said_and_loses_nothing(small_disk: Path) -> None:
    write_text(small_disk / "a.txt", "old")
    with pytest.raises(RunFolderError, match=r"the disk is full.*untouched.*Free some space"):
        write_text(small_disk / "a.txt", "x" * 2_000_000)
    with atomic_folder(small_disk / "adapter") as folder:
        (folder / "0.txt").write_text("old")
    with (
        pytest.raises(RunFolderError, match="the disk is full"),
        atomic_folder(small_disk / "adapter") as folder,
    ):
        fill(folder, 2, num_files=10)
    with pytest.raises(RunFolderError, match="the disk is full"):
        for step in range(10_000):
            append_line(small_disk / "metrics.jsonl", {"step": step, "pad": "x" * 1000})
    lines = read_lines(small_disk / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(len(lines))) and lines
    assert (small_disk / "a.txt").read_text() == "old" and (small_disk / "adapter" / "0.txt").read_text() == "old"
    assert names(small_disk) == ["a.txt", "adapter", "metrics.jsonl"]


def test_a_full_disk_under_safetensors_is_said_too(small_disk: Path) -> None:
    numpy = pytest.importorskip("numpy")
    save_file = pytest.importorskip("safetensors.numpy").save_file
    with (
        pytest.raises(RunFolderError, match="the disk is full"),
        atomic_folder(small_disk / "adapter") as folder,
    ):
        save_file({"a": numpy.zeros(500_000)}, folder / "adapter.safetensors")
    assert names(small_disk) == []


def test_a_path_through_a_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"cannot write .*a\.txt"):
        write_text(tmp_path / "file" / "a.txt", "x")
    with (
        pytest.raises(RunFolderError, match="part of the path is a file"),
        atomic_folder(tmp_path / "file" / "a"),
    ):
        pass
    with (
        pytest.raises(RunFolderError, match=r"there is a file of that name\. Move it away"),
        atomic_folder(tmp_path / "file"),
    ):
        pass
    with pytest.raises(RunFolderError, match="cannot write"):
        append_line(tmp_path / "nowhere" / "a.jsonl", {})
    assert names(tmp_path) == ["file"]


# Whole folders


def test_a_folder_appears_whole_and_replaces_the_old(tmp_path: Path) -> None:
    for version in (1, 2):
        with atomic_folder(tmp_path / "deep" / "adapter") as folder:
            fill(folder, version)
            assert folder.parent == tmp_path / "deep" and folder.name.startswith(".adapter.tmp-")
        assert version_of(tmp_path / "deep" / "adapter") == version
    assert names(tmp_path / "deep") == ["adapter"]


@pytest.mark.parametrize("error", [ValueError("own"), KeyboardInterrupt(), FileNotFoundError(2, "input")])
def test_an_exception_leaves_the_old_folder_and_passes_through(tmp_path: Path, error: BaseException) -> None:
    with atomic_folder(tmp_path / "adapter") as folder:
        fill(folder, 1)
    with pytest.raises(type(error)) as caught, atomic_folder(tmp_path / "adapter") as folder:
        (folder / "half.txt").write_text("x")
        raise error
    assert caught.value is error
    assert version_of(tmp_path / "adapter") == 1 and names(tmp_path) == ["adapter"]


def test_a_killed_writer_leaves_the_old_or_the_new_folder(tmp_path: Path) -> None:
    target, draw = tmp_path / "adapter", random.Random(2)

    def write() -> None:
        with atomic_folder(target) as folder:
            fill(folder, random.randrange(1, 10))

    for _ in range(NUM_KILLS):
        kill_in_the_middle(write, draw.uniform(0, 0.04))
        recover(target)
        assert version_of(target) in range(1, 10)
        assert names(tmp_path) == ["adapter"]


@pytest.mark.parametrize(("number", "version"), [(1, 1), (2, 1), (3, 2)])
def test_a_kill_before_each_rename_is_recovered_from(tmp_path: Path, number: int, version: int) -> None:
    """Renames: the old steps aside, the new takes its place, the old is marked for removal."""
    target = tmp_path / "adapter"
    with atomic_folder(target) as folder:
        fill(folder, 1)

    def write() -> None:
        with atomic_folder(target) as folder:
            fill(folder, 2)

    assert die_at("rename", number, write) == -signal.SIGKILL
    assert target.exists() == (number != 2)
    assert recover(target) == (number == 2)
    assert version_of(target) == version and names(tmp_path) == ["adapter"]


def test_a_kill_while_the_old_folder_is_removed_does_no_harm(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    with atomic_folder(target) as folder:
        fill(folder, 1)

    def write() -> None:
        with atomic_folder(target) as folder:
            fill(folder, 2)

    assert die_at("unlink", 3, write) == -signal.SIGKILL
    assert len(names(tmp_path)) == 2
    assert not recover(tmp_path / "elsewhere") and len(names(tmp_path)) == 2
    target.rename(tmp_path / "moved")
    assert not recover(target)  # what was half removed is never put back
    (tmp_path / "moved").rename(target)
    clean_leftovers(tmp_path)
    assert version_of(target) == 2 and names(tmp_path) == ["adapter"]


def test_the_next_writer_recovers_before_it_writes(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    with atomic_folder(target) as folder:
        fill(folder, 1)

    def write() -> None:
        with atomic_folder(target) as folder:
            fill(folder, 2)

    die_at("rename", 2, write)
    with pytest.raises(ValueError, match="own"), atomic_folder(target):
        raise ValueError("own")
    assert version_of(target) == 1 and names(tmp_path) == ["adapter"]


def test_leftovers_of_the_living_and_other_files_stay(tmp_path: Path) -> None:
    dead = FORK.Process(target=int)
    dead.start()
    dead.join()
    elsewhere = f".a.tmp-ffffffff-{dead.pid}-00000000-0"
    others = [".hidden", ".a.tmp", f"b.tmp-{_HOST}-1-00000000-0", elsewhere, elsewhere.replace("tmp", "old")]
    for name in others:
        (tmp_path / name).write_text("x")
    gone = tmp_path / f".a.tmp-{_HOST}-{dead.pid}-00000000-0"
    gone.write_text("x")
    parent = tmp_path / f".a.tmp-{_HOST}-{os.getppid()}-00000000-0"
    parent.write_text("x")
    before_my_time = tmp_path / f".a.tmp-{_HOST}-{os.getpid()}-00000000-0"
    before_my_time.write_text("x")
    with atomic_folder(tmp_path / "mine") as folder:
        clean_leftovers(tmp_path)
        assert folder.exists() and parent.exists() and not before_my_time.exists() and not gone.exists()
    assert names(tmp_path) == sorted([*others, parent.name, "mine"])
    clean_leftovers(tmp_path / "nowhere")
    yesterday = time.time() - 25 * 3600
    os.utime(tmp_path / elsewhere, (yesterday, yesterday))
    clean_leftovers(tmp_path)
    assert not (tmp_path / elsewhere).exists() and (tmp_path / elsewhere.replace("tmp", "old")).exists()


# Lines


def test_lines_are_appended_and_read(tmp_path: Path) -> None:
    target = tmp_path / "metrics.jsonl"
    assert read_lines(target) == []
    values = [{"step": 1, "text": "줄\u2028바꿈\n"}, {"step": 2, "loss": 0.5}]
    for value in values:
        append_line(target, value)
    assert read_lines(target) == values and target.read_bytes().count(b"\n") == 2


def test_lines_need_no_call_that_only_some_systems_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pread", "pwrite"):
        monkeypatch.delattr(os, name)
    for step in range(3):
        append_line(tmp_path / "metrics.jsonl", {"step": step})
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [0, 1, 2]


@pytest.mark.parametrize("torn", [b'{"step": 2, "te', '{"step": 2, "text": "한'.encode()[:-1], b"\0\0\0"])
def test_a_torn_last_line_is_left_out_and_then_replaced(tmp_path: Path, torn: bytes) -> None:
    target = tmp_path / "metrics.jsonl"
    target.write_bytes(b'{"step": 1}\n' + torn)
    assert read_lines(target) == [{"step": 1}]
    append_line(target, {"step": 2})
    assert target.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_a_last_line_without_its_break_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "metrics.jsonl"
    target.write_bytes(b'{"step": 1}')
    append_line(target, {"step": 2})
    assert read_lines(target) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("broken", [b"{oops", b"[1]", b"\xff\xfe"])
def test_a_broken_line_in_the_middle_is_named(tmp_path: Path, broken: bytes) -> None:
    target = tmp_path / "metrics.jsonl"
    target.write_bytes(b'{"step": 1}\n\n' + broken + b'\n{"step": 3}\n')
    with pytest.raises(RunFolderError, match=r"metrics.jsonl, line 3"):
        read_lines(target)


def test_truncate_keeps_the_wanted_lines_as_they_stand(tmp_path: Path) -> None:
    target = tmp_path / "metrics.jsonl"
    target.write_bytes(b'{"step":1,  "loss":1.50}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    truncate_lines(target, lambda line: line["step"] != 2)
    assert target.read_bytes() == b'{"step":1,  "loss":1.50}\n{"step": 3}\n'
    truncate_lines(tmp_path / "none.jsonl", lambda line: True)
    assert names(tmp_path) == ["metrics.jsonl"]


def test_a_killed_appender_leaves_whole_lines_before_the_last(tmp_path: Path) -> None:
    target = tmp_path / "metrics.jsonl"
    for _ in range(4):
        kill_in_the_middle(lambda: append_line(target, {"pad": "x" * 50_000}), 0.01)
    assert len(read_lines(target)) >= 4 and {line["pad"] for line in read_lines(target)} == {"x" * 50_000}


# Run folders


def test_a_new_run_and_its_places(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "runs" / "one")
    places = (run.config, run.manifest, run.adapter, run.metrics, run.checkpoints, run.predictions)
    assert [str(place.relative_to(run.path)) for place in places] == [
        "config.yaml", "manifest.json", "adapter", "metrics.jsonl", "checkpoints", "predictions",
    ]  # fmt: skip
    run.write_config({"out": "none", "rate": 1e-3})
    run.write_manifest({"씨": 1, "finished": False})
    again = RunFolder.open(run.path)
    assert again == run and again.read_config() == {"out": "none", "rate": 0.001}
    assert again.read_manifest() == {"씨": 1, "finished": False} and not again.is_complete()
    run.write_manifest({"finished": True})
    assert again.is_complete()


def test_a_folder_in_use_is_refused_with_advice(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "one")
    run.write_config({})
    with pytest.raises(RunFolderError, match=r"not empty.*config.yaml.*`--resume`.*another --out"):
        RunFolder.create(run.path)
    assert run.config.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="is a file"):
        RunFolder.create(tmp_path / "file")


def test_overwrite_removes_the_run_and_nothing_else(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "one")
    run.write_config({})
    run.checkpoint(3).mkdir(parents=True)
    append_line(run.metrics, {"step": 1})
    (run.path / "notes.txt").write_text("mine")
    assert names(RunFolder.create(run.path, overwrite=True).path) == ["notes.txt"]
    with pytest.raises(RunFolderError, match=r"notes\.txt and no run to overwrite"):
        RunFolder.create(run.path, overwrite=True)


def test_a_folder_with_only_leftovers_is_empty(tmp_path: Path) -> None:
    die_at("replace", 1, lambda: write_text(tmp_path / "one" / "config.yaml", "a: 1"))
    assert len(names(tmp_path / "one")) == 1
    assert names(RunFolder.create(tmp_path / "one").path) == []


def test_open_says_what_is_missing_and_suggests(tmp_path: Path) -> None:
    (tmp_path / "nsmc-ia3").mkdir()
    with pytest.raises(RunFolderError, match=r"nsmc-ai3.*no such run folder \(did you mean 'nsmc-ia3'\?\)"):
        RunFolder.open(tmp_path / "nsmc-ai3")
    with pytest.raises(RunFolderError, match=r"config\.yaml, manifest\.json missing"):
        RunFolder.open(tmp_path / "nsmc-ia3")
    (tmp_path / "nsmc-ia3" / "config.yaml").write_text("a: 1")
    RunFolder.open(tmp_path / "nsmc-ia3", require=("config.yaml",))
    with pytest.raises(RunFolderError, match=": adapter missing"):
        RunFolder.open(tmp_path / "nsmc-ia3", require=("config.yaml", "adapter"))


def test_broken_files_of_a_run_are_named(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "one")
    run.manifest.write_text('{"finished": tr')
    with pytest.raises(RunFolderError, match=r"manifest.json, line 1"):
        run.is_complete()
    with pytest.raises(RunFolderError, match=r"config.yaml: there is no such file"):
        run.read_config()


def test_the_latest_checkpoint_is_the_highest_complete_one(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "one")
    assert run.latest_checkpoint() is None
    for step in (9, 90, 1_000_000, 100):
        with atomic_folder(run.checkpoint(step)) as folder:
            if step != 100:
                write_json(folder / "done.json", {"step": step})
    (run.checkpoints / "step-final").mkdir()
    (run.checkpoints / "step-final" / "done.json").write_text("{}")
    assert run.checkpoint(90).name == "step-000090"
    assert run.latest_checkpoint() == run.checkpoints / "step-1000000"


def test_open_puts_back_an_adapter_whose_writer_was_killed(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "one")
    run.write_config({})
    with atomic_folder(run.adapter) as folder:
        fill(folder, 1)

    def write() -> None:
        with atomic_folder(run.adapter) as folder:
            fill(folder, 2)

    die_at("rename", 2, write)
    assert not run.adapter.exists()
    assert version_of(RunFolder.open(run.path, require=("adapter",)).adapter) == 1


# Fingerprints


def test_fingerprints_are_sha256_and_size(tmp_path: Path) -> None:
    data = "한글".encode() * 100_000
    (tmp_path / "a.txt").write_bytes(data)
    expected = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    assert fingerprint_file(tmp_path / "a.txt") == expected
    with pytest.raises(DataError, match=r"b\.txt: cannot be read"):
        fingerprint_file(tmp_path / "b.txt")
