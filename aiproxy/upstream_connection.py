"""One HTTP/1.1 connection to an upstream: a request out, its answer in.

What came is held until it is taken, at most `MOST_HELD` and one read: beyond that nothing is read,
so an upstream goes no faster than the client.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from aiproxy.upstream_answer import AnswerReader, MalformedError
from aiproxy.upstream_errors import BROKE_OFF, CLOSED, MALFORMED, Failure

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiproxy.exchange import AttemptResult
    from aiproxy.upstream_answer import Head

MOST_HELD = 64 * 1024  # bytes of a body that wait to be taken
TLS_SLICE = 64 * 1024  # bytes of a request body that are encrypted at a time
JOINED = 32 * 1024  # bytes of a request body that is copied behind its head, for one write


class Connection(asyncio.Protocol):
    """One connection: `send`, `head`, `read` until it is empty, again if it is `clean`.

    Args:
        lost: called once, when the connection is gone.
    """

    __slots__ = (
        "_asked", "_failure", "_held", "_loop", "_lost", "_paused", "_reader", "_sent", "_spoiled",
        "_transport", "_waiter", "_writing_paused",
    )  # fmt: skip

    def __init__(self, loop: asyncio.AbstractEventLoop, lost: Callable[[Connection], None]) -> None:
        self._loop = loop
        self._lost = lost
        self._reader = AnswerReader()
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._sent: Callable[[], None] | None = None
        self._failure: tuple[AttemptResult, str] | None = None
        self._asked = False
        self._held = 0  # bytes that wait to be taken
        self._writing_paused = False
        self._paused = False
        self._spoiled = False  # something came that nobody asked for

    def __repr__(self) -> str:
        reader = self._reader
        state = (
            "closed" if self.closed
            else "idle" if not self._asked
            else "whole" if reader.whole
            else "answering" if reader.head
            else "asked"
        )  # fmt: skip
        return f"<Connection {state}>"

    # -- asking

    def send(self, head: bytes, body: bytes, sent: Callable[[], None]) -> bool:
        """Send a request.

        Returns:
            Whether the kernel has all of it, or all but a little (64 KiB, with TLS twice as much);
            else `sent` is called when it has the rest.
        """
        self._reader.begin()
        self._asked = True
        self._held = 0
        transport = self._transport
        if transport is None:
            self._fail("reset", CLOSED)
            return True
        if len(body) <= JOINED:
            transport.write(head + body)
        elif transport.get_extra_info("sslcontext") is None:
            transport.writelines((head, body))
        else:
            # TLS takes all that one write gives it, and hides how much of that still waits.
            transport.write(head)
            rest = memoryview(body)
            for at in range(0, len(body), TLS_SLICE):
                transport.write(rest[at : at + TLS_SLICE])
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
        while (head := self._reader.head) is None:
            await self._news()
        return head

    async def read(self) -> bytes:
        """What has come of the body and was not taken yet; empty at its end.

        Raises:
            Failure: it broke off; what came before that was given out.
        """
        reader = self._reader
        while not reader.chunks:
            if reader.whole:
                return b""
            await self._news()
        chunks = reader.chunks
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
        return self._reader.whole and not self._reader.chunks

    @property
    def clean(self) -> bool:
        """Whether another request may be sent: nothing is left over in either direction."""
        transport = self._transport
        return (
            transport is not None
            and not transport.is_closing()
            and not self._spoiled
            and (not self._asked or (self._reader.keep and self.taken))
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
        reader = self._reader
        if not self._asked or reader.whole or self._failure is not None:
            self._spoil()
            return
        try:
            reader.feed(data)
        except MalformedError:
            self._fail("protocol", MALFORMED)
            return
        if reader.surplus:
            self._spoil()
        self._held += len(data)
        if self._held > MOST_HELD and not self._paused and self._transport is not None:
            if reader.chunks:
                self._paused = True
                self._transport.pause_reading()
            else:
                self._held = 0  # none of it is held
        self._wake()

    def eof_received(self) -> None:
        """The upstream has closed its side, properly: nothing more can come of it."""
        if self._asked and self._failure is None and self._reader.end():
            self._wake()
        else:
            self._cut()
        self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Closed, by either side, whatever the reason."""
        del exc
        self._cut()
        self._transport = None
        self._reader.close()
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

    def _cut(self) -> None:
        """Nothing more comes: an answer that is not whole is none."""
        if self._asked and not self._reader.whole:
            self._fail("reset", CLOSED if self._reader.head is None else BROKE_OFF)

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
