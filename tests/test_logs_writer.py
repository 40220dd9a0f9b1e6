"""How lines are written: formats, levels, and a standard error that blocks."""

import asyncio
import io
import json
import logging
import os
import re
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from aiproxy import logs
from aiproxy.logs import LibraryHandler, LineWriter, Log, standard_error
from invariants import eventually
from rig import Proxy, totals
from test_logs import RESPONSES, line_of

Serve = Callable[..., Awaitable[Proxy]]


class Memory:
    """A stream that keeps what is written, and may be held up."""

    def __init__(self) -> None:
        self.raw = b""
        self.free = threading.Event()
        self.free.set()
        self.held = threading.Event()

    def write(self, data: memoryview, /) -> int | None:
        """Keep it, once free."""
        if not self.free.is_set():
            self.held.set()
        self.free.wait(5)
        self.raw += bytes(data)
        return len(data)

    def flush(self) -> None:
        """Do nothing."""


def written(fmt: str = "json", level: str = "debug", **options: Any) -> bytes:
    """What a line of each level looks like."""
    memory = Memory()
    log = Log(memory, level=level, fmt=fmt, **options)
    for name in ("debug", "info", "warning", "error"):
        getattr(log.process, name)(f"a {name}", text='x"\n\x1b[31m\u2028', number=1)
    log.close()
    return memory.raw


# Formats and levels


def test_json() -> None:
    """A line is one JSON object, whatever its values hold."""
    lines = [json.loads(line) for line in written().splitlines()]
    assert [line["level"] for line in lines] == ["debug", "info", "warning", "error"]
    assert {line["text"] for line in lines} == {'x"\n\x1b[31m\u2028'}
    assert b"\x1b" not in written()


def test_journald_priorities() -> None:
    """Under journald each line begins with its syslog priority."""
    lines = written(journal=True).splitlines()
    assert [line[:3] for line in lines] == [b"<7>", b"<6>", b"<4>", b"<3>"]
    assert all(json.loads(line[3:]) for line in lines)


@pytest.mark.parametrize(
    ("level", "count"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)]
)
@pytest.mark.parametrize("fmt", ["json", "console"])
def test_levels(fmt: str, level: str, count: int) -> None:
    """What is below the level is left out."""
    assert len(re.findall(rb"a (?:debug|info|warning|error)", written(fmt, level))) == count


def test_console() -> None:
    """For a terminal a line is text: no JSON, no colour codes in a file, one line each."""
    lines = written("console").splitlines()
    assert len(lines) == 4
    assert all(b"number=1" in line for line in lines)
    assert all(b"\x1b" not in line for line in lines)
    with pytest.raises(ValueError, match="Expecting value"):
        json.loads(lines[0].decode().lstrip("0123456789-:.TZ "))


@pytest.mark.parametrize(("level", "lines"), [("info", 1), ("warning", 0)])
async def test_request_lines_are_of_level_info(serve: Serve, level: str, lines: int) -> None:
    """Above `info` requests are not logged, but still counted."""
    proxy = await serve(log={"level": level})
    await proxy.post(RESPONSES)
    assert totals(await proxy.metrics(), "aiproxy_requests_total", "outcome") == {"completed": 1}
    proxy.daemon.log.error("afterwards")

    async def holds() -> None:
        assert any(line["event"] == "afterwards" for line in proxy.logs())

    await eventually(holds)
    assert len(proxy.request_logs()) == lines


@pytest.mark.parametrize("ours", [False, True])
def test_journald_is_known_by_its_stream(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ours: bool  # noqa: FBT001
) -> None:  # fmt: skip
    """The prefix is for a standard error that journald itself connected, not a redirected one."""
    with (tmp_path / "stderr").open("w") as stderr:
        status = os.fstat(stderr.fileno())
        monkeypatch.setattr(sys, "stderr", stderr)
        inode = status.st_ino if ours else status.st_ino + 1
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{inode}")
        stream_out, journal = standard_error()
        assert journal is ours
        stream_out.write(memoryview(b"x\n"))
        assert isinstance(stream_out, io.RawIOBase)
        stream_out.close()
    assert (tmp_path / "stderr").read_bytes() == b"x\n"


