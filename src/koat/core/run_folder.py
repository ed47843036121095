"""Run folders, the only contract between commands. What is written is written whole or not at all.

A file or folder is first written under a temporary name beside its place (`.NAME.tmp-PID-LIFE-N`), brought to
disk, and renamed. A folder that was there before steps aside (`.NAME.old-...`) until the new one stands.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from koat.core.config import dump_yaml, read_config_file
from koat.core.errors import ConfigError, DataError, RunFolderError, suggest

_LIFE = secrets.token_hex(4)  # tells this process from an earlier one that had its number
_counter = itertools.count()
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>tmp|old)-(?P<pid>\d+)-(?P<life>[0-9a-f]{8})-\d+")
_REASONS = {
    errno.ENOSPC: ("the disk is full", "Free some space, or write to another disk, then try again."),
    errno.EDQUOT: (
        "your disk quota is used up",
        "Free some space, or write to another disk, then try again.",
    ),
    errno.EFBIG: (
        "the file is larger than allowed here",
        "Raise the limit on file sizes, or write elsewhere.",
    ),
    errno.EACCES: ("permission is refused", "Change the permissions of the folder, or write elsewhere."),
    errno.EPERM: ("permission is refused", "Change the permissions of the folder, or write elsewhere."),
    errno.EROFS: ("the file system is read-only", "Write to another folder."),
    errno.ENOTDIR: ("part of the path is a file", "Write to another folder."),
    errno.ENAMETOOLONG: ("the name is too long", "Choose a shorter one."),
    errno.EIO: ("the disk reports an error", "Check the disk, or write to another one."),
}


class Fingerprint(TypedDict):
    """What pins a file's or text's content."""

    sha256: str
    bytes: int


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text whole or not at all; raises RunFolderError and leaves what was there untouched."""
    path = Path(os.path.realpath(path))
    temporary = _beside(path, "tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(_encode(text))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise _cannot_write(path, error.errno, error) from error
        raise
    _sync(path.parent)


def write_json(path: str | Path, value: Any) -> None:
    """Write plain values (and paths) as indented JSON, whole or not at all; raises RunFolderError."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=os.fspath) + "\n")


def write_yaml(path: str | Path, value: Any) -> None:
    """Write plain values as YAML, whole or not at all; raises RunFolderError."""
    write_text(path, dump_yaml(value))


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Give a temporary folder to fill; on success it takes the place of `path`, on an exception it goes.

    Raises RunFolderError where the disk refuses, also when a library inside the block met the refusal.
    """
    target = Path(os.path.realpath(path))
    temporary = _beside(target, "tmp")
    try:
        recover(target)
        temporary.mkdir(parents=True)
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                _sync(Path(folder, name), strict=True)
            _sync(Path(folder))
        _take_place(temporary, target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if (number := _refusal(error)) is not None:
            raise _cannot_write(target, number, error) from error
        raise


def recover(path: str | Path) -> bool:
    """Put back a folder that had stepped aside when its writer was killed, and remove what the dead left.

    Returns whether something was put back. Leftovers of living processes stay.
    """
    target, restored = Path(path), False
    for entry, kind in _leftovers(target.parent, target.name):
        if kind == "old" and not os.path.lexists(target):
            os.rename(entry, target)
            restored = True
        else:
            _remove(entry)
    return restored


def clean_leftovers(folder: str | Path) -> None:
    """Recover all that killed writers left directly in a folder; does nothing where it may not write."""
    with suppress(OSError):
        for name in {_name_of(entry) for entry, _ in _leftovers(Path(folder))}:
            recover(Path(folder, name))


def append_line(path: str | Path, mapping: Mapping[str, Any]) -> None:
    """Append one JSON line; a torn line that a killed process left at the end goes first.

    Raises RunFolderError, the lines before untouched.
    """
    line = _encode(json.dumps(mapping, ensure_ascii=False, default=os.fspath) + "\n")
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as error:
        raise _cannot_write(Path(path), error.errno, error) from error
    try:
        size = os.fstat(handle).st_size
        try:
            size = _mend(Path(path), handle)
            while line:
                line = line[os.write(handle, line) :]
        except OSError as error:
            os.ftruncate(handle, size)
            raise _cannot_write(Path(path), error.errno, error) from error
    finally:
        os.close(handle)


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """Read JSON lines; a torn last line is left out and a missing file has none.

    Raises RunFolderError for a broken line before the last.
    """
    return [value for _, value in _parse_lines(Path(path))]


def truncate_lines(path: str | Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a file of JSON lines, whole or not at all, with the lines that `keep` wants."""
    if Path(path).exists():
        write_text(path, "".join(f"{text}\n" for text, value in _parse_lines(Path(path)) if keep(value)))


def fingerprint_file(path: str | Path) -> Fingerprint:
    """Return the SHA-256 and size of a file; raises DataError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256")
            return {"sha256": digest.hexdigest(), "bytes": file.tell()}
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def fingerprint_text(text: str) -> Fingerprint:
    """Return the SHA-256 and size of a text in UTF-8."""
    data = _encode(text)
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


@dataclass(frozen=True)
class RunFolder:
    """The files of one run and where they lie."""

    path: Path

    @classmethod
    def create(cls, path: str | Path, *, overwrite: bool = False) -> RunFolder:
        """Make a folder for a new run; `overwrite` removes the run it holds, and nothing else in it.

        Raises RunFolderError for a folder that is not empty, or that cannot be made.
        """
        run = cls(Path(path))
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            clean_leftovers(run.path)
            held = sorted(entry.name for entry in run.path.iterdir())
        except FileExistsError:
            raise RunFolderError(f"{path} is a file; a run needs a folder. Choose another `out`.") from None
        except OSError as error:
            raise _cannot_write(run.path, error.errno, error) from error
        if held and overwrite and run.config.name not in held:
            raise RunFolderError(f"{path} holds {_some(held)} and no run to overwrite. Choose another `out`.")
        if held and not overwrite:
            raise RunFolderError(
                f"{path} is not empty: it holds {_some(held)}. Use `--resume` to go on with the run in it, "
                "or choose another `out`."
            )
        for entry in (run.adapter, run.metrics, run.checkpoints, run.predictions, run.manifest, run.config):
            _remove(entry)
        return run

    @classmethod
    def open(
        cls, path: str | Path, *, require: tuple[str, ...] = ("config.yaml", "manifest.json")
    ) -> RunFolder:
        """Open the folder of a run, after recovering from a killed writer.

        Raises RunFolderError that names what is missing of `require` (file and folder names).
        """
        run = cls(Path(path))
        if not run.path.is_dir():
            parent = run.path.parent
            names = [entry.name for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
            raise RunFolderError(f"{path}: there is no such run folder{suggest(run.path.name, names)}")
        clean_leftovers(run.path)
        clean_leftovers(run.checkpoints)
        missing = [name for name in require if not (run.path / name).exists()]
        if missing:
            raise RunFolderError(
                f"{path} is not a complete run folder: {', '.join(missing)} missing. Name the folder "
                "that was the `out` of a training run, or train again."
            )
        return run

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def manifest(self) -> Path:
        """Versions, seed, fingerprints, hardware, and whether the run finished."""
        return self.path / "manifest.json"

    @property
    def adapter(self) -> Path:
        """The adapter in PEFT's format, tokenizer and template beside it."""
        return self.path / "adapter"

    @property
    def metrics(self) -> Path:
        """One JSON line per recorded step."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folders `step-000123` to resume from."""
        return self.path / "checkpoints"

    @property
    def predictions(self) -> Path:
        """One file of JSON lines per evaluation."""
        return self.path / "predictions"

    def read_config(self) -> dict[str, Any]:
        """Read the configuration; raises RunFolderError."""
        return _read(self.config)

    def write_config(self, value: Mapping[str, Any]) -> None:
        """Write the configuration; raises RunFolderError."""
        write_yaml(self.config, dict(value))

    def read_manifest(self) -> dict[str, Any]:
        """Read the manifest; raises RunFolderError."""
        return _read(self.manifest)

    def write_manifest(self, value: Mapping[str, Any]) -> None:
        """Write the manifest; raises RunFolderError."""
        write_json(self.manifest, dict(value))

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.checkpoints / f"step-{step:06d}"

    def latest_checkpoint(self) -> Path | None:
        """Return the complete checkpoint (with `done.json`) of the highest step, if there is one."""
        clean_leftovers(self.checkpoints)
        steps = [
            int(entry.parent.name.removeprefix("step-"))
            for entry in self.checkpoints.glob("step-*/done.json")
            if entry.parent.name.removeprefix("step-").isdecimal()
        ]
        return self.checkpoint(max(steps)) if steps else None

    def is_complete(self) -> bool:
        """Whether the manifest says that the run finished."""
        return self.manifest.exists() and self.read_manifest().get("finished") is True


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_config_file(path)
    except ConfigError as error:
        raise RunFolderError(str(error)) from error


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _encode(text: str) -> bytes:
    # Half a surrogate pair has no UTF-8; escaped it is still valid JSON, and nothing is lost.
    return text.encode("utf-8", errors="backslashreplace")


def _cannot_write(path: Path, number: int | None, error: BaseException) -> RunFolderError:
    reason, advice = _REASONS.get(
        number or 0, (getattr(error, "strerror", None) or str(error), "Choose another place.")
    )
    return RunFolderError(f"cannot write {path}: {reason}. What was there before is untouched. {advice}")


def _refusal(error: BaseException) -> int | None:
    """Return the error number if the disk refused; libraries written in Rust hide it in their message."""
    if isinstance(error, OSError):
        return error.errno if error.errno in _REASONS else None
    found = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, Exception) else None
    return int(found[1]) if found and int(found[1]) in _REASONS else None


def _sync(path: Path, *, strict: bool = False) -> None:
    """Bring a file, or a folder's list of names, to disk. Some file systems cannot do it for folders."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError:
        if strict:
            raise


def _take_place(temporary: Path, target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise RunFolderError(f"cannot write the folder {target}: there is a file of that name")
    aside = _beside(target, "old")
    replaces = os.path.lexists(target)
    if replaces:
        os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except BaseException:
        if replaces:
            os.rename(aside, target)
        raise
    _sync(target.parent)
    if replaces:  # under a name that is never put back, so that a kill while removing does no harm
        doomed = _beside(target, "tmp")
        os.rename(aside, doomed)
        _remove(doomed)


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}-{os.getpid()}-{_LIFE}-{next(_counter)}")


def _name_of(leftover: Path) -> str:
    found = _LEFTOVER.fullmatch(leftover.name)
    assert found is not None
    return found["name"]


def _leftovers(folder: Path, name: str | None = None) -> list[tuple[Path, str]]:
    """List what dead processes left in a folder, for one name or all, the newest first."""
    found: list[tuple[float, Path, str]] = []
    for entry in folder.iterdir() if folder.is_dir() else ():
        match = _LEFTOVER.fullmatch(entry.name)
        if match and name in (None, match["name"]) and not _is_alive(int(match["pid"]), match["life"]):
            found.append((entry.lstat().st_mtime, entry, match["kind"]))
    return [(entry, kind) for _, entry, kind in sorted(found, reverse=True)]


def _is_alive(pid: int, life: str) -> bool:
    if pid == os.getpid():
        return life == _LIFE
    if os.name != "posix":  # there, signal 0 is no question but a signal
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _mend(path: Path, handle: int) -> int:
    """Make a file of lines end at the end of a line, and return its size in bytes."""
    size = os.fstat(handle).st_size
    if not size or os.pread(handle, 1, size - 1) == b"\n":
        return size
    data = path.read_bytes()
    start = data.rfind(b"\n") + 1
    if _parse(data[start:]) is not None:  # whole, but for the line break
        return size + os.write(handle, b"\n")
    os.ftruncate(handle, start)
    return start


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line.decode("utf-8"))
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _parse_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.exists():
        return
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be read: {error.strerror or error}") from error
    last = max((number for number, line in enumerate(lines, 1) if line.strip()), default=0)
    for number, line in enumerate(lines, 1):
        value = _parse(line)
        if value is not None:
            yield line.decode("utf-8"), value
        elif line.strip() and number != last:
            raise RunFolderError(f"{path}, line {number}: is no JSON mapping; the file was damaged or edited")
