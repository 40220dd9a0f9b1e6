"""The log: one line per request when it ends, and lines about the process.

Lines are handed to a thread that writes them, since standard error may block (a full pipe, a
stopped terminal) and a request must never wait for that. When too many wait, lines are dropped and
counted. Nothing here logs a key, a credential, a prompt or an output: a line has the fields named
below and no other.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from collections import deque
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import structlog

from aiproxy.errors import shown

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from structlog.typing import FilteringBoundLogger, WrappedLogger

    from aiproxy.exchange import Exchange

MAX_WAITING = 10_000  # lines; at about 600 bytes each, 6 MB

_GATHER = 0.01  # seconds; waking the thread for each line would cost more than writing it
_RETRY = 0.02  # seconds between attempts at a non-blocking stream that is full

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_HIGHEST = 50
# Severities of syslog(3), which journald reads from a "<N>" at the start of a line.
_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}


class Stream(Protocol):
    """Where lines go: a binary file, unbuffered or flushed."""

    def write(self, data: memoryview, /) -> int | None:
        """Write some of it, and say how many bytes; None: none now. May block."""

    def flush(self) -> object:
        """Write through; may block."""


class LineWriter:
    """Writes lines in a thread of its own; never blocks who logs."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._lines: deque[bytes] = deque()
        self._wake = threading.Event()
        self._awake = False
        self._closed = False
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def msg(self, line: bytes) -> None:
        """Take one line, without its line end."""
        if len(self._lines) >= MAX_WAITING:
            self.dropped += 1
            return
        self._lines.append(line)
        if not self._awake:
            self._awake = True
            self._wake.set()

    debug = info = warning = error = critical = msg

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            if not self._closed:
                time.sleep(_GATHER)
            self._awake = False  # before looking: a line that comes now wakes again
            batch = []
            while self._lines:
                batch.append(self._lines.popleft())
            if batch:
                try:
                    self._write(b"\n".join(batch) + b"\n")
                except (OSError, ValueError):  # nobody reads any more
                    self.dropped += len(batch)
            if self._closed and not self._lines:
                return

    def _write(self, data: bytes) -> None:
        """Write all of it: an unbuffered file may take less, or nothing when it is non-blocking."""
        view = memoryview(data)
        while view:
            taken = self._stream.write(view)
            if taken is None:
                time.sleep(_RETRY)
                continue
            view = view[taken:]
        self._stream.flush()

    def close(self, timeout: float = 1.0) -> None:
        """Write what waits, but wait at most `timeout` seconds for it."""
        self._closed = True
        self._wake.set()
        self._thread.join(timeout)


class Log:
    """The log of one daemon, and the recorder of its requests."""

    def __init__(self, stream: Stream, *, level: str, fmt: str, journal: bool = False) -> None:
        """Open the log.

        Args:
            stream: where lines go.
            level: debug, info, warning or error.
            fmt: json or console.
            journal: begin each line with its syslog priority.
        """
        self._writer = LineWriter(stream)
        self._journal = journal
        self.configure(level=level, fmt=fmt)
        self.process: FilteringBoundLogger = structlog.wrap_logger(
            self._writer,
            processors=[
                self._filter,  # here, since a reload may change the level
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.processors.format_exc_info,
                self._render,
            ],
            wrapper_class=structlog.make_filtering_bound_logger(0),
            cache_logger_on_first_use=True,
        )
        self._console = structlog.dev.ConsoleRenderer(colors=False)

    def configure(self, *, level: str, fmt: str) -> None:
        """From now on; see `__init__`."""
        self._least = _LEVELS[level]
        self._requests_logged = self._least <= _LEVELS["info"]
        self._json = fmt == "json"

    def _filter(
        self, _logger: WrappedLogger, method: str, event: MutableMapping[str, Any]
    ) -> MutableMapping[str, Any]:
        if _LEVELS.get(method, _HIGHEST) < self._least:
            raise structlog.DropEvent
        return event

    def _render(self, logger: WrappedLogger, method: str, event: MutableMapping[str, Any]) -> bytes:
        render = self._render_json if self._json else self._render_console
        return render(logger, method, event)

    def dropped(self) -> int:
        """Lines that were dropped so far."""
        return self._writer.dropped

    def close(self) -> None:
        """Write what waits."""
        self._writer.close()

    def begin(self, exchange: Exchange) -> None:
        """See `Recorder`: nothing is logged before the end."""

    def record(self, exchange: Exchange) -> None:
        """See `Recorder`: the one line of a request."""
        if not self._requests_logged:
            return
        fields = request_fields(exchange)
        if not self._json:
            self.process.info("request", **fields)
            return
        # What the processors of `process` would make of it, at a third of their cost.
        fields["event"] = "request"
        fields["level"] = "info"
        fields["timestamp"] = f"{datetime.now(UTC).replace(tzinfo=None).isoformat()}Z"
        self._writer.msg(self._render_json(None, "info", fields))

    def _render_json(
        self, _logger: WrappedLogger, method: str, event: MutableMapping[str, Any]
    ) -> bytes:
        line = msgspec.json.encode(event, enc_hook=repr)
        return b"<%d>%b" % (_PRIORITIES.get(method, 6), line) if self._journal else line

    def _render_console(
        self, logger: WrappedLogger, method: str, event: MutableMapping[str, Any]
    ) -> bytes:
        return str(self._console(logger, method, event)).encode("utf-8", "backslashreplace")


class LibraryHandler(logging.Handler):
    """What asyncio and aiohttp log, by the standard library, as lines of this log."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line; where it was raised, but no message of it that may quote a request."""
        error = record.exc_info[1] if record.exc_info else None
        self._log.process.log(
            record.levelno,
            "library",
            logger=record.name,
            message=shown(record.getMessage()),
            error=None if error is None else type(error).__name__,
            where=None if error is None else traceback.format_tb(error.__traceback__),
        )


def request_fields(exchange: Exchange) -> dict[str, Any]:
    """The fields of a request's line (README, "The log"); seconds are rounded to microseconds."""
    usage = exchange.usage
    return {
        "request_id": exchange.request_id,
        "key": exchange.key,
        "endpoint": exchange.endpoint,
        "route": exchange.route,
        "upstream": exchange.upstream,
        "model": shown(exchange.model),
        "attempts": exchange.attempts,
        "status": exchange.status,
        "outcome": exchange.outcome,
        "error_code": shown(exchange.error_code),
        "upstream_request_id": shown(exchange.upstream_request_id),
        "duration_s": round(exchange.duration, 6),
        "first_token_s": _seconds(exchange.time_to_first_token),
        "overhead_s": _seconds(exchange.overhead),
        "input_tokens": usage.input if usage else 0,
        "input_cached_tokens": usage.input_cached if usage else 0,
        "output_tokens": usage.output if usage else 0,
        "output_reasoning_tokens": usage.output_reasoning if usage else 0,
        "estimated": exchange.estimated is not None,
        "replayed_turns": exchange.replayed_turns,
        "bytes_in": exchange.bytes_in,
        "bytes_out": exchange.bytes_out,
        "client": shown(exchange.client),
    }


def _seconds(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def standard_error() -> tuple[Stream, bool]:
    """Standard error, unbuffered, and whether journald reads it.

    journald names the device and inode of the stream that it connected (systemd.exec(5),
    "JOURNAL_STREAM"), so that a redirected one is not mistaken for it.
    """
    stream = open(sys.stderr.fileno(), "wb", buffering=0, closefd=False)  # noqa: SIM115 - kept
    status = os.fstat(stream.fileno())
    return stream, os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
