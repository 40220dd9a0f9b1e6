"""One HTTP/1.1 connection to an upstream: a request out, its answer in.

llhttp (by httptools) reads the framing, in its strict mode; what it leaves to its user is decided
here: any doubt about where an answer ends is an answer that is none (RFC 9112 sections 6 and 11).
What came is held until it is taken, at most `MOST_HELD` and one read: beyond that nothing is read,
so an upstream goes no faster than the client.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from aiproxy.upstream_errors import BROKE_OFF, CLOSED, MALFORMED, Failure

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiproxy.exchange import AttemptResult

MOST_HELD = 64 * 1024  # bytes of a body that wait to be taken
MAX_FIELD = (
    32 * 1024
)  # bytes of a header field or trailer field, of a reason, of a chunk's extension
MAX_FIELDS = 256  # header fields and trailer fields of an answer, those of 1xx included
JOINED = 32 * 1024  # bytes of a request body that is copied behind its head, for one write

_SWITCHING = 101
_FINAL = 200  # the first status of a final answer
_EMPTY = (204, 304)  # no body, whatever the head says (RFC 9112 section 6.3)


class Head(NamedTuple):
    """The head of an answer, in latin-1: all fields as they came, and the first of each name."""

    status: int
    headers: list[tuple[str, str]]
    first: dict[str, str]

    def get(self, name: str) -> str:
        """The first value of a lower-case name; empty where there is none."""
        return self.first.get(name, "")


class Connection(asyncio.Protocol):
    """One connection: `send`, `head`, `read` until it is empty, again if it is `clean`.

    Args:
        lost: called once, when the connection is gone.
    """

    __slots__ = (
        "_answer", "_asked", "_begun", "_chunks", "_failure", "_fields", "_headers", "_held",
        "_keep", "_loop", "_lost", "_parser", "_paused", "_quiet", "_sent", "_spoiled",
        "_transport", "_until_close", "_waiter", "_writing_paused", "whole",
    )  # fmt: skip

    def __init__(self, loop: asyncio.AbstractEventLoop, lost: Callable[[Connection], None]) -> None:
        self._loop = loop
        self._lost = lost
        self._transport: asyncio.Transport | None = None
        self._parser: HttpResponseParser | None = HttpResponseParser(self)
        self._waiter: asyncio.Future[None] | None = None
        self._sent: Callable[[], None] | None = None
        self._failure: tuple[AttemptResult, str] | None = None
        self._writing_paused = False
        self._paused = False
        self._spoiled = False  # something came that nobody asked for
        self._begin()
        self._asked = False

    def _begin(self) -> None:
        self._asked = True
        self._answer: Head | None = None
        self._headers: list[tuple[str, str]] = []
        self._begun = False  # an answer or an interim one, and not ended
        self._fields = 0
        self._quiet = 0  # bytes read since the parser last got anywhere
        self._chunks: list[bytes] = []
        self._held = 0
        self._keep = False
        self._until_close = False
        self.whole = False

    def __repr__(self) -> str:
        state = (
            "closed" if self.closed
            else "idle" if not self._asked
            else "whole" if self.whole
            else "answering" if self._answer
            else "asked"
        )  # fmt: skip
        return f"<Connection {state}>"

    # -- asking

    def send(self, head: bytes, body: bytes, sent: Callable[[], None]) -> bool:
        """Send a request.

        Returns:
            Whether that is all; else `sent` is called when the kernel has its last byte.
        """
        self._begin()
        transport = self._transport
        if transport is None:
            self._fail("reset", CLOSED)
            return True
        if len(body) <= JOINED:
            transport.write(head + body)
        else:
            transport.writelines((head, body))
        if self._writing_paused:
            self._sent = sent
        return not self._writing_paused

    def unsent(self) -> int:
        """Bytes of the request that the kernel has not taken yet."""
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    async def head(self) -> Head:
        """The head of the final answer.

        Raises:
            Failure: there is none.
        """
        while self._answer is None:
            await self._news()
        return self._answer

    async def read(self) -> bytes:
        """What has come of the body and was not taken yet; empty at its end.

        Raises:
            Failure: it broke off; what came before that was given out.
        """
        while not self._chunks:
            if self.whole:
                return b""
            await self._news()
        chunks = self._chunks
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        chunks.clear()
        self._held = 0
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return data

    async def _news(self) -> None:
        if self._failure is not None:
            raise Failure(*self._failure)
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    @property
    def taken(self) -> bool:
        """Whether the whole answer came and was taken."""
        return self.whole and not self._chunks

    @property
    def clean(self) -> bool:
        """Whether another request may be sent: nothing is left over in either direction."""
        transport = self._transport
        return (
            transport is not None
            and not transport.is_closing()
            and not self._spoiled
            and (not self._asked or (self._keep and self.taken))
            and not transport.get_write_buffer_size()
        )

    @property
    def closed(self) -> bool:
        """Whether it is gone."""
        return self._transport is None or self._transport.is_closing()

    def rest(self) -> None:
        """Nothing is asked for now: whatever comes spoils it."""
        self._asked = False
        self._sent = None

    def abort(self) -> None:
        """Close at once: a plain close would first send what waits."""
        if self._transport is not None:
            self._transport.abort()

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected."""
        self._transport = cast("asyncio.Transport", transport)
        # Resumed when all of a request's body is with the kernel.
        self._transport.set_write_buffer_limits(high=64 * 1024, low=0)

    def data_received(self, data: bytes) -> None:
        """More of the answer, or what nobody asked for."""
        if not self._asked or self.whole or self._parser is None:
            self._spoil()
            return
        if not self._begun and data[:1] != b"H":
            self._fail("protocol", MALFORMED)  # llhttp knows RTSP, too
            return
        self._quiet += len(data)
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade):
            self._broken()
        else:
            if self._quiet > MAX_FIELD:
                self._broken()
            elif self._held > MOST_HELD and not self._paused and self._transport is not None:
                self._paused = True
                self._transport.pause_reading()
        self._wake()

    def _broken(self) -> None:
        """What came is not HTTP: of the answer, or behind it."""
        if self.whole:
            self._spoil()
        else:
            self._fail("protocol", MALFORMED)

    def eof_received(self) -> None:
        """The upstream has closed its side: nothing more can come of it."""
        self._ended(None)
        self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Closed, by either side."""
        self._ended(exc)
        self._transport = None
        self._parser = None  # it knows this object: a cycle
        self._lost(self)

    def pause_writing(self) -> None:
        """The kernel takes no more for now."""
        self._writing_paused = True

    def resume_writing(self) -> None:
        """The kernel has taken all."""
        self._writing_paused = False
        sent, self._sent = self._sent, None
        if sent is not None:
            sent()

    def _ended(self, exc: Exception | None) -> None:
        if exc is None and self._until_close and self._failure is None:
            self.whole = True
        elif not self.whole:
            self._fail("reset", CLOSED if self._answer is None else BROKE_OFF)
        self._wake()

    def _fail(self, result: AttemptResult, message: str) -> None:
        if self._failure is None:
            self._failure = (result, message)
        self.abort()
        self._wake()

    def _spoil(self) -> None:
        self._spoiled = True
        self.abort()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # -- httptools

    def on_message_begin(self) -> None:
        """An answer begins; llhttp would read a second one, too."""
        if self.whole:
            raise ValueError("a second answer")
        self._begun = True

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header field, or behind the body a trailer field, which nobody needs."""
        self._quiet = 0
        self._fields += 1
        if self._fields > MAX_FIELDS or len(value) > MAX_FIELD:
            raise ValueError("a head beyond all bounds")
        if self._answer is None:
            self._headers.append((name.decode("latin-1"), value.decode("latin-1")))

    def on_headers_complete(self) -> None:
        """The head is here; judge its framing."""
        parser = self._parser
        if parser is None:
            return
        self._quiet = 0
        status = parser.get_status_code()
        headers, self._headers = self._headers, []
        if status == _SWITCHING:
            raise ValueError("nobody asked for another protocol")
        if status < _FINAL:
            return
        first: dict[str, str] = {}
        coded = []
        for name, value in headers:
            lower = name.lower()
            first.setdefault(lower, value)
            if lower == "transfer-encoding":
                coded.append(value.strip().lower())
        version = parser.get_http_version()
        if version not in ("1.1", "1.0") or (coded and version == "1.0"):
            raise ValueError("a version whose framing is another")
        if coded and coded != ["chunked"]:
            raise ValueError("a transfer coding that was not asked for")
        self._until_close = not coded and "content-length" not in first and status not in _EMPTY
        self._answer = Head(status, headers, first)

    def on_body(self, data: bytes) -> None:
        """A piece of the body."""
        self._quiet = 0
        self._chunks.append(data)
        self._held += len(data)

    def on_message_complete(self) -> None:
        """The answer is whole, unless it was an interim one."""
        if self._answer is None:
            self._begun = False
        elif self._parser is not None:
            self.whole = True
            self._keep = self._parser.should_keep_alive()
