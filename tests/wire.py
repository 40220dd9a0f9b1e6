"""A connection to an upstream on a transport that a test plays: no socket, no event loop."""

import asyncio
from collections import deque
from collections.abc import Coroutine
from typing import Any, TypeVar, cast

from aiproxy.upstream_connection import Connection
from aiproxy.upstream_errors import Failure

T = TypeVar("T")

HIGH = 64 * 1024  # bytes that a transport takes before it says that it has enough


class WaitsError(Exception):
    """A coroutine cannot go on by itself."""


def now(coroutine: Coroutine[Any, Any, T]) -> T:
    """Return what a coroutine comes to without waiting."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return cast("T", end.value)
    coroutine.close()
    raise WaitsError


class Still:
    """An event loop that makes futures, and does nothing else."""

    def create_future(self) -> asyncio.Future[Any]:
        """Make one."""
        return asyncio.Future(loop=cast("asyncio.AbstractEventLoop", self))

    def get_debug(self) -> bool:
        """Futures ask."""
        return False


class Wire(asyncio.Transport):
    """A connection, and its transport, which brings what it is told and keeps what it is given.

    As a real one it brings nothing while it is paused or once it is closing.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.calls = 0  # of a write
        self.unsent = 0
        self.stuck = False  # the kernel takes nothing
        self.paused = False
        self.closing = False
        self.brought = 0
        self.limits: list[int | None] = []
        self.lost: list[Connection] = []
        self._coming: deque[bytes] = deque()
        self.connection = Connection(
            loop or cast("asyncio.AbstractEventLoop", Still()), self.lost.append
        )
        self.connection.connection_made(self)
        assert self.limits == [HIGH, 0]  # `sent` can be exact only so

    # What a connection does with its transport

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Note them."""
        self.limits = [high, low]

    def write(self, data: Any) -> None:
        """Keep it; all of it is with the kernel, unless that is stuck."""
        self.writelines([data])

    def writelines(self, list_of_data: Any) -> None:
        """Keep all of it."""
        assert not self.closing
        self.calls += 1
        self.written += [bytes(data) for data in list_of_data]
        if self.stuck:
            self.unsent += sum(map(len, list_of_data))
            if self.unsent > HIGH:
                self.connection.pause_writing()

    def get_write_buffer_size(self) -> int:
        """Return what the kernel has not taken."""
        return self.unsent

    def pause_reading(self) -> None:
        """Bring nothing for now."""
        assert not self.paused
        self.paused = True

    def resume_reading(self) -> None:
        """Go on, but not at once."""
        assert self.paused
        self.paused = False

    def abort(self) -> None:
        """Close."""
        self.closing = True

    def is_closing(self) -> bool:
        """Tell whether it is over."""
        return self.closing

    # What a test does

    def ask(self, body: bytes = b"") -> None:
        """Send a request."""
        self.connection.send(b"POST / HTTP/1.1\r\n\r\n", body, lambda: None)

    def drain(self) -> None:
        """Let the kernel take all."""
        self.stuck = False
        self.unsent = 0
        self.connection.resume_writing()

    def feed(self, data: bytes) -> bool:
        """Bring a piece, now or once it is not paused; return whether more may come."""
        if data:
            self._coming.append(data)
        while self._coming and not self.paused and not self.closing:
            piece = self._coming.popleft()
            self.brought += len(piece)
            self.connection.data_received(piece)
        return not self.closing

    def end(self, end: str | None) -> None:
        """End it: by FIN, by RST, or as the connection itself did."""
        if end == "FIN" and not self.closing:
            self.connection.eof_received()
        if end == "RST" and not self.closing:
            self.closing = True
            self.connection.connection_lost(ConnectionResetError())
        elif self.closing:
            self.connection.connection_lost(None)

    def taken(self) -> bytes:
        """Take what can be had of the body without waiting."""
        got = b""
        try:
            while piece := now(self.connection.read()):
                got += piece
                self.feed(b"")
        except (Failure, WaitsError):
            pass
        return got

    def judged(self) -> tuple[int | None, tuple[str, str] | None]:
        """Return the status, and how the answer failed, after all was taken."""
        status = None
        try:
            status = now(self.connection.head()).status
            assert now(self.connection.read()) == b""
        except Failure as failure:
            return status, (failure.result, failure.message)
        except WaitsError:
            return status, ("waits", "")
        return status, None