# A stream that blocks


async def test_a_blocked_stream_drops_lines(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """While standard error is blocked requests go on, and dropped lines are counted."""
    monkeypatch.setattr(logs, "MAX_WAITING", 5)
    proxy = await serve()
    blocked, free = threading.Event(), threading.Event()
    write = proxy.tap.write

    def held_up(data: bytes | memoryview, /) -> int:
        blocked.set()
        free.wait(5)
        return write(data)

    monkeypatch.setattr(proxy.tap, "write", held_up)
    try:
        await proxy.post(RESPONSES)
        await asyncio.to_thread(blocked.wait, 5)
        for _ in range(12):
            assert (await proxy.post(RESPONSES)).status == 200
        metrics = await proxy.metrics()
        assert metrics["aiproxy_log_dropped_total", frozenset()] == 12 - 5
        assert totals(metrics, "aiproxy_requests_total", "outcome") == {"completed": 13}
    finally:
        free.set()
    await line_of(proxy, 6)
    await proxy.post(RESPONSES)
    await line_of(proxy, 7)


def test_who_logs_never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line is taken while the writer is held up, and all lines come out in order later."""
    memory = Memory()
    memory.free.clear()
    writer = LineWriter(memory)
    writer.msg(b"0")
    assert memory.held.wait(5)
    for n in range(1, 100):
        writer.msg(b"%d" % n)
    assert memory.raw == b""
    memory.free.set()
    writer.close()
    assert memory.raw.split() == [b"%d" % n for n in range(100)]
    assert writer.dropped == 0


def test_closing_does_not_wait_for_ever() -> None:
    """A stream that stays blocked costs the daemon's end a bounded time."""
    memory = Memory()
    memory.free.clear()
    writer = LineWriter(memory)
    writer.msg(b"x")
    writer.close(0.05)
    assert memory.raw == b""
    memory.free.set()


@pytest.mark.parametrize("error", [OSError("gone"), BrokenPipeError(), ValueError("closed")])
def test_a_reader_that_is_gone(error: Exception) -> None:
    """Where nobody reads any more lines are dropped and counted, and nothing breaks."""

    class Gone(Memory):
        def write(self, data: memoryview, /) -> int | None:
            raise error

    writer = LineWriter(Gone())
    writer.msg(b"a")
    writer.msg(b"b")
    writer.close()
    assert writer.dropped == 2


def test_a_stream_that_takes_a_part() -> None:
    """Partial and refused writes of a non-blocking stream lose nothing."""
    answers = [1, None, 2, None]

    class Slow(Memory):
        def write(self, data: memoryview, /) -> int | None:
            taken = answers.pop(0) if answers else len(data)
            self.raw += bytes(data[: taken or 0])
            return taken

    slow = Slow()
    writer = LineWriter(slow)
    writer.msg(b"hello")
    writer.msg(b"world")
    writer.close()
    assert slow.raw == b"hello\nworld\n"


def raised() -> logging.LogRecord:
    """What a library logs of an error of its own."""
    record = logging.LogRecord("asyncio", logging.ERROR, "x.py", 1, "Task failed", (), None)
    try:
        int("sk-" + "secret")
    except ValueError:
        record.exc_info = sys.exc_info()
    return record


def test_what_libraries_log_is_a_line_of_the_log() -> None:
    """The standard library's logging ends in the same log, without an error's own message."""
    memory = Memory()
    log = Log(memory, level="info", fmt="json")
    LibraryHandler(log).emit(raised())
    log.close()
    line = json.loads(memory.raw)
    assert (line["event"], line["level"], line["logger"]) == ("library", "error", "asyncio")
    assert (line["message"], line["error"]) == ("Task failed", "ValueError")
    assert "sk-secret" not in memory.raw.decode()
