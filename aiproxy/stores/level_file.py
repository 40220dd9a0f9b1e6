"""Levels of limits over a restart: a file in the state directory.

A restart gives nobody a full bucket. The file holds what was left, and when: within one boot of the
machine by a clock that nobody sets, else by the wall clock. What is aged wrongly is never more than
full.

Of several processes with one state directory, the one that began last owns the file: one that still
drains does not overwrite what its successor writes.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from aiproxy.limits import SavedBucket  # noqa: TC001 - it says what is decoded

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from aiproxy.stores.memory import Levels

NAME = "levels.json"
VERSION = 1

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # random(4)


class LevelFileError(Exception):
    """The file cannot be used; the message says why."""


class TakenOverError(Exception):
    """Another process has begun later, and lives: the file is its own."""


class _Document(msgspec.Struct):
    version: int
    boot_id: str
    monotonic_ns: int
    time_ns: int
    levels: dict[str, dict[str, dict[str, list[SavedBucket]]]]
    owner: str = ""
    pid: int = 0


class _Mark(msgspec.Struct):
    """Of a document, who wrote it."""

    owner: str = ""
    pid: int = 0
    boot_id: str = ""


def state_directory(environ: Mapping[str, str]) -> Path | None:
    """Where state is kept: as systemd says for `StateDirectory=` (systemd.exec(5))."""
    first = environ.get("STATE_DIRECTORY", "").partition(":")[0]
    return Path(first) if first else None


class LevelFile:
    """The file of one state directory. All of it may block."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / NAME
        self._owner = secrets.token_hex(8)
        self._claimed = False

    def load(self) -> tuple[Levels, int] | None:
        """The saved levels, and how many ns ago that was; None: there are none.

        Raises:
            LevelFileError: it cannot be read, or is not what `save` writes.
        """
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise LevelFileError(os.strerror(error.errno or 0)) from None
        try:
            document = msgspec.json.decode(data, type=_Document)
        except (msgspec.DecodeError, ValueError) as error:
            raise LevelFileError(f"not a file of levels: {error}") from None
        if document.version != VERSION:
            raise LevelFileError(f"its version is {document.version}, not {VERSION}")
        if document.boot_id and document.boot_id == _boot_id():
            age = time.monotonic_ns() - document.monotonic_ns
        else:
            age = time.time_ns() - document.time_ns
        return document.levels, max(0, age)

    def save(self, levels: Levels, monotonic_ns: int, time_ns: int) -> None:
        """Put levels of these moments in the place of the old ones: whole, or not at all.

        The first time the file becomes ours.

        Raises:
            TakenOverError: it has become another's since.
            OSError: it cannot be written; the old file is as it was.
        """
        with self._alone():
            self._save(levels, monotonic_ns, time_ns)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let no other process write meanwhile: what it has found is true until it has written."""
        directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX)
            yield
        finally:
            os.close(directory)

    def _save(self, levels: Levels, monotonic_ns: int, time_ns: int) -> None:
        if self._claimed and self._is_another_s():
            raise TakenOverError
        document = {
            "version": VERSION,
            "boot_id": _boot_id(),
            "monotonic_ns": monotonic_ns,
            "time_ns": time_ns,
            "levels": levels,
            "owner": self._owner,
            "pid": os.getpid(),
        }
        beside = self.path.with_suffix(f".{os.getpid()}.new")
        try:
            with beside.open("wb") as file:
                file.write(msgspec.json.encode(document))
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self.path)
        except OSError:
            beside.unlink(missing_ok=True)
            raise
        self._claimed = True

    def _is_another_s(self) -> bool:
        """Whether the file was written by a process that began after this one, and lives."""
        try:
            mark = msgspec.json.decode(self.path.read_bytes(), type=_Mark)
        except (OSError, msgspec.DecodeError):
            return False
        if mark.owner in ("", self._owner) or mark.boot_id != _boot_id():
            return False
        try:
            os.kill(mark.pid, 0)
        except ProcessLookupError:
            return False  # it came to nothing: the file is ours again
        except OSError:
            pass  # it lives, as another user
        return True


def _boot_id() -> str:
    """Which boot of the machine this is; empty if that is not told."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""
